"""Queries and keys in 8 bits, as the attention wants them.

A query has a scale per token and head, and goes from its projection to int8 in one pass. Keys have one per 128 tokens
and head, and are first shifted by their mean over all tokens: softmax does not see it, and it carries most of their
range. Both sides go through the same orthogonal transform of a head's channels, which leaves q k^T as it is and spreads
a loud channel over 32 (Hadamard, as in QuaRot, arXiv:2404.00456).
"""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.qk_norm_rope import (
    angles,
    chunk_of,
    inverse_rms,
    normed_turned,
    qk_norm_rope_reference,
    rotary_table,
    rows_of,
    table_of,
)
from dax.kernels.start import start

TILE = 128  # keys that share a scale, and what attention takes at a time
LOG2_E = 1.4426950408889634
SMALLEST = 1e-20  # of a scale, so that zeros have one
BLOCK, Q_WARPS = 1024, 1  # elements a program holds at a time; a single warp needs no barriers
K_WARPS = 4


def q_quantize_reference(
    q: torch.Tensor,
    heads: int,
    scale: float,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm, rotate, transform and quantize queries: one scale per token and head.

    q, heads, weight, cos, sin, eps   as in qk_norm_rope; a head has 32 channels or more
    scale    of the softmax; it and log2 e are folded into the returned scales
    returns  [B, H, s, D] int8, [B, H, s] fp32; a NaN or an infinity makes its token's scale one
    Reads q once and writes half of it: 3 B s C bytes in bf16. Bandwidth-bound.
    """
    x = transformed(qk_norm_rope_reference(q.float(), heads, weight, cos, sin, eps)).transpose(1, 2)
    step = (x.abs().amax(-1) / 127).clamp_min(SMALLEST)
    return codes(x / step[..., None]), step * (scale * LOG2_E)


def k_quantize_reference(k: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift, transform and quantize finished keys: one scale per tile of 128 tokens and head.

    k        [B, s, H, D]   normed and rotated; tokens may be strided
    mean     [B, H, D] fp32 over all tokens, of all ranks
    returns  [B, H, T, 128, D] int8, [B, H, T] fp32, T = ceil(s / 128); the last tile repeats the last key
    Reads k once and writes half of it: 3 B s C bytes in bf16. Bandwidth-bound.
    """
    B, S, H, D = k.shape
    T = num_tiles(S)
    x = repeated(transformed(k.float() - mean[:, None]).transpose(1, 2)).view(B, H, T, TILE, D)
    step = (x.abs().amax((-1, -2)) / 127).clamp_min(SMALLEST)
    return codes(x / step[..., None, None]), step


def repeated(x):
    """x [B, H, s, D] with its last token repeated until the last tile is full."""
    return torch.cat((x, x[:, :, -1:].expand(-1, -1, -x.shape[2] % TILE, -1)), dim=2)


def codes(x):
    return x.nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8).contiguous()


def transformed(x: torch.Tensor) -> torch.Tensor:
    """Hadamard over 8 neighbouring channels and over the four quarters of a head: x [..., D] fp32, orthogonal."""
    parts = x.unflatten(-1, (4, -1, 8))
    return torch.einsum("...qgn,qp,nm->...pgm", parts, hadamard(4, x.device), hadamard(8, x.device)).flatten(-3)


def hadamard(size: int, device) -> torch.Tensor:
    """[size, size] fp32, symmetric and its own inverse."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def num_tiles(tokens: int) -> int:
    return -(-tokens // TILE)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def butterflies(x, COLUMNS: tl.constexpr):
    """Over each 8 neighbouring columns of x [R, COLUMNS], without the factor 8^-0.5: all within a thread."""
    for level in tl.static_range(3):
        a, b = tl.split(x.reshape(x.shape[0], COLUMNS // (2 << level), 2, 1 << level).permute(0, 1, 3, 2))
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(x.shape[0], COLUMNS)
    return x


@triton.jit
def mixed(a, b, c, d, COLUMNS: tl.constexpr):
    """The transform of four quarters, each [R, COLUMNS], without its factor 32^-0.5."""
    a, b, c, d = a + b, a - b, c + d, c - d
    a, b, c, d = a + c, b + d, a - c, b - d
    return butterflies(a, COLUMNS), butterflies(b, COLUMNS), butterflies(c, COLUMNS), butterflies(d, COLUMNS)


@triton.jit
def largest(a, b, c, d):
    return larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))


@triton.jit
def rounded(x):
    """To the nearest integer, ties to even, as int8: adding 1.5 x 2^23 leaves it in the lowest byte."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["S"])
def q_quantize_kernel(
    Q, Weight, Cos, Sin, Codes, Scales, S, stride_b, stride_s, eps, fold,
    C: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = CHUNK // D
    WIDTH: tl.constexpr = D // 4  # of a quarter of a head
    COLUMNS: tl.constexpr = HEADS * WIDTH
    token = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), S - 1)  # beyond the end: the last once more
    batch = tl.program_id(1).to(tl.int64)
    row = Q + batch * stride_b + token.to(tl.int64)[:, None] * stride_s
    inverse = inverse_rms(row, eps, C, CHUNK, NORM)
    n = tl.arange(0, COLUMNS)
    column = n // WIDTH * D + n % WIDTH
    turns = ()
    for i in tl.static_range(4):
        angle = (token * D)[:, None] + (column % D + i * WIDTH)[None, :]
        turns = turns + (angles(Cos, angle, ROPE), angles(Sin, angle, ROPE))
    for j in tl.static_range(C // CHUNK):
        y = ()
        for i in tl.static_range(4):
            at = column + j * CHUNK + i * WIDTH
            y = y + (normed_turned(row, at, Weight, turns[2 * i], turns[2 * i + 1], NORM, ROPE),)
        y = mixed(y[0], y[1], y[2], y[3], COLUMNS)
        reach = tl.reduce(largest(y[0], y[1], y[2], y[3]).reshape(ROWS, HEADS, WIDTH), 2, larger)
        step = larger(reach / 127, 1e-20 + reach * 0.0)
        head = batch * (C // D) + j * HEADS + tl.arange(0, HEADS)[None, :]
        tl.store(Scales + head * S + token[:, None], step * inverse * fold)
        out = Codes + (head * S + token[:, None])[:, :, None] * D + tl.arange(0, WIDTH)[None, None, :]
        for i in tl.static_range(4):
            value = y[i].reshape(ROWS, HEADS, WIDTH) * (1.0 / step)[:, :, None]
            tl.store(out + i * WIDTH, rounded(value))


@triton.jit(do_not_specialize=["S"])
def k_quantize_kernel(
    K, Mean, Codes, Steps, S, stride_b, stride_s, stride_h,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = D // 4
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.minimum(tile * TILE + tl.arange(0, TILE), S - 1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    at = K + batch * stride_b + head * stride_h + token[:, None] * stride_s + columns[None, :]
    mean = Mean + (batch * tl.num_programs(0) + head) * D + columns
    y = ()
    for i in tl.static_range(4):
        y = y + (tl.load(at + i * WIDTH).to(tl.float32) - tl.load(mean + i * WIDTH)[None, :],)
    y = mixed(y[0], y[1], y[2], y[3], WIDTH)
    reach = tl.reduce(tl.reduce(largest(y[0], y[1], y[2], y[3]), 1, larger), 0, larger)
    step = larger(reach / 127, 1e-20 + reach * 0.0)
    where = (batch * tl.num_programs(0) + head) * tl.num_programs(1) + tile
    tl.store(Steps + where, step * 0.17677669529663687)  # 32^-0.5
    inverse = 1.0 / step
    out = Codes + where * TILE * D + tl.arange(0, TILE)[:, None] * D + columns[None, :]
    for i in tl.static_range(4):
        tl.store(out + i * WIDTH, rounded(y[i] * inverse))


def launch_q_quantize(
    q: torch.Tensor,
    heads: int,
    scale: float,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, C = q.shape
    D = C // heads
    q, cos, sin = rows_of(q), table_of(cos), table_of(sin)
    quantized = torch.empty(B, heads, S, D, device=q.device, dtype=torch.int8)
    scales = torch.empty(B, heads, S, device=q.device, dtype=torch.float32)
    chunk = chunk_of(C, D)
    rows = max(1, BLOCK // chunk)
    with torch.cuda.device_of(q):
        start(
            q_quantize_kernel, (triton.cdiv(S, rows), B), q, weight, cos, sin, quantized, scales, S,
            q.stride(0), q.stride(1), eps, scale * LOG2_E * 32**-0.5,
            C=C, D=D, CHUNK=chunk, ROWS=rows, NORM=weight is not None, ROPE=cos is not None,
            num_warps=Q_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return quantized, scales


def launch_k_quantize(k: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, D = k.shape
    T = num_tiles(S)
    k, mean = rows_of(k), mean.contiguous()
    quantized = torch.empty(B, H, T, TILE, D, device=k.device, dtype=torch.int8)
    steps = torch.empty(B, H, T, device=k.device, dtype=torch.float32)
    with torch.cuda.device_of(k):
        start(
            k_quantize_kernel, (H, T, B), k, mean, quantized, steps, S, k.stride(0), k.stride(1), k.stride(2),
            D=D, TILE=TILE, num_warps=K_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return quantized, steps


def q_case(B, s, H, D, *, fused=False, turn=True, dtype=torch.bfloat16, loud=1.0):
    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        q = gaussian(B, s, (3 if fused else 1) * H * D)
        q[..., 5] *= loud
        q = q.to(dtype)
        q = q.chunk(3, dim=-1)[0] if fused else q
        weight = 1 + 0.2 * gaussian(H * D) if turn else None
        return q, H, D**-0.5, weight, *(rotary_table(s, D, device) if turn else (None, None))

    return arguments


def k_case(B, s, H, D, *, dtype=torch.bfloat16, scale=1.0):
    def arguments(generator, device):
        k = torch.randn(B, s, H, D, generator=generator, device=device) + torch.randn(
            H, D, generator=generator, device=device
        )
        k = (k * scale).to(dtype)
        return k, k.float().mean(1)

    return arguments


Q_QUANTIZE = define(
    q_quantize_reference,
    launch_q_quantize,
    cases={
        "one token": q_case(1, 1, 3, 128),
        "63 of a fused projection": q_case(2, 63, 4, 64, fused=True, loud=20.0),
        "257, finished before": q_case(1, 257, 2, 128, turn=False),
        "130 of five heads": q_case(1, 130, 5, 64, dtype=torch.float16),
    },
    cost=lambda q, heads, scale, *turn: Cost(30 * q.numel(), (q.element_size() + 1) * q.numel(), "fp32"),
    exact=lambda q, heads, scale, *turn: (
        transformed(qk_norm_rope_reference(q.float(), heads, *turn)).transpose(1, 2) * (scale * LOG2_E)
    ),
    decode=lambda outputs: outputs[0].float() * outputs[1][..., None],
)

K_QUANTIZE = define(
    k_quantize_reference,
    launch_k_quantize,
    cases={
        "one token": k_case(1, 1, 3, 128),
        "63 in two batches": k_case(2, 63, 4, 64),
        "257": k_case(1, 257, 2, 128, dtype=torch.float16),
        "zeros": k_case(1, 130, 2, 64, scale=0.0),
    },
    cost=lambda k, mean: Cost(20 * k.numel(), (k.element_size() + 1) * k.numel(), "fp32"),
    exact=lambda k, mean: repeated(transformed(k.float() - mean[:, None]).transpose(1, 2)),
    decode=lambda outputs: (outputs[0].float() * outputs[1][..., None, None]).flatten(2, 3),
)
