"""Rows in 8 bits: each token divided by its own scale, or all by one measured before; rotated first where asked for.

The scale is symmetric, amax / largest code, in fp32. A row with a NaN or an infinity gets a scale that is not finite,
so that the fault reaches the result instead of vanishing in an integer. A rotation spreads a loud channel over 8
neighbours, so that the others keep more of their bits; a weight that was rotated too undoes it in the product.
"""

import torch

from dax.kernels.hadamard import butterflies, hadamard
from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.start import start

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SMALLEST_AMAX = 1e-12  # so that a row of zeros has a scale


def quantize_rows_reference(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None, rotate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x in 8 bits, and what each row was divided by.

    x         [..., K]  bf16, fp16 or fp32
    dtype     int8, float8_e4m3fn or float8_e5m2
    scale     [] fp32   one scale measured before (static), or None: each row's amax / largest code
    rotate    of `rotated(x)` instead of x; K then is a multiple of 8
    returns   [..., K] dtype, and [...] fp32
    Values beyond a static scale saturate. Reads x once and writes half of it: 3 bytes per bf16 element.
    """
    x = rotated(x.float()) if rotate else x.float()
    finite = x.sum(-1) * 0  # 0, or NaN where the row has a NaN or an infinity
    row_scale = row_scales(x, dtype) if scale is None else scale.expand(x.shape[:-1])
    return to_codes(x / row_scale[..., None], dtype), row_scale + finite


def rotated(x: torch.Tensor) -> torch.Tensor:
    """[..., K]: each 8 neighbours through the Hadamard transform, which is its own inverse (hadamard.py)."""
    return (x.unflatten(-1, (-1, 8)) @ hadamard(8, x.device).to(x.dtype)).flatten(-2)


def row_scales(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., K] fp32 -> [...]: the scale that lets the largest magnitude of a row use the largest code."""
    return x.abs().amax(-1).clamp_min(SMALLEST_AMAX) / LARGEST[dtype]


def to_codes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32, already divided by its scale, to the nearest code; ties to even, saturating."""
    x = x.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype)


def decoded(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What codes and their rows' scales stand for, in fp32."""
    codes, scale = outputs
    return codes.float() * scale[..., None]


@triton.jit
def load_row(X, C: tl.constexpr, CHUNK: tl.constexpr):
    """The row at X in fp32, as chunks that stay in registers; zero beyond C."""
    columns = tl.arange(0, CHUNK)
    chunks = ()
    for j in tl.static_range(0, C, CHUNK):
        if j + CHUNK <= C:
            x = tl.load(X + j + columns)
        else:
            x = tl.load(X + j + columns, j + columns < C, 0.0)
        chunks += (x.to(tl.float32),)
    return chunks


@triton.jit
def store_row(Out, chunks, C: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks in Out's dtype, to the row at Out."""
    columns = tl.arange(0, CHUNK)
    for j in tl.static_range(len(chunks)):
        y = chunks[j].to(Out.dtype.element_ty)
        if (j + 1) * CHUNK <= C:
            tl.store(Out + j * CHUNK + columns, y)
        else:
            tl.store(Out + j * CHUNK + columns, y, j * CHUNK + columns < C)


@triton.jit
def store_codes(
    Codes,
    chunks,
    Scale,
    StaticScale,
    finite,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Quantise a row of chunks (zero beyond C), to the row at Codes, and store its scale at Scale."""
    factor = 1.0
    if ROTATE:
        factor = 0.3535533905932738  # 8^-0.5, which the butterflies leave out
        turned = ()
        for j in tl.static_range(len(chunks)):
            turned += (butterflies(chunks[j].reshape(1, CHUNK), CHUNK, 0).reshape(CHUNK),)
        chunks = turned
    if StaticScale is None:
        amax = tl.abs(chunks[0])
        for j in tl.static_range(1, len(chunks)):
            amax = tl.maximum(amax, tl.abs(chunks[j]))
        scale = tl.maximum(tl.max(amax, 0) * factor, 1e-12) / LARGEST
    else:
        scale = tl.load(StaticScale)
    inverse = factor / scale
    codes = ()
    for j in tl.static_range(len(chunks)):
        y = chunks[j] * inverse
        if StaticScale is not None:
            y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
        if LARGEST == 127:  # 1.5 x 2^23 added leaves the nearest integer, ties to even, in the low bits
            y = (y + 12582912.0).to(tl.int32, bitcast=True)
        codes += (y,)
    store_row(Codes, codes, C, CHUNK)
    tl.store(Scale, scale + finite)


@triton.jit
def quantize_kernel(
    X,
    Codes,
    Scale,
    StaticScale,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = load_row(X + row * C, C, CHUNK)
    total = chunks[0]
    for j in tl.static_range(1, len(chunks)):
        total += chunks[j]
    finite = tl.sum(total, 0) * 0.0
    store_codes(Codes + row * C, chunks, Scale + row, StaticScale, finite, C, CHUNK, LARGEST, ROTATE)


def launch(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None, rotate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, device=x.device, dtype=dtype)
    row_scale = torch.empty(x.shape[:-1], device=x.device, dtype=torch.float32)
    rows = (row_scale.numel(),)
    static = {"LARGEST": LARGEST[dtype], "ROTATE": rotate} | row_meta(x.shape[-1])
    with torch.cuda.device_of(x):
        start(quantize_kernel, rows, x, codes, row_scale, scale, **static)
    return codes, row_scale


def row_meta(columns: int) -> dict:
    """The constants of a kernel with one program per row, which it holds in registers, 8 neighbours to a thread."""
    num_warps = 1
    while num_warps < 8 and 8 * 32 * num_warps * 6 < columns:
        num_warps *= 2
    return {"C": columns, "CHUNK": 8 * 32 * num_warps, "num_warps": num_warps}


def case(rows: int, columns: int, dtype: torch.dtype, static: bool = False, outlier: float = 1.0, rotate: bool = False):
    def arguments(generator, device):
        x = torch.randn(rows, columns, generator=generator, device=device).to(torch.bfloat16)
        x[:, 0] *= outlier
        return x, dtype, torch.tensor(3.0 / LARGEST[dtype], device=device) if static else None, rotate

    return arguments


quantize_rows = define(
    quantize_rows_reference,
    launch,
    cases={
        "one row": case(1, 16, torch.int8),
        "odd, int8": case(63, 5120, torch.int8, outlier=30.0),
        "rotated, wide": case(63, 13824, torch.int8, outlier=30.0, rotate=True),
        "rotated, odd": case(257, 336, torch.int8, rotate=True),
        "odd, e4m3": case(257, 336, torch.float8_e4m3fn),
        "odd, e5m2": case(5, 13824, torch.float8_e5m2),
        "static, int8": case(63, 384, torch.int8, static=True),
        "static, e4m3": case(63, 384, torch.float8_e4m3fn, static=True),
    },
    exact=lambda x, dtype, scale=None, rotate=False: rotated(x.float()) if rotate else x.float(),
    decode=decoded,
    cost=lambda x, dtype, scale=None, rotate=False: Cost(
        0, x.numel() * (x.element_size() + 1) + 4 * x.numel() / x.shape[-1]
    ),
)
