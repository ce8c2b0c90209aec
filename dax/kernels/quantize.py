"""Rows in 8 bits: each token divided by its own scale, or all by one measured before.

The scale is symmetric, amax / largest code, in fp32. A row with a NaN or an infinity gets a scale that is not finite,
so that the fault reaches the result instead of vanishing in an integer.
"""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SMALLEST_AMAX = 1e-12  # so that a row of zeros has a scale


def quantize_rows_reference(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x in 8 bits, and what each row was divided by.

    x         [..., K]  bf16, fp16 or fp32
    dtype     int8, float8_e4m3fn or float8_e5m2
    scale     [] fp32   one scale measured before (static), or None: each row's amax / largest code
    returns   [..., K] dtype, and [...] fp32
    Values beyond a static scale saturate. Reads x once and writes half of it: 3 bytes per bf16 element.
    """
    x = x.float()
    finite = (x * 0).sum(-1)  # 0, or NaN where the row has a NaN or an infinity
    row_scale = row_scales(x, dtype) if scale is None else scale.expand(x.shape[:-1])
    return to_codes(x / row_scale[..., None], dtype), row_scale + finite


def row_scales(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., K] fp32 -> [...]: the scale that lets the largest magnitude of a row use the largest code."""
    return x.abs().amax(-1).clamp_min(SMALLEST_AMAX) / LARGEST[dtype]


def to_codes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32, already divided by its scale, to the nearest code; ties to even, saturating."""
    x = x.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype)


@triton.jit
def store_codes(y, mask, offsets, Codes, Scale, row, StaticScale, finite, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Quantise the row y (fp32, zero outside mask) and store its codes and its scale."""
    if StaticScale is None:
        scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / LARGEST
    else:
        scale = tl.load(StaticScale)
    y = tl.minimum(tl.maximum(y * (1.0 / scale), -LARGEST), LARGEST)
    if INTEGER:
        y = (y + 12582912.0) - 12582912.0  # 1.5 x 2^23: rounds to the nearest integer, ties to even
    tl.store(Codes + offsets, y.to(Codes.dtype.element_ty), mask)
    tl.store(Scale + row, scale + finite)


@triton.jit
def quantize_kernel(X, Codes, Scale, StaticScale, K, BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    x = tl.load(X + row * K + columns, mask, 0.0).to(tl.float32)
    store_codes(x, mask, row * K + columns, Codes, Scale, row, StaticScale, tl.sum(x * 0.0, 0), LARGEST, INTEGER)


def launch(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, device=x.device, dtype=dtype)
    row_scale = torch.empty(x.shape[:-1], device=x.device, dtype=torch.float32)
    K = x.shape[-1]
    grid, meta = row_grid(row_scale.numel(), K)
    quantize_kernel[grid](x, codes, row_scale, scale, K, LARGEST=LARGEST[dtype], INTEGER=dtype == torch.int8, **meta)
    return codes, row_scale


def row_grid(rows: int, columns: int) -> tuple[tuple[int], dict]:
    """(grid, constants) of a kernel with one program per row that holds the row in registers."""
    block = triton.next_power_of_2(columns)
    return (rows,), {"BLOCK": block, "num_warps": min(16, max(1, block // 1024))}


def case(rows: int, columns: int, dtype: torch.dtype, static: bool = False, outlier: float = 1.0):
    def arguments(generator, device):
        x = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
        x[:, 0] *= outlier
        return x.to(device), dtype, torch.tensor(3.0 / LARGEST[dtype], device=device) if static else None

    return arguments


quantize_rows = define(
    quantize_rows_reference,
    launch,
    cases={
        "one row": case(1, 16, torch.int8),
        "odd, int8": case(63, 5120, torch.int8, outlier=30.0),
        "odd, e4m3": case(257, 336, torch.float8_e4m3fn),
        "odd, e5m2": case(5, 13824, torch.float8_e5m2),
        "static, int8": case(63, 384, torch.int8, static=True),
        "static, e4m3": case(63, 384, torch.float8_e4m3fn, static=True),
    },
    cost=lambda x, dtype, scale=None: Cost(0, x.numel() * (x.element_size() + 1) + 4 * x.numel() / x.shape[-1]),
)
