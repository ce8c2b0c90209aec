"""The whole job with the embedded model, small sizes and few steps; and that DAX's loop is the pipeline's own."""

import json
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest

from dax.errors import DaxError
from dax.generate import run, video
from dax.generate.run import Job, generate

SMALL = {
    "prompt": "a red circle moves right over a black background",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "steps": 2,
}


def test_frames_are_those_of_the_stock_pipeline(tmp_path):
    import torch

    import dax

    record = generate(Job(SMALL, str(tmp_path / "clip.npz")))
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        SMALL["prompt"], "", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames[0]  # fmt: skip
    saved = np.load(tmp_path / "clip.npz")["frames"]
    assert np.abs(saved.astype(int) - (stock * 255).round().astype(int)).max() <= 1
    assert record["computed"] == {"cond": 2, "uncond": 2}


def test_the_record_has_all_its_keys_and_travels_in_the_clip(tmp_path):
    record = generate(Job({**SMALL, "guidance_scale": 1.0}, str(tmp_path / "clip.mp4")))
    wanted = (
        "path model prompt seed height width num_frames fps steps guidance_scale plan plan_hash computed seconds "
        "peak_memory_gib device versions warnings"
    )
    assert set(wanted.split()) <= set(record)
    assert {"text", "denoise", "decode", "write", "total"} <= set(record["seconds"])
    assert record["computed"] == {"cond": 2, "uncond": 0}
    inside = video.read_record(tmp_path / "clip.mp4")
    assert {k: v for k, v in inside.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}


def test_the_same_request_gives_the_same_frames_whatever_ran_before(tmp_path):
    for name, seed in (("a", 7), ("b", 8), ("c", 7)):
        generate(Job({**SMALL, "seed": seed}, str(tmp_path / f"{name}.npz")))
    a, b, c = (np.load(tmp_path / f"{name}.npz")["frames"] for name in "abc")
    assert np.array_equal(a, c) and not np.array_equal(a, b)


def test_the_memory_check_knows_what_a_job_gives_back(monkeypatch):
    from dax.generate.preflight import preflight
    from dax.generate.request import Released
    from dax.generate.settle import settle
    from dax.models.tiny import FOLDER

    asked = []
    monkeypatch.setattr("dax.generate.settle.check_memory", lambda *given: asked.append(given))
    settle(Job({"prompt": "x"}, device="cpu"))
    (_, _, weights, _, _, released), folder = asked[0], preflight(FOLDER)
    assert weights == 4 * folder.parameters
    assert released == Released(4 * folder.text_parameters, 4 * folder.facts.num_parameters)


def test_flow_shift_reaches_the_scheduler(tmp_path):
    for name, shift in (("a", 3.0), ("b", 8.0)):
        generate(Job({**SMALL, "flow_shift": shift}, str(tmp_path / f"{name}.npz")))
    a, b = (np.load(tmp_path / f"{name}.npz")["frames"] for name in "ab")
    assert not np.array_equal(a, b)


@pytest.mark.fault(10)
def test_row_10_a_prompt_cut_by_the_encoder_is_named(tmp_path):
    record = generate(Job({**SMALL, "prompt": "red " * 700}, str(tmp_path / "clip.npz")))
    assert record["warnings"] == ["the prompt has 701 tokens: the last 189 are not used"]


@pytest.mark.fault(28)
def test_row_28_a_nan_never_becomes_a_clip(tmp_path, monkeypatch):
    honest = run.load

    def broken(*arguments):
        pipe = honest(*arguments)
        pipe.transformer.blocks[1].ffn.net[2].bias.data[5] = float("nan")
        return pipe

    monkeypatch.setattr(run, "load", broken)
    with pytest.raises(DaxError, match="latents are not finite") as caught:
        generate(Job(SMALL, str(tmp_path / "clip.npz")))
    assert caught.value.exit_code == 8 and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"given": {**SMALL, "height": 33}}, 2),
        ({"plan": "exakt"}, 2),
        ({"sets": ("attention.kernal=sdpa",)}, 2),
        ({"sets": ("linear.scheme=int7",)}, 2),
        ({"model": "wan2.1-t2v-14b"}, 3),
        ({"model": "/no/such/folder"}, 3),
        ({"output": "/no/such/folder/clip.mp4"}, 6),
        ({"given": {**SMALL, "height": 8192, "width": 8192, "num_frames": 100_001}}, 4),
        ({"sets": ("attention.kernel=flash",), "strict": True}, 4),
    ],
)
def test_everything_refusable_is_refused_before_weights_load(tmp_path, monkeypatch, change, code):
    monkeypatch.setattr(run, "load", lambda *arguments: pytest.fail("weights were loaded"))
    job = replace(Job(SMALL, str(tmp_path / "clip.npz"), device="cpu"), **change)
    with pytest.raises(DaxError) as caught:
        generate(job)
    assert caught.value.exit_code == code and os.listdir(tmp_path) == []


def test_a_fallback_is_named_in_the_record(tmp_path):
    record = generate(Job(SMALL, str(tmp_path / "clip.npz"), sets=("attention.kernel=flash",), device="cpu"))
    assert any("attention.kernel = flash" in warning and "sdpa instead" in warning for warning in record["warnings"])
    assert record["plan"]["attention"]["kernel"] == "sdpa"


@pytest.mark.fault(39)
def test_row_39_frames_are_kept_elsewhere_when_asked(tmp_path, monkeypatch):
    def full(part, *_):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "write_mp4", full)
    with pytest.raises(DaxError, match="No space left on device; the frames are in") as caught:
        generate(Job(SMALL, str(tmp_path / "a.mp4"), keep_frames_on_error=str(tmp_path / "kept.npz")))
    assert caught.value.exit_code == 6 and os.listdir(tmp_path) == ["kept.npz"]
    assert json.loads(str(np.load(tmp_path / "kept.npz")["dax"]))["prompt"] == SMALL["prompt"]


def test_running_out_of_memory_is_one_line(tmp_path, monkeypatch):
    import torch

    def hungry(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")

    monkeypatch.setattr(run, "denoise", hungry)
    with pytest.raises(DaxError, match="32x48x5 does not fit: fewer frames") as caught:
        generate(Job(SMALL, str(tmp_path / "clip.npz")))
    assert caught.value.exit_code == 5


@pytest.mark.gpu
def test_the_embedded_model_on_a_gpu(tmp_path):
    record = generate(
        Job({"prompt": "a large yellow star moves up over a dark blue background"}, str(tmp_path / "c.npz"))
    )
    clip = np.load(tmp_path / "c.npz")["frames"]
    assert clip.shape == (17, 128, 128, 3) and clip.std() > 10 and "NVIDIA" in record["device"]


@pytest.mark.parametrize("plan", ["exact", "balanced"])
def test_a_model_leaves_the_memory_when_its_work_is_done(tmp_path, monkeypatch, plan):
    alive, seen = {}, {}

    def loading(*args):
        pipe = load(*args)
        alive.update({name: weakref.ref(getattr(pipe, name)) for name in ("text_encoder", "transformer", "vae")})
        return pipe

    def watched(stage):
        def wrapper(*args, **kwargs):
            seen[stage.__name__] = [name for name, reference in alive.items() if reference() is not None]
            return stage(*args, **kwargs)

        return wrapper

    load = run.load
    monkeypatch.setattr(run, "load", loading)
    monkeypatch.setattr(run, "denoise", watched(run.denoise))
    monkeypatch.setattr(run, "decode", watched(run.decode))
    generate(Job(SMALL, str(tmp_path / "clip.npz"), plan=plan))
    assert seen == {"denoise": ["transformer", "vae"], "decode": ["vae"]}


def test_from_an_earlier_clip_gives_the_same_clip_again(tmp_path):
    first = generate(
        Job({**SMALL, "seed": 3, "flow_shift": 5.0}, str(tmp_path / "a.mp4"), sets=("attention.kernel=sdpa",))
    )
    again = generate(Job({}, str(tmp_path / "b.mp4"), from_clip=str(tmp_path / "a.mp4")))
    same = [key for key in first if key not in ("path", "seconds", "peak_memory_gib")]
    assert {key: again[key] for key in same} == {key: first[key] for key in same}
    other = generate(
        Job({"seed": 4, "prompt": None}, str(tmp_path / "c.npz"), from_clip=str(tmp_path / "a.mp4"), plan="exact")
    )
    assert (other["seed"], other["prompt"], other["flow_shift"]) == (4, SMALL["prompt"], 5.0)


def test_from_on_the_command_line(tmp_path, capsys):
    from dax.cli.generate import command

    command(**SMALL, output=str(tmp_path / "a.png"), negative_prompt="blue")
    command(None, from_clip=str(tmp_path / "a.png"), output=str(tmp_path / "b.png"), as_json=True)
    said = capsys.readouterr()
    record = json.loads(said.out.splitlines()[1])
    assert record == video.read_record(tmp_path / "b.png") | {"seconds": record["seconds"]}
    assert (record["prompt"], record["negative_prompt"]) == (SMALL["prompt"], "blue")
    assert said.err.count("no --model") == 1


def test_settings_of_a_clip_are_checked_like_any_other(tmp_path):
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    for record, code, says in (
        ({**SMALL, "height": 33}, 2, "height 33"),
        ({**SMALL, "model": ["os", "system"]}, 2, "names no model"),
        ({**SMALL, "plan": {"teleport": True}}, 2, "clip .*teleport"),
        ({**SMALL, "model": "/no/such/folder"}, 3, "no such folder"),
        ({}, 2, "no prompt"),
    ):
        video.write(tmp_path / "old.npz", frames, 8, record, overwrite=True)
        with pytest.raises(DaxError, match=says) as caught:
            generate(Job({}, str(tmp_path / "new.npz"), from_clip=str(tmp_path / "old.npz")))
        assert caught.value.exit_code == code and os.listdir(tmp_path) == ["old.npz"]


def test_another_model_under_the_same_name_is_named(tmp_path):
    generate(Job(SMALL, str(tmp_path / "a.npz")))
    record = video.read_record(tmp_path / "a.npz")
    saved = np.load(tmp_path / "a.npz")["frames"]
    video.write(tmp_path / "b.npz", saved, 8, {**record, "model_digest": "0" * 64})
    again = generate(Job({}, str(tmp_path / "c.npz"), from_clip=str(tmp_path / "b.npz")))
    assert any("its digest differs" in warning for warning in again["warnings"])


def test_a_local_folder_of_another_model(random_folder, tmp_path):
    record = generate(Job(SMALL, str(tmp_path / "a.npz"), model=str(random_folder), verify=True))
    assert record["model"] == str(random_folder)
    assert record["warnings"] == ["--verify: 10 of 10 files have no recorded digest"]
