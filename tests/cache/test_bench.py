"""The benches of the step cache: rivals compute just the steps they are compared at; figures come with their checks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dax.bench import cache, step, video
from dax.cache.artifact import SHIPPED, Artifact, load
from dax.cache.magcache import Ratios
from dax.cache.record import latent_psnr, make_clips, run
from dax.cache.step_plan import Setting, flow_sigmas
from dax.cache.teacache import Polynomial
from dax.errors import DaxError
from dax.facts import FACTS
from dax.plan import Plan

STEPS = 20


@pytest.fixture
def artifact():
    lengths = tuple(np.linspace(1.02, 0.9, STEPS).tolist())
    return Artifact(
        model="test",
        setting=Setting(),
        sigmas=tuple(flow_sigmas(STEPS, 3.0)),
        rungs=(),
        moved=tuple((0.02 + 0.01 * np.sin(np.arange(STEPS - 1))).tolist()),
        teacache=Polynomial((5.0, 0.01), True, Setting()),
        magcache=Ratios(lengths, lengths, 3.0),
        floor_db=100.0,
    )


@pytest.mark.parametrize("settings", [cache.teacache_settings, cache.magcache_settings])
def test_every_setting_of_a_rival_computes_just_the_steps_it_is_compared_at(artifact, settings):
    for count in (8, 10):
        masks = settings(artifact, count)
        assert len(set(masks.values())) > 3
        assert all(len(mask) == STEPS and mask.count("1") == count for mask in masks.values())


def test_what_ships_is_judged_as_it_is():
    part = Plan.load("fast").cache
    shipped = load(SHIPPED / "tiny.exact.json")
    judged = cache.chosen(part, shipped.setting, cache.EFFORT)
    assert [rung.plan.computed["cond"] for rung in judged.rungs] == [25, 20, 16]
    assert set(judged.rungs) < set(shipped.rungs) and judged.teacache == shipped.teacache
    with pytest.raises(DaxError, match="its flow_shift"):
        cache.chosen(part, replace(shipped.setting, flow_shift=5.0), cache.EFFORT)
    with pytest.raises(DaxError, match="no calibration ships for this checkpoint"):
        cache.chosen(part, replace(shipped.setting, checkpoint="0" * 64), cache.EFFORT)


@pytest.mark.parametrize("plan", ["exact", "fast"])
def test_a_record_tells_of_a_calibration_only_what_was_done(monkeypatch, plan):
    shipped = load(SHIPPED / "tiny.exact.json")
    monkeypatch.setattr(cache, "make_clips", lambda pipe, prompts, *_: prompts)
    monkeypatch.setattr(cache, "calibrate", lambda *_: shipped)
    monkeypatch.setattr(cache, "contest", lambda *_: [])
    found = cache.bench(plan, num_test=3, device="cpu")
    made = {"calibration_prompts", "held_out_prompts", "effort"} & found.keys()
    assert found["test_prompts"] == 3 and found["setting"]["steps"] == 50
    assert (found["calibrated"], len(made)) == (("in this run", 3) if plan == "exact" else ("auto", 0))


def test_no_threshold_is_none():
    assert cache.threshold_for(lambda t: "11111111" if t < 0.5 else "10000000", 4, 1.0) is None


def test_the_solver_on_all_steps_is_the_exact_run(random_pipe):
    clips = make_clips(random_pipe, ["red", "blue"], (32, 32, 5), 4, 4.0, 0)
    with torch.no_grad():
        reference = run(random_pipe, clips, 2)
        scheduler = random_pipe.scheduler
        assert (cache.on_subset(random_pipe, clips, "1111", reference, 1) > 80).all()
        fewer = cache.on_subset(random_pipe, clips, "1101", reference, 1)
    assert (fewer < 80).all() and random_pipe.scheduler is scheduler


def test_a_clip_is_as_far_as_its_mean_square_says():
    reference = torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert latent_psnr(reference + 0.4, reference) == pytest.approx([20.0, 20 * np.log10(5)])
    assert latent_psnr(reference, reference).tolist() == [100.0, 100.0]


def test_a_predicted_step_is_timed_at_real_size_only_if_it_is_right(monkeypatch):
    size = 64, 64, 5
    found = step.bench("tiny", size, 0.0, 0.01, "cpu")
    assert found["rows"][0]["ms"] > 0 and found["rows"][0]["state_mb"] == 2 * 4 * 2 * 16 * 2 * 8 * 8 / 1e6
    json.dumps(found)
    monkeypatch.setattr("dax.cache.gate.combine", lambda velocities, weights: velocities[0].float())
    with pytest.raises(DaxError, match="lies .* from the sum it should be"):
        step.bench("tiny", size, 0.0, 0.01, "cpu")


def test_the_loop_is_timed_step_by_step(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text('cache:\n  policy: mask\n  mask: "110100"\n')
    found = video.bench("tiny", (32, 32, 5), str(plan), 6, 1, "cpu", lambda text: None)
    assert found["computed"] == {"cond": 3, "uncond": 3} and found["computed_share"] == 0.5
    assert [row["steps"] for row in found["rows"]] == [3, 3, 3, 6] and len(found["steps_s"]) == 6
    assert found["loop_s"] == pytest.approx(sum(found["steps_s"]))
    json.dumps(found)
    with pytest.raises(DaxError, match="no step cache"):
        video.bench("tiny", (32, 32, 5), "exact", 6, 1, "cpu")
    with pytest.raises(DaxError, match="at least 4"):
        video.bench("tiny", (32, 32, 5), str(plan), 3, 1, "cpu")
    with pytest.raises(DaxError, match="--layers 0: tiny has 1 to 4"):
        video.bench("tiny", (32, 32, 5), str(plan), 6, 0, "cpu")


@pytest.mark.parametrize("offload", ["none", "experts"])
def test_the_loop_of_two_experts_is_timed(tmp_path, monkeypatch, offload):
    kind = {"boundary_ratio": 0.875, "family": "wan2.2-t2v"}
    monkeypatch.setitem(FACTS, "two", replace(FACTS["tiny"], name="two", **kind))
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"offload: {offload}\ncache:\n  policy: mask\n  mask: '110010'\n")
    found = video.bench("two", (32, 32, 5), str(plan), 6, 1, "cpu", lambda text: None)
    assert found["mask"] == "111010" and found["computed"] == {"cond": 4, "uncond": 4}
