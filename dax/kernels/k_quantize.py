"""Keys in 8 bits, as the attention wants them: from their projection to int8 in two passes.

A scale serves 128 tokens of a head and a norm all heads of a token: together more than a program can hold. So a first
pass reads a token's row for its norm alone, and writes what each pair of its channels is multiplied by, norm and
rotation in one; a second pass reads tiles of a head. Keys are shifted by their mean (token_stats.py): softmax does not
see it, and it carries most of their range. They go through the same transform as queries.
"""

import torch

from dax.kernels.hadamard import mixed, transformed
from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.q_quantize import SMALLEST, codes, larger, largest, pairs, rounded, words_of
from dax.kernels.qk_norm_rope import qk_norm_rope_reference, rotary_table, table_of
from dax.kernels.quantize import load_row, row_meta
from dax.kernels.rooms import addresses, fill
from dax.kernels.start import start

TILE = 128  # keys that share a scale, and what attention takes at a time
# warps of a program, and heads it takes at most, one after the other: what norms and turns their tokens stays near it
TURNING, FINISHED = (8, 4), (4, 2)


def k_quantize_reference(
    k: torch.Tensor,
    heads: int,
    mean: torch.Tensor,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm, rotate, shift, transform and quantize keys: one scale per tile of 128 tokens and head.

    k, heads, weight, cos, sin, eps   as in qk_norm_rope; a head has 32 channels or more
    mean     [B, H, D] fp32   what is taken off every key once it is normed and rotated
    returns  [B, H, T, 128, D] int8, [B, H, T] fp32, T = ceil(s / 128); the last tile repeats the last key
    Reads k twice and writes half of it: 5 B s C bytes in bf16; without norm and rotation once, 3. Bandwidth-bound.
    """
    x = shifted(k, heads, mean, weight, cos, sin, eps)
    step = (x.abs().amax((-1, -2)) / 127).clamp_min(SMALLEST)
    return codes(x / step[..., None, None]), step


def shifted(k, heads, mean, weight=None, cos=None, sin=None, eps=1e-6):
    """What the codes stand for: [B, H, T, 128, D] fp32."""
    x = transformed(qk_norm_rope_reference(k.float(), heads, weight, cos, sin, eps) - mean[:, None]).transpose(1, 2)
    x = torch.cat((x, x[:, :, -1:].expand(-1, -1, -x.shape[2] % TILE, -1)), dim=2)
    return x.unflatten(2, (-1, TILE))


def num_tiles(tokens: int) -> int:
    return -(-tokens // TILE)


@triton.jit(do_not_specialize=["S"])
def k_turns_kernel(
    K, Cos, Sin, Turns, S, stride_b, stride_s, eps,
    C: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """cos + sin and cos - sin of each token and pair of channels, over the token's RMS: see q_quantize_kernel."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, D)
    at = token * D + column
    cos, sin = (tl.load(Cos + at), tl.load(Sin + at)) if Cos is not None else (1.0, 0.0)
    turn = tl.where(column % 2 == 0, cos + sin, cos - sin)
    if NORM:
        chunks = load_row(K + batch * stride_b + token * stride_s, C, CHUNK)
        squares = chunks[0] * chunks[0]
        for j in tl.static_range(1, len(chunks)):
            squares += chunks[j] * chunks[j]
        turn *= tl.rsqrt(tl.sum(squares, 0) / C + eps)
    tl.store(Turns + (batch * S + token) * D + column, turn.to(tl.bfloat16))


@triton.jit(do_not_specialize=["S"])
def k_quantize_kernel(
    K, Turns, Weight, Mean, Codes, Heads, Steps, S, stride_b, stride_s,
    D: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """In pairs of columns, as q_quantize_kernel: the first level of the transform is in the rotation.

    A thread has four pairs of each quarter, told as all that may lie together, and so two tokens, which share what the
    columns have.
    """
    WIDTH: tl.constexpr = D // 8  # pairs of a quarter of a head
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.minimum(tile * TILE + tl.arange(0, TILE), S - 1).to(tl.int64)[:, None]  # beyond the end: the last again
    n = tl.arange(0, WIDTH)
    row = K + batch * stride_b + token * stride_s
    out = Codes.to(tl.pointer_type(tl.int16), bitcast=True)  # two codes at a time
    for j in range(HEADS):
        head = j * tl.num_programs(0) + tl.program_id(0)  # neighbours take heads that lie side by side
        index = batch * (tl.num_programs(0) * HEADS) + head
        u, v = (), ()
        for i in tl.static_range(4):
            at = i * WIDTH + n
            even, odd = pairs(row + head * D, at[None, :])
            if Weight is not None:
                even_weight, odd_weight = pairs(Weight + head * D, at)
                even, odd = even * even_weight[None, :], odd * odd_weight[None, :]
            even_mean, odd_mean = pairs(Mean + index * D, at)
            if Turns is not None:
                plus, minus = pairs(Turns + (batch * S + token) * D, at[None, :])
                u += (even * plus + (odd * minus - (even_mean + odd_mean)[None, :]),)
                v += (even * minus - (odd * plus + (even_mean - odd_mean)[None, :]),)
            else:
                even, odd = even - even_mean[None, :], odd - odd_mean[None, :]
                u, v = u + (even + odd,), v + (even - odd,)
        u, v = mixed(u[0], u[1], u[2], u[3], WIDTH, 1), mixed(v[0], v[1], v[2], v[3], WIDTH, 1)
        reach = larger(largest(u[0], u[1], u[2], u[3]), largest(v[0], v[1], v[2], v[3]))
        reach = tl.reduce(tl.reduce(reach, 1, larger), 0, larger)
        step = larger(reach / 127, 1e-20 + reach * 0.0)
        tl.store(Steps + index * tl.num_programs(1) + tile, step * 0.17677669529663687)  # 32^-0.5
        inverse = 1.0 / step
        begin = index * tl.num_programs(1) * TILE * (D // 2) if Heads is None else tl.load(Heads + index) * 8
        where = begin + (tile * TILE + tl.arange(0, TILE)[:, None]) * (D // 2) + tl.max_contiguous(n, 4)[None, :]
        for i in tl.static_range(4):
            low, high = rounded(u[i] * inverse), rounded(v[i] * inverse)
            tl.store(out + where + i * WIDTH, ((low & 0xFF) | (high << 8)).to(tl.int16))


def launch(
    k: torch.Tensor,
    heads: int,
    mean: torch.Tensor,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, C = k.shape
    quantized = torch.empty(B, heads, num_tiles(S), TILE, C // heads, device=k.device, dtype=torch.int8)
    return quantized, start_k_quantize(k, heads, mean, weight, cos, sin, eps, quantized)


def k_quantize_into(k, heads: int, mean, weight, cos, sin, eps: float, rooms: list) -> torch.Tensor:
    """k_quantize with its codes written to `rooms`, [B, h, T, 128, D] int8 each; returns the scales [B, H, T] fp32."""
    if k.is_cuda:
        return start_k_quantize(k, heads, mean, weight, cos, sin, eps, rooms[0], addresses(rooms, 1))
    quantized, steps = K_QUANTIZE(k, heads, mean, weight, cos, sin, eps)
    fill(rooms, quantized, 1)
    return steps


def start_k_quantize(k, heads, mean, weight, cos, sin, eps, out, places=None) -> torch.Tensor:
    B, S, C = k.shape
    D, T = C // heads, num_tiles(S)
    k, mean, cos, sin = words_of(k), words_of(mean.contiguous()), table_of(cos), table_of(sin)
    turns, norm = None, weight is not None
    steps = torch.empty(B, heads, T, device=k.device, dtype=torch.float32)
    with torch.cuda.device_of(k):
        if norm or cos is not None:
            turns = torch.empty(B, S, D, device=k.device, dtype=torch.bfloat16)
            start(
                k_turns_kernel, (S, B), k, cos, sin, turns, S, k.stride(0), k.stride(1), eps,
                D=D, NORM=norm, enable_fp_fusion=True, **row_meta(C),
            )  # fmt: skip
        warps, most = FINISHED if turns is None else TURNING
        group = min(heads & -heads, most)
        start(
            k_quantize_kernel, (heads // group, T, B), k, turns, words_of(weight) if norm else None, mean,
            out, places, steps, S, k.stride(0), k.stride(1),
            D=D, TILE=TILE, HEADS=group, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return steps


def k_case(B, s, H, D, *, fused=False, norm=True, rope=True, dtype=torch.bfloat16, scale=1.0, odd=0):
    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        k = (gaussian(B, s, (3 if fused else 1) * H * D + odd) * scale).to(dtype)[..., odd:]
        k = k.chunk(3, dim=-1)[1] if fused else k
        weight = (1 + 0.2 * gaussian(H * D)).to(dtype) if norm else None
        return k, H, scale * gaussian(B, H, D), weight, *(rotary_table(s, D, device) if rope else (None, None))

    return arguments


K_QUANTIZE = define(
    k_quantize_reference,
    launch,
    cases={
        "one token": k_case(1, 1, 3, 128),
        "63 of a fused projection": k_case(2, 63, 4, 64, fused=True),
        "130 of five heads without rotation": k_case(1, 130, 5, 64, rope=False, dtype=torch.float16),
        "rows that begin at odd columns": k_case(1, 65, 8, 128, odd=1),
        "zeros without norm": k_case(1, 130, 2, 64, norm=False, scale=0.0),
        "257, finished before": k_case(1, 257, 2, 128, norm=False, rope=False),
    },
    cost=lambda k, heads, mean, weight=None, *turn: Cost(
        20 * k.numel(), ((1 if weight is None else 2) * k.element_size() + 1) * k.numel(), "fp32"
    ),
    exact=shifted,
    decode=lambda outputs: outputs[0].float() * outputs[1][..., None, None],
)
