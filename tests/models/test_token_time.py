"""Wan2.2 TI2V-5B: a timestep for each token. The stock pipeline's clip, from text or from an image."""

import pytest
import torch

import dax
from dax.errors import DaxError
from dax.models import token_time, wan_block, wan_guard
from tests.conftest import build_random_pipe, build_ti2v_pipe
from tests.models.test_image_to_video import latents
from tests.quant.test_apply import relative

LAYERS = 2
SIZE = {"height": 160, "width": 96}  # 45 tokens, 15 of the first frame


@pytest.fixture(params=[False, True], ids=["from text", "from an image"])
def pipe(request):
    return build_ti2v_pipe(request.param)


def test_every_block_and_both_timesteps_matter():
    """Else nothing below could fail."""
    pipe = build_ti2v_pipe()
    stock, blocks = latents(pipe, **SIZE), pipe.transformer.blocks
    for i in range(LAYERS):
        pipe.transformer.blocks = torch.nn.ModuleList(b for j, b in enumerate(blocks) if j != i)
        assert relative(latents(pipe, **SIZE), stock) > 0.2
    pipe.transformer.blocks = blocks
    inner = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, timestep, **more: inner(
        *args, timestep=timestep[:, -1:].expand_as(timestep), **more
    )
    assert relative(latents(pipe, **SIZE), stock) > 0.01


@pytest.mark.parametrize(
    "size",
    [{}, {"guidance_scale": 1.0}, {"num_frames": 1}, {"height": 32, "width": 224, "num_frames": 5}],
    ids=["guided", "not guided", "one frame", "wide"],
)
def test_exact_is_the_stock_clip_and_undo_gives_the_model_back(pipe, size):
    size = SIZE | size
    stock = latents(pipe, **size)
    for keys in ({}, {"blocks": {"fused": False}}):
        with dax.optimize(pipe, "exact", **keys) as engine:
            assert relative(latents(pipe, **size), stock) < 1e-5
            assert engine.facts.family == "wan-ti2v" and engine.fallbacks == ()
    assert torch.equal(latents(pipe, **size), stock)
    assert "forward" not in vars(pipe.transformer.condition_embedder)


def test_8_bits_err_no_more_than_in_plain_text_to_video(pipe):
    errors = []
    for each, size in ((build_random_pipe(), {}), (pipe, SIZE)):
        stock = latents(each, **size)
        with dax.optimize(each, attention={"kernel": "sdpa"}, linear={"scheme": "int8"}):
            errors.append(relative(latents(each, **size), stock))
        assert torch.equal(latents(each, **size), stock)
    assert 1e-4 < errors[1] < 1.5 * errors[0], errors


def given(times):
    generator = torch.Generator().manual_seed(5)
    gaussian = lambda *shape: torch.randn(*shape, generator=generator)
    return gaussian(len(times), 48, 3, 6, 10), times, gaussian(len(times), 7, 32)


def times_of(*runs):
    """[1, 45] of (tokens, timestep)."""
    return torch.cat([torch.full((1, tokens), float(time)) for tokens, time in runs], 1)


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_several_videos_each_with_its_own_two(scheme):
    model = build_ti2v_pipe().transformer
    inputs = given(torch.cat([times_of((15, 0), (30, 700)), times_of((15, 30), (30, 200))]))
    with torch.no_grad():
        stock = model(*inputs, return_dict=False)[0]
        with dax.optimize(model, linear={"scheme": scheme}):
            assert relative(model(*inputs, return_dict=False)[0], stock) < (1e-5 if scheme == "none" else 0.1)


@pytest.mark.parametrize("runs", [[(15, 0), (15, 9), (15, 700)], [(15, 0), (15, 9), (15, 0)]], ids=["three", "back"])
def test_more_than_two_are_refused_or_left_to_the_vendors_blocks(runs):
    model, inputs = build_ti2v_pipe().transformer, given(times_of(*runs))
    with torch.no_grad():
        stock = model(*inputs, return_dict=False)[0]
        with dax.optimize(model), pytest.raises(DaxError, match="timestep: more than two values"):
            model(*inputs)
        with dax.optimize(model, blocks={"fused": False}):
            assert relative(model(*inputs, return_dict=False)[0], stock) < 1e-5


def test_only_distinct_timesteps_are_embedded_and_no_block_sees_every_tokens(monkeypatch):
    pipe, rows, shapes = build_ti2v_pipe(), [], []
    right = wan_block.modulation
    monkeypatch.setattr(wan_block, "modulation", lambda temb: shapes.append(right(temb).rows.shape) or right(temb))
    with dax.optimize(pipe):
        pipe.transformer.condition_embedder.time_proj.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape))
        latents(pipe, **SIZE)
    assert set(rows) == {(1, 2, 64)} and set(shapes) == {(1, 2, 6, 64)}


@pytest.mark.parametrize("fault", ["rows swapped", "split off by one", "gate of one row"])
def test_planted_faults_are_heard(monkeypatch, fault):
    pipe = build_ti2v_pipe()
    stock, right = latents(pipe, **SIZE), wan_block.modulation
    faults = {
        "rows swapped": lambda m: token_time.Modulation(m.rows.flip(1), m.split),
        "split off by one": lambda m: token_time.Modulation(m.rows, m.split + 1),
        "gate of one row": lambda m: token_time.Modulation(
            torch.cat([m.rows[:, :, :2], m.rows[:, -1:, 2:].expand_as(m.rows[:, :, 2:])], 2), m.split
        ),
    }
    with dax.optimize(pipe):
        monkeypatch.setattr(wan_block, "modulation", lambda temb: faults[fault](right(temb)))
        assert relative(latents(pipe, **SIZE), stock) > 1e-3


def test_the_guard_hears_rows_that_are_mixed_up(monkeypatch):
    right = wan_block.normed
    monkeypatch.setattr(wan_block, "normed", lambda *x: right(*x[:-1], 0) if len(x) == 6 else right(*x))
    assert "computes Wan's block otherwise" in wan_guard.block_difference.__wrapped__(False)


@pytest.mark.parametrize("reuse", ["velocity", "residual"])
def test_a_step_cache_serves_it(pipe, reuse):
    stock = latents(pipe, steps=4, **SIZE)
    with dax.optimize(pipe, cache={"policy": "mask", "mask": "1011", "reuse": reuse}) as engine:
        assert 1e-3 < relative(latents(pipe, steps=4, **SIZE), stock) < 1
        assert engine.gate.last.computed == {"cond": 3, "uncond": 3}


def test_nothing_is_published_for_it(pipe):
    with pytest.raises(DaxError, match="teacache: nothing is published or calibrated for wan-ti2v"):
        dax.optimize(pipe, cache={"policy": "teacache"})
