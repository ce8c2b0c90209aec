"""Calibrating the embedded model, small; what its artifact then does in a plan; what is refused and what is named."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

import dax
from dax.cache import record
from dax.cache.artifact import find, load
from dax.cache.calibrate import Effort, Study, amplification, noise_floor, notes
from dax.cache.checkpoint import folder_digest
from dax.cache.optimal import Trajectory
from dax.cache.policy import Maker, resolve_cache
from dax.cache.step_plan import Setting, flow_sigmas
from dax.cli.main import app
from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate.calibrate import Job, run
from dax.models.wan_steps import checkpoint_digest
from dax.plan import Cache, Plan

SMALL = {"height": 32, "width": 32, "num_frames": 5, "steps": 8}
PROMPTS = "a large red circle moves right over a black background\n", "a small blue star turns over a gray background\n"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(Artifact, its path) of the embedded model: 8 steps, one prompt to record and one to judge."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "prompts.txt").write_text("".join(PROMPTS))
    job = Job(SMALL, str(folder / "tiny.json"), prompts=str(folder / "prompts.txt"), device="cpu")
    return run(replace(job, effort=Effort((0.625, 0.5), probes=1, climb=1))), folder / "tiny.json"


@pytest.fixture
def pipe():
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, steps=8, guidance=4.0):
    return pipe(
        PROMPTS[1], height=32, width=32, num_frames=5, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).frames  # fmt: skip


def test_the_artifact_is_small_and_survives_its_file(calibrated):
    artifact, path = calibrated
    assert load(path) == artifact and path.stat().st_size < 10_000
    assert [sum(r.plan.computed.values()) for r in artifact.rungs] == [10, 8]
    assert artifact.setting.checkpoint == checkpoint_digest(dax.load_tiny().transformer)
    assert artifact.setting.kernels == "exact" and artifact.sigmas == pytest.approx(flow_sigmas(8, 3.0), abs=1e-6)
    if artifact.notes:  # eight steps of this model are too coarse for a line
        assert all(rung.predictor != "linear" for rung in artifact.rungs)
    assert all(10 < rung.p10_db <= rung.psnr_db <= artifact.floor_db for rung in artifact.rungs)


def test_a_calibrated_plan_runs_as_judged(calibrated, pipe):
    artifact, path = calibrated
    exact = call(pipe)
    engine = dax.optimize(pipe, cache={"policy": "calibrated", "file": str(path), "budget": 0.5})
    cached = call(pipe)
    assert engine.gate.last.computed == {"cond": 4, "uncond": 4}
    assert record.latent_psnr(cached, exact)[0] > artifact.rungs[1].psnr_db - 10
    assert engine.plan.cache.file == f"sha256:{artifact.digest()}"  # and no path


@pytest.mark.parametrize("policy", ["teacache", "magcache"])
def test_rivals_run_on_the_same_artifact(calibrated, pipe, policy):
    _, path = calibrated
    settings = {"threshold": 0.3} | ({"retention": 0.2} if policy == "magcache" else {})
    engine = dax.optimize(pipe, cache={"policy": policy, "file": str(path), "reuse": "residual", **settings})
    call(pipe)
    assert 0 < engine.gate.last.predicted["cond"] and "calibrated" in engine.gate.last.plan.made_by


@pytest.mark.parametrize(
    ("says", "request_of"), [("steps is 8, not 6", {"steps": 6}), ("guidance_scale is 4.0, not 5.0", {"guidance": 5.0})]
)
def test_another_request_is_refused_before_the_loop(calibrated, pipe, says, request_of):
    dax.optimize(pipe, cache={"policy": "calibrated", "file": str(calibrated[1]), "budget": 0.5})
    with pytest.raises(DaxError, match=says):
        call(pipe, **request_of)


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("says", "sets"),
    [
        ("cache.mask has 4 letters, the run has 8 steps", ("cache.policy=mask", "cache.mask=1101")),
        ("belong together", ("cache.policy=mask",)),
        ("its steps is 8, not 9", ("cache.policy=calibrated", "cache.budget=0.5", "steps=9")),
        ("8 steps are fewer than the", ("cache.policy=teacache", "steps=4")),
    ],
)
def test_row_7_generate_refuses_before_weights_load(calibrated, tmp_path, monkeypatch, says, sets):
    from dax.generate import run as job

    monkeypatch.setattr(job, "load", lambda *_: pytest.fail("weights were loaded"))
    steps = [int(s.removeprefix("steps=")) for s in sets if s.startswith("steps=")]
    sets = tuple(s for s in sets if not s.startswith("steps="))
    if "mask" not in sets[0]:
        sets += (f"cache.file={calibrated[1]}",)
    given = {**SMALL, "prompt": PROMPTS[0], **({"steps": steps[0]} if steps else {})}
    if "teacache" in sets[0]:
        says = "its polynomial was fitted where steps is 8, not 4"
    with pytest.raises(DaxError) as caught:
        job.generate(job.Job(given, str(tmp_path / "clip.npz"), sets=sets, device="cpu"))
    assert says in str(caught.value) and caught.value.exit_code == 2


def test_generate_reports_what_was_computed_and_saved_nothing(calibrated, tmp_path):
    from dax.generate.run import Job, generate

    given = {**SMALL, "prompt": PROMPTS[0]}
    sets = ("cache.policy=calibrated", f"cache.file={calibrated[1]}", "cache.budget=0.5")
    found = generate(Job(given, str(tmp_path / "a.npz"), sets=sets, device="cpu"))
    assert found["computed"] == {"cond": 4, "uncond": 4} and found["warnings"] == []
    assert str(calibrated[1]) not in json.dumps(found["plan"])
    found = generate(
        Job(given, str(tmp_path / "b.npz"), sets=("cache.policy=mask", "cache.mask=11111111"), device="cpu")
    )
    assert found["warnings"] == ["step cache: it never fired (mask): every forward was computed"]


def test_other_kernels_are_named_and_refused_when_strict(calibrated, tmp_path):
    """But for exact ones: what was calibrated on them serves all."""
    artifact, path = calibrated
    noisy = replace(artifact, setting=replace(artifact.setting, kernels="int8 linears"))
    noisy.save(tmp_path / "noisy.json")

    def resolved(path, kernels):
        wanted = Cache(policy="calibrated", file=str(path), budget=0.5)
        return resolve_cache(wanted, "tiny", artifact.setting.checkpoint, kernels)[2:]

    (same, nothing), (served, also) = resolved(path, "exact"), resolved(path, "int8 linears")
    assert nothing == also == [] and [text for text in served if text not in same] == [
        "cache: calibrated on exact kernels, where no noise hides what a step costs"
    ]
    assert resolved(tmp_path / "noisy.json", "int8 linears")[1] == []
    (other,) = resolved(tmp_path / "noisy.json", "int8 attention")[1]
    assert "calibrated on other kernels (int8 linears) than these (int8 attention)" in other


def test_what_a_policy_needs_and_lacks_is_named(calibrated):
    artifact, path = calibrated
    for policy in ("calibrated", "teacache", "magcache"):
        with pytest.raises(DaxError, match="nothing is published or calibrated for wan-t2v-2x64: run `dax calibrate`"):
            resolve_cache(Cache(policy=policy), "wan-t2v-2x64", "b" * 64, "exact")
    with pytest.raises(DaxError, match="calibrated for another checkpoint"):
        resolve_cache(Cache(policy="calibrated", file=str(path)), "tiny", "b" * 64, "exact")
    for change, says in (({"budget": 0.1}, "the cheapest"), ({"min_psnr": 99.0}, "the best holds")):
        with pytest.raises(DaxError, match=says):
            resolve_cache(Cache(policy="calibrated", file=str(path), **change), "tiny", None, "exact")


def test_the_cheapest_rung_that_holds_a_fidelity(calibrated):
    artifact, _ = calibrated
    rungs = tuple(replace(r, psnr_db=db, p10_db=db - 2) for r, db in zip(artifact.rungs, (40.0, 30.0)))
    artifact = replace(artifact, rungs=rungs)
    assert artifact.rung(1.0, 29.0) is rungs[1] and artifact.rung(1.0, 31.0) is rungs[0]
    assert artifact.rung(0.5, 0.0) is rungs[1] and artifact.rung(0.9, 0.0) is rungs[0]


def test_without_a_calibration_a_published_model_falls_to_its_mask_by_name():
    cache, found, _, fallbacks = resolve_cache(Cache(policy="calibrated"), "wan2.1-t2v-14b", "b" * 64, "exact")
    assert found is None and cache.policy == "magcache" and "the published mask of wan2.1-t2v-14b" in fallbacks[0]
    plan = Maker(cache, None, FACTS["wan2.1-t2v-14b"])(Setting(50, flow_shift=5.0), None)
    assert plan.mask() == "11111111110000001000000100000010000010000100100101"
    assert sum(plan.computed.values()) == 36 and "published" in plan.made_by


def test_fast_is_balanced_with_steps_predicted():
    fast, balanced = Plan.load("fast"), Plan.load("balanced")
    assert fast.cache.policy == "calibrated"
    assert fast.model_copy(update={"cache": balanced.cache}) == balanced


def test_published_teacache_is_refused_outside_its_setting():
    cache = resolve_cache(Cache(policy="teacache"), "wan2.1-t2v-14b", "b" * 64, "exact")[0]
    make = Maker(cache, None, FACTS["wan2.1-t2v-14b"])
    assert make(Setting(50, flow_shift=5.0), flow_sigmas(50, 5.0)) is None  # the time embedding decides
    for setting, says in (
        (Setting(20, flow_shift=5.0), "steps is 50, not 20"),
        (Setting(50, flow_shift=3.0), "5.0, not 3"),
    ):
        with pytest.raises(DaxError, match=says):
            make(setting, None)


def test_teacache_asks_the_model_for_its_embeddings():
    cache = resolve_cache(Cache(policy="teacache", threshold=0.2), "wan2.1-t2v-14b", None, "exact")[0]
    asked = []

    def embeddings(timesteps, projected):
        asked.append(projected)
        return torch.cumsum(torch.full((50, 8), 0.03), 0) + 1

    plan = Maker(cache, None, FACTS["wan2.1-t2v-14b"], embeddings)(
        Setting(50, flow_shift=5.0), flow_sigmas(50, 5.0), "t"
    )
    assert asked == [True] and plan.mask().startswith("11111") and "0" in plan.mask()


@pytest.mark.parametrize(
    ("policy", "says", "setting"),
    [
        ("mask", "number of steps is", Setting()),
        ("magcache", "noise levels are", Setting(50)),
        ("teacache", "timesteps are", Setting(50)),
    ],
)
def test_a_transformer_without_its_pipeline_is_refused_what_only_the_scheduler_knows(policy, says, setting):
    cache = Cache(policy=policy, mask="1" * 50 * (policy == "mask"))
    make = Maker(cache, None, FACTS["wan2.1-t2v-14b"], embeddings=lambda *_: pytest.fail("asked"))
    with pytest.raises(DaxError, match=f"the {says} unknown: optimize the pipeline"):
        make(setting, None)


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("format is 'x'", {"format": "x"}),
        ("damaged", {"rungs": [1]}),
        ("damaged", {"teacache": {}}),
        ("damaged", {"sigmas": 3}),
    ],
)
def test_damaged_artifacts(calibrated, tmp_path, says, change):
    value = json.loads(calibrated[1].read_text()) | change
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(DaxError, match=says):
        find(str(tmp_path / "a.json"), None)


def test_a_file_that_cannot_be_written_leaves_nothing(calibrated, tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(DaxError, match="a.json: Is a directory") as caught:
        calibrated[0].save(tmp_path / "a.json")
    assert caught.value.exit_code == 6 and [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("says", "text"), [("not JSON", "{"), ("format is 'list'", "[]")])
def test_files_that_are_no_artifact(tmp_path, says, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DaxError, match=says):
        load(tmp_path / "a.json")
    with pytest.raises(DaxError, match="No such file"):
        load(tmp_path / "b.json")


def test_a_digest_is_of_the_checkpoint_in_any_dtype(pipe, tmp_path):
    from safetensors.torch import save_file

    table = pipe.transformer.scale_shift_table.detach()
    digest = checkpoint_digest(pipe.transformer)
    for dtype in (torch.float32, torch.bfloat16):
        save_file({"scale_shift_table": table.to(dtype), "other": torch.zeros(3)}, tmp_path / "a.safetensors")
        assert folder_digest(tmp_path / "a.safetensors", 4) == digest
    with torch.no_grad():
        pipe.transformer.scale_shift_table[0, 0, 0] += 1
    assert checkpoint_digest(pipe.transformer) != digest


def test_recording_is_what_the_runs_did(pipe):
    """Gram, changes and ratios beside the same numbers from forwards asked for one by one."""
    clips = record.make_clips(pipe, [PROMPTS[0]], (32, 32, 5), 3, 4.0, 0)
    with torch.no_grad():
        found = record.record(pipe, clips, 1)
    pipe.scheduler.set_timesteps(3)
    latents, guided, conds, lengths = clips.noise, [], [], []
    entered, left = [], []
    hooks = [
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda m, a: entered.append(a[0].clone())),
        pipe.transformer.blocks[-1].register_forward_hook(lambda m, a, o: left.append(o)),
    ]
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            c, u = (pipe.transformer(latents, t.expand(1), e).sample for e in (clips.text, clips.negative))
        lengths.append((left[-2] - entered[-2]).norm(dim=-1))
        conds.append(c), guided.append(u + 4.0 * (c - u))
        latents = pipe.scheduler.step(guided[-1], t, latents, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    flat = torch.stack(guided).flatten(1).double()
    assert np.allclose(found.gram, (flat @ flat.T / flat.shape[1]).numpy(), rtol=1e-4)
    assert np.allclose(
        found.changes, [float((b - a).abs().mean() / a.abs().mean()) for a, b in zip(conds, conds[1:])], rtol=1e-3
    )
    assert np.allclose(
        found.ratios["cond"][1:], [float((b / a).mean()) for a, b in zip(lengths, lengths[1:])], rtol=1e-3
    )
    assert torch.allclose(found.latents, latents, atol=1e-4)
    with torch.no_grad():
        assert 0 < noise_floor(pipe, clips, found, 1) < 1e-3


@pytest.mark.parametrize("floor", [1e-6, 0.002])
def test_growth_is_heard_whatever_the_noise_floor(monkeypatch, floor):
    """Errors grow 8 times at the start and not at all at the end; rounding is silent or drowns a lone step."""
    steps, generator = 50, torch.Generator().manual_seed(0)
    sigmas = np.array(flow_sigmas(steps, 3.0))
    still, moving, noise = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    velocities = [still + s**2 * moving for s in sigmas]
    growth = 8 ** np.linspace(1, 0, steps)
    ahead, masks = np.diff(np.append(sigmas, 0.0)), []

    @contextmanager
    def gated(_, plan):
        masks.append(plan.mask())
        yield

    def run_toy(*_):
        latents = floor * noise
        for step in (step for step in range(steps) if masks[-1][step] == "0"):
            reused = velocities[masks[-1].index("0") - 1]
            latents = latents + growth[step] * ahead[step] * (reused - velocities[step])
        return latents[None]

    monkeypatch.setattr("dax.cache.calibrate.gated", gated)
    monkeypatch.setattr("dax.cache.calibrate.run", run_toy)
    nothing = torch.zeros(1, 4000)
    clips = record.Clips(nothing, nothing, nothing, 32, 32, 5, steps, 4.0)
    found = record.Recording(sigmas, record.gram_of(velocities), None, {}, nothing)
    measured = amplification(SimpleNamespace(progress_bar=None), clips, found, floor, Effort(), lambda _: None)
    assert np.allclose(measured[5:45], growth[5:45], rtol=0.1)
    assert ({mask.count("0") for mask in masks} == {1}) == (floor < 1e-5)


@pytest.mark.parametrize("bar", [True, False])
def test_exact_runs_are_seen_while_they_last(pipe, capsys, bar):
    """As bars of steps, or a line a run; the pipeline's own bar is put back, after an error too."""
    clips, lines = record.make_clips(pipe, list(PROMPTS), (32, 32, 5), 3, 4.0, 0), []
    with torch.no_grad():
        with record.told(pipe, "recording", clips, 1, lines.append, bar):
            found = record.record(pipe, clips, 1)
        amplification(pipe, clips, found, 1e-3, Effort(probes=1), lines.append, bar)
    with pytest.raises(KeyError), record.told(pipe, "recording", clips, 1, lines.append, bar):
        raise KeyError
    assert "progress_bar" not in vars(pipe)
    heard = capsys.readouterr().err
    if bar:
        assert "recording: 100%" in heard and "6/6" in heard and "how errors grow: 100%" in heard
        assert len(lines) == 1 and lines[0].startswith("errors grow by")
    else:
        runs = [f"{what}: run {n} of 2" for what in ("recording", "how errors grow") for n in (1, 2)]
        assert heard == "" and [line.rsplit(",", 1)[0] for line in lines[:4]] == runs


@pytest.mark.parametrize("bar", [True, False])
def test_the_search_is_seen_while_it_lasts(pipe, capsys, bar):
    """Also where it tries fewer masks than it may: only one is near this one."""
    clips, lines = record.make_clips(pipe, list(PROMPTS), (32, 32, 5), 3, 4.0, 0), []
    with torch.no_grad():
        found = record.record(pipe, clips, 1)
        trajectory, effort = Trajectory(found.sigmas, found.gram, np.ones(3)), Effort(climb=4)
        study = Study(pipe, clips, found, clips, found.latents, trajectory, Setting(), effort)
        rung = study.rung(2, {"reuse": "110"}, lines.append, bar)
    assert rung.plan.mask().count("1") == 2 and lines[-1].startswith("2 steps: reuse")
    heard = capsys.readouterr().err
    if bar:
        assert "2 steps, search: 100%" in heard and "12/12" in heard and len(lines) == 1
        assert "2 steps, held-out prompts: 100%" in heard
    else:
        assert heard == "" and [line.split(",")[1].split(":")[0] for line in lines[:5]] == [" search"] * 4 + [
            " held-out prompts"
        ]


@pytest.mark.parametrize(
    ("terminal", "as_json", "bar"), [(True, (), True), (True, ("--json",), False), (False, (), False)]
)
@pytest.mark.parametrize("command", [("calibrate",), ("bench", "cache")])
def test_bars_are_for_a_terminal(monkeypatch, command, terminal, as_json, bar):
    def stop(*given, **named):
        raise DaxError("bug", f"bar: {named.get('bar', given[-1])}")

    monkeypatch.setattr("dax.generate.calibrate.run", stop)
    monkeypatch.setattr("dax.bench.cache.bench", stop)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with pytest.raises(DaxError, match=f"bar: {bar}"):
        typer.main.get_command(app)([*command, *as_json], standalone_mode=False)


def test_noise_above_the_change_is_said():
    calm = Trajectory(np.array(flow_sigmas(6, 3.0)), np.ones((6, 6)) + np.diag(np.full(6, 0.04)), np.ones(6))
    assert "linear extrapolation is off: the velocity's noise exceeds its change" in notes(calm)[0]
    smooth = np.linspace(1, 0.5, 6)
    assert notes(replace(calm, gram=np.outer(smooth, smooth) + 1e-9 * np.eye(6), sigmas=smooth)) == []


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("guidance_scale 1: calibrate with guidance", {"given": {**SMALL, "guidance_scale": 1.0}}),
        ("one.txt: 1 to use; at least 2", {"prompts": "one.txt"}),
        ("num_prompts 1 must lie from 2", {"num_prompts": 1}),
        ("num_prompts -1 must lie from 2", {"num_prompts": -1}),
        ("budget 2: 2 of 8 steps are the least, budget 0.25; the most is 1", {"effort": Effort((0.5, 2.0))}),
        ("budget nan: 2 of 8 steps", {"effort": Effort((float("nan"),))}),
        (
            "budget 0.1: 3 of 20 steps are the least, budget 0.15",
            {"effort": Effort((0.1,)), "given": {**SMALL, "steps": 20}},
        ),
        ("2 steps: too few to leave one out", {"given": {**SMALL, "steps": 2}}),
        ("probes 7 must lie from 0 to 6", {"effort": Effort(probes=7)}),
        ("climb -1 must lie from 0", {"effort": Effort(climb=-1)}),
        ("batch 0 must lie from 1", {"effort": Effort(batch=0)}),
        ("No such file", {"prompts": "/no/such/file"}),
        ("unknown suffix", {"output": "a.txt"}),
    ],
)
def test_calibrating_refuses_before_weights_load(tmp_path, monkeypatch, says, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    monkeypatch.setattr("dax.generate.calibrate.load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(DaxError, match=says):
        run(replace(Job(SMALL, "a.json", device="cpu"), **change))


def test_artifacts_are_found_by_digest_and_kernels(calibrated, tmp_path, monkeypatch):
    artifact, _ = calibrated
    other = replace(artifact, setting=replace(artifact.setting, kernels="int8 linears"))
    artifact.save(tmp_path / "tiny.exact.json"), other.save(tmp_path / "tiny.int8.json")
    monkeypatch.setattr("dax.cache.artifact.SHIPPED", tmp_path)
    checkpoint = artifact.setting.checkpoint
    assert find("auto", checkpoint, "int8 linears") == find("auto", checkpoint, "exact") == artifact
    assert find("auto", "b" * 64) is None and find(f"sha256:{other.digest()}", None) == other
    noisier = replace(artifact, setting=replace(artifact.setting, kernels="int8 attention"))
    noisier.save(tmp_path / "tiny.exact.json")
    assert find("auto", checkpoint, "int8 linears") == other and find("auto", checkpoint, "int8 attention") == noisier
    with pytest.raises(DaxError, match="no calibration of that digest ships"):
        find("sha256:" + "0" * 64, None)


def test_what_ships_for_the_embedded_model():
    """`fast` and `original` run on it; the file is small, and belongs to the weights beside it."""
    shipped = find("auto", checkpoint_digest(dax.load_tiny().transformer), "exact")
    assert shipped is not None and shipped.setting.steps == 50 and len(json.dumps(shipped.to_json())) < 40_000
    assert [sum(rung.plan.computed.values()) for rung in shipped.rungs] == [50, 40, 32, 24, 22, 20]
    for preset, made_by in (("fast", "calibrated"), ("original", "TeaCache 0.1, calibrated")):
        cache, found, _, _ = resolve_cache(Plan.load(preset).cache, "tiny", shipped.setting.checkpoint, "exact")
        plan = Maker(cache, found, FACTS["tiny"])(Setting(50, flow_shift=3.0, guidance_scale=4.0), None)
        assert plan.made_by.startswith(made_by) and sum(plan.computed.values()) <= 40
