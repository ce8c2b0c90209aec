"""TeaCache's and MagCache's decisions, beside the rules their authors run; masks and budgets that are refused."""

import numpy as np
import pytest
import torch

from dax.cache import magcache, teacache
from dax.cache.magcache import magcache_mask
from dax.cache.step_plan import Setting, flow_sigmas
from dax.cache.teacache import Polynomial, teacache_mask
from dax.errors import DaxError

MASKS = [  # published ratios give these for both branches; retention .2
    ("wan2.1-t2v-14b", 0.12, 2, "11111111110010010010010010010010010010010010101011"),
    ("wan2.1-t2v-14b", 0.12, 4, "11111111110000100001000010000100001000100100101011"),
    ("wan2.1-t2v-14b", 0.24, 6, "11111111110000001000000100000010000010000100100101"),
    ("wan2.1-t2v-1.3b", 0.12, 2, "11111111110010010010010010010010010010010010101011"),
    ("wan2.1-t2v-1.3b", 0.12, 4, "11111111110000100001000010000100001000100100101011"),
    ("wan2.1-t2v-1.3b", 0.24, 6, "11111111110000001000000100000010000010000100010101"),
    ("wan2.1-i2v-14b-480p", 0.12, 4, "1111111100001000010001000100100100101010"),
    ("wan2.1-i2v-14b-480p", 0.24, 6, "1111111100000010000010000100001000100101"),
    ("wan2.1-i2v-14b-720p", 0.12, 4, "1111111100001000010000100010001001010101"),
    ("wan2.1-i2v-14b-720p", 0.24, 6, "1111111100000010000001000001000010010010"),
]


@pytest.mark.parametrize(("model", "threshold", "cap", "mask"), MASKS)
def test_magcache_masks_are_the_published_ones(model, threshold, cap, mask):
    ratios = magcache.PUBLISHED[model]
    assert magcache_mask(ratios.cond, threshold, cap, 0.2) == mask
    assert magcache_mask(ratios.uncond, threshold, cap, 0.2) == mask


def test_magcache_ratios_at_other_steps_keep_the_length_of_the_whole_run():
    ratios = magcache.PUBLISHED["wan2.1-t2v-14b"]
    own = flow_sigmas(50, 5.0)
    assert ratios.at(flow_sigmas(50, 5.0), own) is ratios
    other = ratios.at(flow_sigmas(25, 5.0), own)
    assert len(other.cond) == 25 and other.cond[0] == 1.0
    last = int(np.searchsorted(-np.array(own), -flow_sigmas(25, 5.0)[-1]))
    assert np.prod(other.cond) == pytest.approx(np.prod(ratios.cond[: last + 1]), rel=0.02)


def official_teacache(embeddings, coefficients, threshold: float, ret_steps: bool) -> str:
    """The rule as the authors run it, forward by forward, branches told by parity; the mask of the even forwards."""
    steps = len(embeddings)
    ret, cutoff = (5 * 2, steps * 2) if ret_steps else (1 * 2, steps * 2 - 2)
    rescale, masks = np.poly1d(coefficients), {0: "", 1: ""}
    total, previous = {0: 0.0, 1: 0.0}, {0: None, 1: None}
    for count in range(2 * steps):
        branch, m = count % 2, embeddings[count // 2]
        compute = count < ret or count >= cutoff
        if compute:
            total[branch] = 0.0
        else:
            before = previous[branch]
            total[branch] += rescale(((m - before).abs().mean() / before.abs().mean()).cpu().item())
            compute = not total[branch] < threshold
            total[branch] = 0.0 if compute else total[branch]
        previous[branch] = m
        masks[branch] += "1" if compute else "0"
    assert masks[0] == masks[1]
    return masks[0]


@pytest.mark.parametrize("model", teacache.PUBLISHED)
@pytest.mark.parametrize("ret_steps", [True, False])
def test_teacache_decides_as_the_official_rule(model, ret_steps):
    """On embeddings that move as far as a polynomial was fitted for, where it is not negative."""
    polynomial = teacache.PUBLISHED[model][ret_steps]
    steps, generator = polynomial.setting.steps, torch.Generator().manual_seed(0)
    valid = [x for x in np.linspace(0.005, 0.3, 400) if np.poly1d(polynomial.coefficients)(x) > 1e-3]
    embeddings = [torch.randn(64, generator=generator)]
    for step in range(1, steps):
        far = valid[(37 * step) % min(len(valid), 60)]
        move = torch.randn(64, generator=generator)
        embeddings.append(embeddings[-1] + far * move / move.abs().mean() * embeddings[-1].abs().mean())
    moved = teacache.changes(torch.stack(embeddings))
    masks = set()
    for threshold in (0.05, 0.1, 0.2, 0.3):
        mask = teacache_mask(moved, polynomial, threshold, *teacache.RETAINED[ret_steps])
        assert mask == official_teacache(embeddings, polynomial.coefficients, threshold, ret_steps)
        masks.add(mask)
    assert any("0" in mask for mask in masks)


def test_teacache_on_the_time_embeddings_of_the_tiny_wan():
    import dax
    from dax.models.wan_steps import time_embeddings

    pipe = dax.load_tiny()
    pipe.scheduler.set_timesteps(50)
    steps = pipe.scheduler.timesteps
    for projected in (True, False):
        found = time_embeddings(pipe.transformer, steps, projected)
        temb, timestep_proj, _, _ = pipe.transformer.condition_embedder(steps, torch.zeros(50, 1, 192))
        assert torch.allclose(found, timestep_proj if projected else temb, atol=1e-5)
        moved = teacache.changes(found)
        line = Polynomial((4.0, 0.0), projected, Setting())
        mask = teacache_mask(moved, line, 0.1, 5, 0)
        assert mask == official_teacache(found, line.coefficients, 0.1, True) and 5 < mask.count("1") < 50


def test_time_embeddings_of_an_embedder_in_8_bits_are_near_its_own(random_pipe):
    from dax.models.wan_steps import time_embeddings
    from dax.quant import quantize_

    transformer, steps = random_pipe.transformer, torch.tensor([900.0, 500.0, 100.0])
    stock = time_embeddings(transformer, steps, projected=True)
    quantize_(transformer, {"condition_embedder": "int8"})
    assert (time_embeddings(transformer, steps, projected=True) - stock).norm() < 0.05 * stock.norm()


def test_a_negative_increment_counts_as_zero():
    sinking = Polynomial((-1.0, 0.0), True, Setting())
    assert teacache_mask([0.1] * 9, sinking, 0.5, 1, 0) == "1" + "0" * 9
    down_and_up = Polynomial((1.0, -0.2), True, Setting())  # the official sum would go below zero and stay there
    assert teacache_mask([0.0] * 5 + [0.5] * 4, down_and_up, 0.5, 1, 0) == "1000000101"


@pytest.mark.fault(7)
def test_row_7_fewer_steps_than_are_always_computed():
    with pytest.raises(DaxError, match="4 steps are fewer than the 5 that TeaCache always computes"):
        teacache_mask([0.1] * 3, Polynomial((1.0,), True, Setting()), 0.1, 5, 0)


@pytest.mark.parametrize(("cap", "retention", "threshold"), [(-1, 0.2, 0.1), (2, 1.5, 0.1), (2, 0.2, -0.1)])
def test_magcache_settings_out_of_range(cap, retention, threshold):
    with pytest.raises(DaxError, match="MagCache: retention"):
        magcache_mask([1.0] * 10, threshold, cap, retention)
