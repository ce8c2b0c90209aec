"""The embedded model is whole, small, alive and good enough to be judged."""

from pathlib import Path

import numpy as np
import pytest

import dax
from dax.models.tiny import FOLDER
from training.tiny_wan import evaluate, judge, scenes, whole_clip


@pytest.fixture(scope="module")
def pipe():
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_small_and_safe():
    weights = list(FOLDER.rglob("*.safetensors"))
    sizes = [file.stat().st_size for file in weights]
    assert sum(sizes) <= 32e6 and max(sizes) <= 15e6
    assert {file.suffix for file in FOLDER.rglob("*") if file.is_file()} <= {".safetensors", ".json", ".md", ".txt"}


def test_the_card_states_what_was_measured():
    import json

    card = (FOLDER / "README.md").read_text()
    measured = json.loads((Path(dax.__file__).parents[1] / "benchmarks" / "tiny_wan.json").read_text())
    one = measured["one_object guidance 4"]
    assert f"{one['colour']:.0f}, {one['shape']:.0f}, {one['motion']:.0f}, {one['background']:.0f} %" in card
    assert f"{measured['vae_psnr_db']:.1f} dB" in card
    moved = measured["aliveness"].values()
    assert min(moved) > 0.2


def test_every_block_and_every_self_attention_matters(pipe):
    """Removing any one moves the velocity by more than 20 %: mean over sigma .9, .6, .3 and 16 captions."""
    moved = evaluate.aliveness(pipe, num_captions=16)
    assert len(moved) == 8 and min(moved.values()) > 0.2, moved


def test_the_autoencoder_gives_a_drawn_clip_back(pipe):
    import torch

    _, _, clip = scenes.batch(1, 10_000_000, combinations=scenes.HELD_OUT)
    with torch.no_grad():
        mean, _ = whole_clip.encode(pipe.vae, clip * 2 - 1)
        back = (whole_clip.decode(pipe.vae, mean).clamp(-1, 1) + 1) / 2
    assert -10 * (back - clip).square().mean().log10() > 30


def test_guidance_matters(pipe):
    import torch

    text, nothing = pipe.encode_prompt("a red circle moves left over a gray background", "", max_sequence_length=512)
    x = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0])
    with torch.no_grad():
        told, untold = (pipe.transformer(x, t, y, return_dict=False)[0] for y in (text, nothing))
    assert (told - untold).norm() / told.norm() > 0.05


def test_the_judge_reads_the_demo_clip_as_its_prompt(tmp_path):
    """The command of `make demo`, at its defaults."""
    from dax.generate.run import Job, generate

    prompt = "a large yellow star moves up over a dark blue background"
    record = generate(Job({"prompt": prompt}, str(tmp_path / "c.npz")))
    clip = np.load(tmp_path / "c.npz")["frames"]
    thing = scenes.Thing("yellow", "star", "up", "large")
    assert judge.score(clip, scenes.Scene("dark blue", (thing,)))["all"]
    other = scenes.Thing("yellow", "circle", "down", "large")
    assert not judge.score(clip, scenes.Scene("dark blue", (other,)))["all"]
    assert record["computed"] == {"cond": 50, "uncond": 50}
