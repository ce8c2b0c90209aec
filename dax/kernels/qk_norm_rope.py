"""Queries and keys between their projection and attention: RMS norm over all heads, then rotation by position.

The row helpers are shared with `qk_quantize`: a row is read once from memory for its mean square and once more from
the cache for the result, CHUNK columns (whole heads) at a time, so that any number of heads is tiled exactly.
"""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.start import start

BLOCK = 4096  # elements a program holds at a time
NUM_WARPS = 4


def qk_norm_rope_reference(
    x: torch.Tensor,
    heads: int,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """RMS-normalize each token across all heads, then rotate pairs of channels by position; in fp32 inside.

    x         [B, s, C]     queries or keys, C = heads * D; rows may be strided (a third of a fused projection)
    weight    [C]           of the norm; None: x comes normalized
    cos, sin  [s, D] fp32   this rank's rows of the rotary table, every value twice; None: no rotation
    returns   [B, s, H, D]  in x's dtype
    Reads and writes x once: 4 B s C bytes in bf16. Bandwidth-bound.
    """
    y = x.float()
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    y = y.unflatten(2, (heads, -1))
    if cos is not None:
        even, odd = y[..., 0::2], y[..., 1::2]
        c, s = cos[None, :, None, 0::2].float(), sin[None, :, None, 1::2].float()
        y = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)
    return y.to(x.dtype, copy=True)


@triton.jit
def inverse_rms(row, eps, C: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr):
    """1 / RMS of each row, [R, 1]; `row` are pointers [R, 1] to the rows' first elements. Ones without NORM."""
    columns = tl.arange(0, CHUNK)[None, :]
    if NORM:
        squares = tl.zeros((row.shape[0], CHUNK), tl.float32)
        for j in tl.static_range(C // CHUNK):
            x = tl.load(row + j * CHUNK + columns).to(tl.float32)
            squares += x * x
        return tl.rsqrt(tl.sum(squares, 1) / C + eps)[:, None]
    else:
        return tl.full((row.shape[0], 1), 1.0, tl.float32)


@triton.jit
def angles(Table, at, ROPE: tl.constexpr):
    """cos or sin of each pair of columns [R, N / 2], from its two equal entries at `at` [R, N]."""
    if ROPE:
        first, second = tl.split(tl.load(Table + at).reshape(at.shape[0], at.shape[1] // 2, 2))
        return first
    else:
        return tl.zeros((1, 1), tl.float32)


@triton.jit
def normed_turned(row, columns, Weight, cos, sin, NORM: tl.constexpr, ROPE: tl.constexpr):
    """Those columns of the rows, times the norm's weight and rotated, fp32 [R, N]; without the rows' 1 / RMS."""
    x = tl.load(row + columns[None, :]).to(tl.float32)
    if NORM:
        x = x * tl.load(Weight + columns).to(tl.float32)[None, :]
    if ROPE:
        even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        x = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(x.shape[0], x.shape[1])
    return x


@triton.jit(do_not_specialize=["S"])
def norm_rope_kernel(
    X, Weight, Cos, Sin, Out, S, stride_b, stride_s, eps,
    C: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    token = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), S - 1)[:, None]  # beyond the end: the last again
    batch = tl.program_id(1).to(tl.int64)
    row = X + batch * stride_b + token.to(tl.int64) * stride_s
    columns = tl.arange(0, CHUNK)
    out = Out + (batch * S + token) * C + columns[None, :]
    at = token * D + columns[None, :] % D
    cos, sin = angles(Cos, at, ROPE), angles(Sin, at, ROPE)
    inverse = inverse_rms(row, eps, C, CHUNK, NORM)
    for j in tl.static_range(C // CHUNK):
        y = normed_turned(row, columns + j * CHUNK, Weight, cos, sin, NORM, ROPE) * inverse
        tl.store(out + j * CHUNK, y.to(Out.dtype.element_ty))


def chunk_of(C: int, D: int) -> int:
    """Columns taken at a time: as many whole heads as a power of two divides them into, at most 1024 columns."""
    heads = C // D
    return min(D * (heads & -heads), max(1024, D))


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x itself if its columns lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def table_of(x: torch.Tensor | None) -> torch.Tensor | None:
    """A rotary table as the kernels read it: fp32, contiguous."""
    return None if x is None else x.float().contiguous()


def launch(
    x: torch.Tensor,
    heads: int,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    B, S, C = x.shape
    D = C // heads
    x, cos, sin = rows_of(x), table_of(cos), table_of(sin)
    out = torch.empty(B, S, heads, D, device=x.device, dtype=x.dtype)
    chunk = chunk_of(C, D)
    rows = max(1, BLOCK // chunk)
    with torch.cuda.device_of(x):
        start(
            norm_rope_kernel, (triton.cdiv(S, rows), B), x, weight, cos, sin, out, S, x.stride(0), x.stride(1), eps,
            C=C, D=D, CHUNK=chunk, ROWS=rows, NORM=weight is not None, ROPE=cos is not None,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def cost(x, heads, weight=None, cos=None, sin=None, eps=1e-6) -> Cost:
    tables = 0 if cos is None else 2 * cos.numel() * 4
    return Cost(10 * x.numel(), 2 * x.numel() * x.element_size() + tables, "fp32")


def rotary_table(s: int, D: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [s, D] fp32 with every value twice, as diffusers makes them for one axis."""
    rates = 10000.0 ** -(torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    turns = torch.outer(torch.arange(s, device=device, dtype=torch.float32), rates).repeat_interleave(2, dim=1)
    return turns.cos(), turns.sin()


def case(B, s, H, D, *, fused=False, norm=True, rope=True, dtype=torch.bfloat16):
    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        x = gaussian(B, s, (3 if fused else 1) * H * D).to(dtype)
        weight = 1 + 0.2 * gaussian(H * D) if norm else None
        cos, sin = rotary_table(s, D, device) if rope else (None, None)
        return x.chunk(3, dim=-1)[1] if fused else x, H, weight, cos, sin

    return arguments


QK_NORM_ROPE = define(
    qk_norm_rope_reference,
    launch,
    cases={
        "one token": case(1, 1, 3, 128),
        "63 of a fused projection": case(2, 63, 4, 64, fused=True),
        "257 without rotation": case(1, 257, 6, 128, rope=False),
        "257 without norm": case(2, 257, 2, 128, norm=False),
        "fp32, heads of 32": case(1, 65, 2, 32, dtype=torch.float32),
        "fp16": case(1, 130, 5, 64, dtype=torch.float16),
    },
    cost=cost,
)
