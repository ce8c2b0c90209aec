"""Queries in 8 bits, as the attention wants them: from their projection to int8 in one pass.

A query has a scale per token and head. Queries and keys (k_quantize.py) go through the same orthogonal transform of a
head's channels (hadamard.py).
"""

import torch

from dax.kernels.hadamard import mixed, transformed
from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.qk_norm_rope import qk_norm_rope_reference, rotary_table, table_of
from dax.kernels.rooms import addresses, fill
from dax.kernels.start import start

LOG2_E = 1.4426950408889634
SMALLEST = 1e-20  # of a scale, so that zeros have one
BLOCK, Q_WARPS = 1024, 1  # elements a program holds at a time; a single warp needs no barriers


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


def codes(x):
    return x.nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8).contiguous()


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(a, b, c, d):
    return larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))


@triton.jit
def rounded(x):
    """To the nearest integer, ties to even: adding 1.5 x 2^23 leaves it in the lowest byte."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def pairs(X, at):
    """Columns 2 at and 2 at + 1 from X on, both fp32, by one load. Of two in bf16 either half is that of an fp32."""
    if X.dtype.element_ty == tl.bfloat16:
        word = tl.load(X.to(tl.pointer_type(tl.int32), bitcast=True) + at)
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    elif X.dtype.element_ty == tl.float32:
        word = tl.load(X.to(tl.pointer_type(tl.int64), bitcast=True) + at)
        return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return tl.load(X + 2 * at).to(tl.float32), tl.load(X + 2 * at + 1).to(tl.float32)


@triton.jit(do_not_specialize=["S"])
def q_quantize_kernel(
    Q, Weight, Cos, Sin, Codes, Heads, Scales, S, stride_b, stride_s, eps, fold,
    C: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Everything in pairs of columns. The first level of the transform takes a pair to its sum and its difference, so
    it is in the rotation: (e, o) -> (e (c + s) + o (c - s), e (c - s) - o (c + s))."""
    HEADS: tl.constexpr = CHUNK // D
    WIDTH: tl.constexpr = D // 8  # pairs of a quarter of a head
    N: tl.constexpr = HEADS * WIDTH
    token = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), S - 1)[:, None]  # beyond the end: the last again
    batch = tl.program_id(1).to(tl.int64)
    row = Q + batch * stride_b + token.to(tl.int64) * stride_s
    n = tl.arange(0, N)
    pair = n // WIDTH * (D // 2) + n % WIDTH
    squares = tl.zeros((ROWS, N), tl.float32)
    if NORM:
        for j in tl.static_range(C // (2 * N)):
            even, odd = pairs(row, (j * N + n)[None, :])
            squares += even * even
            squares += odd * odd
    inverse = tl.rsqrt(tl.sum(squares, 1) / C + eps)[:, None] if NORM else 1.0
    plus, minus = (), ()
    for i in tl.static_range(4):
        angle = token * D + 2 * (pair % (D // 2) + i * WIDTH)[None, :]
        cos, sin = (tl.load(Cos + angle), tl.load(Sin + angle)) if ROPE else (1.0, 0.0)
        plus, minus = plus + (cos + sin,), minus + (cos - sin,)
    out = Codes.to(tl.pointer_type(tl.int16), bitcast=True)  # two codes at a time
    for j in range(C // CHUNK):  # not unrolled: five times the code took 2 s to compile
        u, v = (), ()
        for i in tl.static_range(4):
            at = j * (CHUNK // 2) + i * WIDTH + pair
            even, odd = pairs(row, at[None, :])
            if NORM:
                even_weight, odd_weight = pairs(Weight, at)
                even, odd = even * even_weight[None, :], odd * odd_weight[None, :]
            u += (even * plus[i] + odd * minus[i],)
            v += (even * minus[i] - odd * plus[i],)
        u, v = mixed(u[0], u[1], u[2], u[3], N, 1), mixed(v[0], v[1], v[2], v[3], N, 1)
        reach = larger(largest(u[0], u[1], u[2], u[3]), largest(v[0], v[1], v[2], v[3]))
        reach = tl.reduce(reach.reshape(ROWS, HEADS, WIDTH), 2, larger)
        step = larger(reach / 127, 1e-20 + reach * 0.0)
        head = batch * (C // D) + j * HEADS + tl.arange(0, HEADS)[None, :]
        tl.store(Scales + head * S + token, step * inverse * fold)
        begin = head * S * (D // 2) if Heads is None else tl.load(Heads + head) * 8
        where = (begin + token * (D // 2))[:, :, None] + tl.arange(0, WIDTH)[None, None, :]
        for i in tl.static_range(4):
            low = rounded(u[i].reshape(ROWS, HEADS, WIDTH) * (1.0 / step)[:, :, None])
            high = rounded(v[i].reshape(ROWS, HEADS, WIDTH) * (1.0 / step)[:, :, None])
            tl.store(out + where + i * WIDTH, ((low & 0xFF) | (high << 8)).to(tl.int16))


def chunk_of(C: int, D: int) -> int:
    """Columns taken at a time: as many whole heads as a power of two divides them into, at most 1024 columns."""
    heads = C // D
    return min(D * (heads & -heads), max(1024, D))


def words_of(x: torch.Tensor) -> torch.Tensor:
    """x itself if its columns lie side by side and every row begins where a pair of numbers may, else a copy."""
    aligned = x.data_ptr() % (2 * x.element_size()) == 0 and not any(stride % 2 for stride in x.stride()[:-1])
    whole = x.stride(-1) == 1 and aligned
    return x if whole else x.clone(memory_format=torch.contiguous_format)


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
    quantized = torch.empty(B, heads, S, C // heads, device=q.device, dtype=torch.int8)
    return quantized, start_q_quantize(q, heads, scale, weight, cos, sin, eps, quantized)


def q_quantize_into(q, heads: int, scale: float, weight, cos, sin, eps: float, rooms: list) -> torch.Tensor:
    """q_quantize with its codes written to `rooms`, [B, h, s, D] int8 each, some heads after the other.

    returns  the scales [B, H, s] fp32
    """
    if q.is_cuda:
        return start_q_quantize(q, heads, scale, weight, cos, sin, eps, rooms[0], addresses(rooms, 1))
    quantized, scales = Q_QUANTIZE(q, heads, scale, weight, cos, sin, eps)
    fill(rooms, quantized, 1)
    return scales


def start_q_quantize(q, heads, scale, weight, cos, sin, eps, out, places=None) -> torch.Tensor:
    B, S, C = q.shape
    D = C // heads
    q, cos, sin = words_of(q), table_of(cos), table_of(sin)
    weight = None if weight is None else words_of(weight)
    scales = torch.empty(B, heads, S, device=q.device, dtype=torch.float32)
    chunk = chunk_of(C, D)
    rows = max(1, BLOCK // chunk)
    with torch.cuda.device_of(q):
        start(
            q_quantize_kernel, (triton.cdiv(S, rows), B), q, weight, cos, sin, out, places, scales, S,
            q.stride(0), q.stride(1), eps, scale * LOG2_E * 32**-0.5,
            C=C, D=D, CHUNK=chunk, ROWS=rows, NORM=weight is not None, ROPE=cos is not None,
            num_warps=Q_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return scales


def q_case(B, s, H, D, *, fused=False, turn=True, dtype=torch.bfloat16, loud=1.0, odd=0):
    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        q = gaussian(B, s, (3 if fused else 1) * H * D + odd)
        q[..., 5] *= loud
        q = q.to(dtype)[..., odd:]
        q = q.chunk(3, dim=-1)[0] if fused else q
        weight = (1 + 0.2 * gaussian(H * D)).to(dtype) if turn else None
        return q, H, D**-0.5, weight, *(rotary_table(s, D, device) if turn else (None, None))

    return arguments


Q_QUANTIZE = define(
    q_quantize_reference,
    launch_q_quantize,
    cases={
        "one token": q_case(1, 1, 3, 128),
        "63 of a fused projection": q_case(2, 63, 4, 64, fused=True, loud=20.0),
        "257, finished before": q_case(1, 257, 2, 128, turn=False),
        "130 of five heads": q_case(1, 130, 5, 64, dtype=torch.float16),
        "rows that begin at odd columns": q_case(1, 65, 8, 128, odd=1),
        "40 in fp32, norm too": q_case(1, 40, 3, 64, dtype=torch.float32),
    },
    cost=lambda q, heads, scale, *turn: Cost(30 * q.numel(), (q.element_size() + 1) * q.numel(), "fp32"),
    exact=lambda q, heads, scale, *turn: (
        transformed(qk_norm_rope_reference(q.float(), heads, *turn)).transpose(1, 2) * (scale * LOG2_E)
    ),
    decode=lambda outputs: outputs[0].float() * outputs[1][..., None],
)
