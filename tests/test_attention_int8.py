"""8-bit attention by its reference: as good as SageAttention2's arithmetic, safe on extremes, the same on any ranks."""

import pytest
import torch

import dax
from dax.attention import Turn, attend, backend_of
from dax.attention.int8 import LAYOUT, TILE, prepare, stats
from dax.bench.attention import distance, inputs, reference, sage_emulated
from dax.errors import DaxError
from dax.kernels.attention_int8 import probabilities
from dax.models import wan


def gaussian(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_a_tile_is_one_number_everywhere():
    """The planner shares tokens out by it without asking a kernel, and keys, values and means are kept by it."""
    from dax.kernels import k_quantize, token_stats, v_quantize
    from dax.parallel import cost

    tiles = {backend_of("int8").token_align, cost.TILE, k_quantize.TILE, token_stats.TILE, v_quantize.TILE}
    assert tiles == {TILE}


def errors(q, k, v) -> tuple[float, float]:
    """Of 8-bit attention, and of SageAttention2's scheme on the same tensors."""
    sampled = reference(q, k, v)
    return distance(attend(q, k, v, kernel="int8"), sampled), sage_emulated(q, k, v, sampled)


def test_error_on_gaussian_tensors():
    ours, sage = errors(*inputs(2048, 2, 128, "cpu"))
    print(f"Gaussian: {ours:.4f}, SageAttention2 {sage:.4f}")
    assert ours <= 0.0405 and ours <= 1.02 * sage


@pytest.mark.parametrize("loud", ["k", "q", "both", "both biased"])
def test_error_with_eight_loud_channels(loud):
    """Eight channels of 20 sigma, where one scale for all channels hurts most."""
    q, k, v = inputs(2048, 2, 128, "cpu")
    channels = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:8]
    if loud == "both biased":
        q[..., channels] += 20
        k[..., channels] += 20
    else:
        for x, name in ((q, "q"), (k, "k")):
            if loud in (name, "both"):
                x[..., channels] *= 20
        q = q / (4 if loud != "both" else 40)
    ours, sage = errors(q, k, v)
    print(f"loud {loud}: {ours:.4f}, SageAttention2 {sage:.4f}")
    assert ours <= sage


def test_error_on_the_tiny_wans_own_tensors(monkeypatch):
    seen = []

    def attend_heads(attn, q, k, v, rotary_emb, backend, right=wan.attend_heads):
        turn = wan.turn_of(attn, rotary_emb)
        split = [x.unflatten(2, (attn.heads, -1)) for x in (q, k, v)]
        for i, weight in enumerate((turn.q_weight, turn.k_weight)):
            split[i] = wan.turned((q, k)[i], attn.heads, weight, turn.cos, turn.sin, turn.eps)
        seen.append(split)
        return right(attn, q, k, v, rotary_emb, backend)

    monkeypatch.setattr("dax.models.wan.attend_heads", attend_heads)
    monkeypatch.setattr("dax.models.wan_block.attend_heads", attend_heads)
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 2, "output_type": "latent"}
    with dax.optimize(pipe):
        seen.clear()  # of what the guards ran
        pipe("a large yellow star moves up over a dark blue background", guidance_scale=1.0, **size)
    assert len(seen) == 2 * len(pipe.transformer.blocks)
    for i, (q, k, v) in enumerate(seen):
        ours, sage = errors(q, k, v)
        print(f"layer {i % 4}, step {i // 4}: {ours:.4f}, SageAttention2 {sage:.4f}")
        assert ours <= sage


def test_powers_of_two_by_integers():
    """A straight line within each octave: off by 6 % at most, on average by what the largest is off, and never up."""
    s, scale = -torch.arange(2000.0), torch.tensor([0.005])
    p = probabilities(s.clone(), scale)
    off = p / (224 * torch.exp2(s * scale))
    assert p[0] == 224 and (p.diff() <= 0).all()
    assert 1 / 1.041 < off.min() and off.max() < 1.062 / 1.04 and abs(off.mean() - 1) < 2e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 0.05, 1.0, 1e6])
def test_far_below_the_largest_is_nothing(scale):
    """No product wraps around: scores lie up to 2^22 apart, and what is 100 octaves below counts nothing in fp8."""
    s = torch.tensor([0.0, -1.0, -100.0, -2000.0, -(2.0**17), -(2.0**22)])
    p = probabilities(s.clone(), torch.tensor([scale])).to(torch.float8_e4m3fn).float()
    assert p[0] == 224 and (p.diff() <= 0).all() and (p >= 0).all()
    assert (p[s * min(scale, 1 / 16) < -20] == 0).all()


def test_values_of_one_give_one():
    q, k, _ = inputs(300, 2, 64, "cpu")
    assert (attend(q, k, torch.ones_like(k), kernel="int8") - 1).abs().max() <= 0.005


@pytest.mark.parametrize("fill", [0.0, 1.0, -1e4, 1e4])
@pytest.mark.parametrize("noise", [0.0, 1e4])
def test_extremes_stay_finite(fill, noise):
    q, k, v = (fill + noise * x for x in gaussian(*3 * [(1, 130, 1, 64)]))
    o = attend(q, k, v, kernel="int8")
    assert o.isfinite().all() and o.abs().max() <= 1.01 * v.abs().max() + 1e-6


def test_a_nan_is_not_hidden():
    for i in range(3):
        tensors = gaussian(*3 * [(1, 130, 2, 64)])
        tensors[i][0, 7, 1, 3] = float("nan")
        assert attend(*tensors, kernel="int8").isnan().any()


@pytest.mark.parametrize("kernel_shape", [(1, 63, 5, 2, 64), (2, 257, 300, 3, 128)])
def test_close_to_exact_attention_of_any_length(kernel_shape):
    B, S, T, H, D = kernel_shape
    q, k, v = gaussian((B, S, H, D), (B, T, H, D), (B, T, H, D))
    for scale in (None, 0.05):
        wanted = attend(q, k, v, kernel="sdpa", scale=scale)
        assert ((attend(q, k, v, kernel="int8", scale=scale) - wanted).norm() / wanted.norm()).item() < 0.05


def test_tokens_shared_over_ranks_give_the_same_bits():
    """Stats gathered as the record says, operands concatenated as the layout says: what one process has."""
    B, S, H, D = 2, 5 * TILE + 17, 3, 64
    q, k, v = (x.flatten(2) for x in gaussian(*3 * [(B, S, H, D)]))
    angles = gaussian((S, D))[0]
    turn = Turn(*(1 + x / 5 for x in gaussian((H * D,), (H * D,))), angles.cos(), angles.sin())
    whole = prepare(q, k, v, H, turn, stats(k, v, H, turn))
    shares = [slice(0, 2 * TILE), slice(2 * TILE, 3 * TILE), slice(3 * TILE, S)]
    turns = [turn._replace(cos=turn.cos[share], sin=turn.sin[share]) for share in shares]
    found = [stats(k[:, share], v[:, share], H, mine) for share, mine in zip(shares, turns)]
    together = torch.cat([means for means, _ in found], 1), torch.stack([amax for _, amax in found]).amax(0)
    parts = []
    for share, mine in zip(shares, turns):
        parts.append(prepare(q[:, share], k[:, share], v[:, share], H, mine, together))
    for i, (heads, tokens, _) in enumerate(LAYOUT):
        pieces = [part[i] for part in parts]
        joined = pieces[0] if tokens is None else torch.cat([p.view(torch.uint8) for p in pieces], tokens)
        assert torch.equal(joined.view(torch.uint8), whole[i].view(torch.uint8)) and whole[i].shape[heads] == H


def test_named_only_by_request(random_pipe):
    assert backend_of("int8").name == "int8 (reference)" and dax.attention.choose(dax.hardware.machine("cpu")) != "int8"
    with dax.optimize(random_pipe, attention={"kernel": "int8"}) as engine:  # heads of 32
        assert engine.fallbacks == ("attention.kernel = int8: does not take heads of 32; sdpa instead",)
    with pytest.raises(DaxError, match="heads of 32") as caught:
        dax.optimize(random_pipe, strict=True, attention={"kernel": "int8"})
    assert caught.value.exit_code == 4


def test_the_tiny_wan_runs_with_it():
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)

    latents, text = gaussian((1, 16, 3, 16, 16), (1, 512, pipe.transformer.config.text_dim))

    def run():
        with torch.no_grad():
            return pipe.transformer(latents, torch.tensor([500.0]), text).sample

    exact = run()
    with dax.optimize(pipe, attention={"kernel": "int8"}) as engine:
        assert "attention.kernel = int8 (reference): 4 of 4 self-attention layers" in engine.summary()
        assert "attention.kernel = sdpa: 4 of 4 cross-attention layers" in engine.summary()
        ours = run()
    error = ((ours - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.05


def test_traced_as_one_graph():
    """A compiled block with it stays one graph."""
    kernel = backend_of("int8")

    def attention(q, k, v):
        operands = kernel.prepare(q, k, v, 2, Turn(), kernel.stats(k, v, 2, Turn()))
        return 2 * kernel.attend(operands, k.shape[1])

    q, k, v = (x.flatten(2) for x in gaussian(*3 * [(1, 65, 2, 64)]))
    assert torch.equal(torch.compile(attention, backend="eager", fullgraph=True)(q, k, v), attention(q, k, v))
