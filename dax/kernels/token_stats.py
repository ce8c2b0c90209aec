"""What 8-bit attention must know of all tokens: a mean of the keys and the range of the values, channel by channel.

The keys are shifted by their mean, and any shift gives the same attention, so a sample of them serves. Means are kept
per 128 tokens, always the same 128, so that any split of the tokens over ranks comes to the same bits.
"""

import torch
import torch.nn.functional as F

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.q_quantize import chunk_of, larger, pairs, words_of
from dax.kernels.qk_norm_rope import case as turned_case
from dax.kernels.qk_norm_rope import qk_norm_rope_reference, rows_of, table_of
from dax.kernels.start import start

TILE = 128
EVERY = 8  # of the keys, the first of so many is in the sample
MEANS_WARPS, AMAX_WARPS = 8, 2


def key_means_reference(
    k: torch.Tensor,
    heads: int,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Means of every 8th key, normed and rotated, over each 128 tokens, the last over what is left; in fp32.

    k, heads, weight, cos, sin, eps   as in qk_norm_rope
    returns  [B, T, H, D] fp32   T = ceil(s / 128)
    Reads an eighth of k: s C / 4 bytes in bf16.
    """
    cos, sin = (None if table is None else table[::EVERY] for table in (cos, sin))
    x, most = qk_norm_rope_reference(k[:, ::EVERY].float(), heads, weight, cos, sin, eps), TILE // EVERY
    sums = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % most)).unflatten(1, (-1, most)).sum(2)
    counts = (x.shape[1] - most * torch.arange(sums.shape[1], device=k.device)).clamp_max(most)
    return sums / counts[:, None, None]


def token_amax_reference(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude over all tokens, in fp32; NaN where there is one.

    x        [B, s, H, D]    tokens may be strided
    returns  [B, H, D] fp32
    Reads x once: 2 B s H D bytes in bf16.
    """
    return x.float().abs().amax(1)


@triton.jit(do_not_specialize=["S"])
def key_means_kernel(
    K, Weight, Cos, Sin, Out, S, stride_b, stride_s, eps,
    C: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """The sample of a tile at a time, in pairs of columns; rows are read twice, the second time out of a cache."""
    ROWS: tl.constexpr = TILE // EVERY
    N: tl.constexpr = CHUNK // 2
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tile * TILE + EVERY * tl.arange(0, ROWS)
    share = tl.where(token < S, 1.0, 0.0)
    share /= tl.sum(share, 0)
    token = tl.where(token < S, token, tile * TILE)[:, None]  # beyond the end: the first again, for nothing
    row = K + batch * stride_b + token.to(tl.int64) * stride_s
    n = tl.arange(0, N)
    if Weight is not None:
        squares = tl.zeros((ROWS, N), tl.float32)
        for j in tl.static_range(C // CHUNK):
            even, odd = pairs(row, (j * N + n)[None, :])
            squares += even * even
            squares += odd * odd
        share *= tl.rsqrt(tl.sum(squares, 1) / C + eps)
    cos, sin = share[:, None], 0.0
    if Cos is not None:
        angle = token * D + 2 * (n % (D // 2))[None, :]
        cos, sin = tl.load(Cos + angle) * share[:, None], tl.load(Sin + angle) * share[:, None]
    out = Out + (batch * tl.num_programs(0) + tile) * C
    for j in range(C // CHUNK):
        at = j * N + n
        even, odd = pairs(row, at[None, :])
        if Weight is not None:
            even_weight, odd_weight = pairs(Weight, at)
            even, odd = even * even_weight[None, :], odd * odd_weight[None, :]
        mean = tl.join(tl.sum(even * cos - odd * sin, 0), tl.sum(even * sin + odd * cos, 0))
        tl.store(out + 2 * at[:, None] + tl.arange(0, 2)[None, :], mean)


@triton.jit(do_not_specialize=["S"])
def token_amax_kernel(X, Out, S, stride_b, stride_s, stride_h, D: tl.constexpr, TILE: tl.constexpr):
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = (tile * TILE + tl.arange(0, TILE))[:, None]
    column = tl.arange(0, D)
    at = X + batch * stride_b + token.to(tl.int64) * stride_s + head * stride_h + column[None, :]
    x = tl.load(at, token < S, 0.0).to(tl.float32)
    out = Out + ((batch * tl.num_programs(1) + tile) * tl.num_programs(0) + head) * D + column
    tl.store(out, tl.reduce(tl.abs(x), 0, larger))


def launch_means(
    k: torch.Tensor,
    heads: int,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    B, S, C = k.shape
    D, T = C // heads, -(-S // TILE)
    k, cos, sin = words_of(k), table_of(cos), table_of(sin)
    out = torch.empty(B, T, heads, D, device=k.device, dtype=torch.float32)
    with torch.cuda.device_of(k):
        start(
            key_means_kernel, (T, B), k, None if weight is None else words_of(weight), cos, sin, out, S,
            k.stride(0), k.stride(1), eps,
            C=C, D=D, CHUNK=chunk_of(C, D), TILE=TILE, EVERY=EVERY, num_warps=MEANS_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def launch_amax(x: torch.Tensor) -> torch.Tensor:
    B, S, H, D = x.shape
    x, T = rows_of(x), -(-S // TILE)
    out = torch.empty(B, T, H, D, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        start(
            token_amax_kernel, (H, T, B), x, out, S, x.stride(0), x.stride(1), x.stride(2),
            D=D, TILE=TILE, num_warps=AMAX_WARPS,
        )  # fmt: skip
    return out.amax(1)


def case(B, s, H, D, dtype=torch.bfloat16, fused=False):
    def arguments(generator, device):
        x = torch.randn(B, s, (3 if fused else 1) * H * D, generator=generator, device=device).to(dtype)
        return ((x.chunk(3, dim=-1)[2] if fused else x).unflatten(2, (H, D)),)

    return arguments


KEY_MEANS = define(
    key_means_reference,
    launch_means,
    cases={
        "one token": turned_case(1, 1, 3, 128),
        "63 of a fused projection": turned_case(2, 63, 4, 64, fused=True),
        "1200 of five heads": turned_case(1, 1200, 5, 64, dtype=torch.float16),
        "257, finished before": turned_case(1, 257, 2, 128, norm=False, rope=False),
    },
    cost=lambda k, heads, *turn: Cost(10 * k.numel() / EVERY, k.numel() * k.element_size() / EVERY, "fp32"),
)

TOKEN_AMAX = define(
    token_amax_reference,
    launch_amax,
    cases={
        "one token": case(1, 1, 3, 128),
        "63 of a fused projection": case(2, 63, 4, 64, fused=True),
        "257": case(1, 257, 2, 128, dtype=torch.float16),
    },
    cost=lambda x: Cost(x.numel(), x.numel() * x.element_size(), "fp32"),
)
