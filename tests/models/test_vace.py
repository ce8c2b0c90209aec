"""Wan2.1 VACE: the stock pipeline's clip under control of a video, a mask and a reference image."""

import pytest
import torch
from PIL import Image

import dax
from dax.errors import DaxError
from dax.models import wan_block, wan_guard
from tests.conftest import build_random_pipe, build_vace_pipe
from tests.models import test_image_to_video
from tests.models.test_image_to_video import picture
from tests.quant.test_apply import relative

BLOCKS = 5  # three and two of control


def latents(pipe, num_frames=9, height=80, width=48, reference=True, **options):
    """45 tokens of the video, 15 more of the reference image; the right half of each frame is to be made."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return test_image_to_video.latents(
        pipe,
        num_frames=num_frames,
        height=height,
        width=width,
        video=[picture(i).resize((width, height)) for i in range(num_frames)],
        mask=[mask] * num_frames,
        reference_images=[picture(100)] if reference else None,
        **options,
    )


@pytest.fixture
def pipe():
    return build_vace_pipe()


def test_every_block_every_hint_and_the_control_matter(pipe):
    """Else nothing below could fail."""
    model, stock = pipe.transformer, latents(pipe)
    for block in model.blocks:
        block.forward = lambda x, *rest: x
        assert relative(latents(pipe), stock) > 0.2
        del block.forward
    for block in model.vace_blocks:
        block.forward = lambda x, text, control, *rest, block=block: (block.proj_out(control), control)
        assert relative(latents(pipe), stock) > 0.2
        block.forward = lambda x, text, control, *rest: (torch.zeros_like(x), control)
        assert relative(latents(pipe), stock) > 0.2
        del block.forward
    assert relative(latents(pipe, conditioning_scale=0.0), stock) > 0.2
    assert torch.equal(latents(pipe), stock)


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"guidance_scale": 1.0},
        {"num_frames": 1},
        {"height": 16, "width": 112, "num_frames": 5, "reference": False},
        {"conditioning_scale": [0.3, 2.0]},
    ],
    ids=["guided", "not guided", "one frame", "wide, no reference", "scaled"],
)
def test_exact_is_the_stock_clip_and_undo_gives_the_model_back(pipe, size):
    stock = latents(pipe, **size)
    for keys in ({}, {"blocks": {"fused": False}}):
        with dax.optimize(pipe, "exact", **keys) as engine:
            assert relative(latents(pipe, **size), stock) < 1e-5
            for kind in ("self", "cross"):
                assert f"{BLOCKS} of {BLOCKS} {kind}-attention layers" in engine.summary()
            assert engine.facts.family == "wan-vace" and engine.fallbacks == ()
        if not keys:
            assert f"{BLOCKS} of {BLOCKS} transformer blocks" in engine.summary()
    assert torch.equal(latents(pipe, **size), stock)


def test_8_bits_err_no_more_than_in_plain_text_to_video(pipe):
    errors = []
    for each, run in ((build_random_pipe(), test_image_to_video.latents), (pipe, latents)):
        stock = run(each)
        with dax.optimize(each, attention={"kernel": "sdpa"}, linear={"scheme": "int8"}) as engine:
            errors.append(relative(run(each), stock))
            if each is pipe:
                names = ("vace_blocks.0.proj_in", "vace_blocks.1.proj_out", "vace_blocks.1.attn1.to_q")
                assert {type(pipe.transformer.get_submodule(name)).__name__ for name in names} == {"QuantLinear"}
                assert type(pipe.transformer.proj_out) is torch.nn.Linear
                assert f"self-attention in {BLOCKS} of {BLOCKS} blocks" in engine.summary()
        assert torch.equal(run(each), stock)
    assert 1e-4 < errors[1] < 2 * errors[0], errors


@pytest.mark.parametrize("fault", ["control without the video", "hint of the input", "control block not run"])
def test_planted_faults_are_heard_by_the_guard_and_in_the_clip(pipe, monkeypatch, fault):
    stock, right = latents(pipe), wan_block.control_forward

    def faulty(block, x, text, control, *rest):
        if fault == "control without the video":
            return right(block, torch.zeros_like(x), text, control, *rest)
        hint, after = right(block, x, text, control, *rest)
        return (block.proj_out(control), after) if fault == "hint of the input" else (hint, control)

    monkeypatch.setattr(wan_block, "control_forward", faulty)
    assert "computes Wan's block otherwise" in wan_guard.block_difference.__wrapped__(True)
    assert wan_guard.block_difference.__wrapped__(False) is None, "other models are not concerned"
    monkeypatch.setattr(wan_guard, "block_difference", lambda control: None)
    with dax.optimize(pipe):
        assert relative(latents(pipe), stock) > 1e-3


def test_a_step_cache_reuses_whole_velocities_hints_included(pipe):
    """With a mask that computes every other step: what the pipeline is given at a skipped one is what it had before."""
    given, forward = [], pipe.transformer.forward
    with dax.optimize(pipe, cache={"policy": "mask", "mask": "1011"}) as engine:
        outer = pipe.transformer.forward
        pipe.transformer.forward = lambda *args, **more: given.append(outer(*args, **more)[0].clone()) or (given[-1],)
        cached = latents(pipe, steps=4)
        assert engine.gate.last.computed == {"cond": 3, "uncond": 3}
        pipe.transformer.forward = outer
    assert torch.equal(given[0], given[2]) and torch.equal(given[1], given[3]) and not torch.equal(given[0], given[4])
    calls = []

    def by_hand(*args, **more):
        calls.append(None)
        held = len(calls) in (3, 4)  # both branches of the second step
        return (
            (velocities[len(calls) - 3],) if held else (velocities.append(forward(*args, **more)[0]) or velocities[-1],)
        )

    velocities = []
    pipe.transformer.forward = by_hand
    assert relative(cached, latents(pipe, steps=4)) < 1e-5
    del pipe.transformer.forward
    assert relative(cached, latents(pipe, steps=4)) > 1e-3


def test_residual_reuse_is_refused_by_name(pipe):
    with pytest.raises(DaxError, match="cache.reuse = residual: wan-vace-3x64 adds hints between its blocks"):
        dax.optimize(pipe, cache={"policy": "mask", "mask": "1011", "reuse": "residual"})


def test_a_bare_transformer_of_several_videos():
    model, generator = build_vace_pipe().transformer, torch.Generator().manual_seed(5)
    gaussian = lambda *shape: torch.randn(*shape, generator=generator)
    given = gaussian(2, 16, 3, 6, 10), torch.tensor([500.0, 20.0]), gaussian(2, 7, 32)
    for frames in (3, 2):  # the vendor fills up with zeros
        control = {"control_hidden_states": gaussian(2, 96, frames, 6, 10), "return_dict": False}
        with torch.no_grad():
            stock = model(*given, **control)[0]
            for scheme, off in (("none", 1e-5), ("int8", 0.1)):
                with dax.optimize(model, linear={"scheme": scheme}):
                    assert relative(model(*given, **control)[0], stock) < off


def test_a_control_block_compiles_as_one_graph(pipe):
    """Traced, not compiled: no compiler is asked."""
    block, generator = pipe.transformer.vace_blocks[0], torch.Generator().manual_seed(5)
    gaussian = lambda *shape: torch.randn(*shape, generator=generator)
    given = gaussian(1, 15, 64), gaussian(1, 7, 64), gaussian(1, 15, 64), gaussian(1, 6, 64)
    rotary = (torch.ones(1, 15, 1, 32), torch.zeros(1, 15, 1, 32))
    with torch.no_grad(), dax.optimize(pipe, blocks={"fused": False}):
        eager = torch.stack(block(*given, rotary))
        traced = torch.stack(torch.compile(block, backend="eager", fullgraph=True)(*given, rotary))
    assert relative(traced, eager) < 1e-5
