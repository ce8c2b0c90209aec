"""Queries and keys between their projection and attention: RMS norm over all heads, then rotation by position.

One program holds one row in registers and reads it once.
"""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.quantize import load_row, row_meta, store_row
from dax.kernels.start import start


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
def angles(Table, at, ROPE: tl.constexpr):
    """cos or sin of each pair of columns [..., N / 2], from its two equal entries at `at` [..., N]."""
    if ROPE:
        first, second = tl.split(paired(tl.load(Table + at)))
        return first
    else:
        return tl.full((1,) * len(at.shape), 0.0, tl.float32)


@triton.jit
def paired(x):
    """[..., N] as [..., N / 2, 2]."""
    return x.reshape(x.shape[:-1] + [x.shape[-1] // 2, 2])


@triton.jit
def turned(x, cos, sin):
    """x [..., N], rotated in pairs of columns by cos and sin [..., N / 2]."""
    even, odd = tl.split(paired(x))
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(x.shape)


@triton.jit(do_not_specialize=["S"])
def norm_rope_kernel(
    X, Weight, Cos, Sin, Out, S, stride_b, stride_s, eps,
    C: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    chunks = load_row(X + batch * stride_b + token * stride_s, C, CHUNK)
    at = token * D + tl.arange(0, CHUNK) % D
    cos, sin = angles(Cos, at, ROPE), angles(Sin, at, ROPE)
    if NORM:
        squares = chunks[0] * chunks[0]
        for j in tl.static_range(1, len(chunks)):
            squares += chunks[j] * chunks[j]
        inverse = tl.rsqrt(tl.sum(squares, 0) / C + eps)
        weights = load_row(Weight, C, CHUNK)
    out = ()
    for j in tl.static_range(len(chunks)):
        y = chunks[j] * inverse * weights[j] if NORM else chunks[j]
        out += (turned(y, cos, sin) if ROPE else y,)
    store_row(Out + (batch * S + token) * C, out, C, CHUNK)


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
    with torch.cuda.device_of(x):
        start(
            norm_rope_kernel, (S, B), x, weight, cos, sin, out, S, x.stride(0), x.stride(1), eps,
            D=D, NORM=weight is not None, ROPE=cos is not None, enable_fp_fusion=True, **row_meta(C),
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
