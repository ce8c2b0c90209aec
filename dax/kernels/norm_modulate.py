"""LayerNorm and its neighbours in a diffusion transformer, in one pass: the residual before, modulation, 8 bits after.

The same kernel serves adaptive modulation (weight = 1 + scale, a row or two for each video) and a norm with its own
affine weights (one row for all), of a tensor that is there or of a sum that is written beside it.
"""

import torch
import torch.nn.functional as F

from dax.kernels.gated_residual import add_gated, gated_residual_reference
from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.quantize import (
    LARGEST,
    decoded,
    load_row,
    quantize_rows_reference,
    rotated,
    row_meta,
    store_codes,
    store_row,
)
from dax.kernels.start import start
from dax.kernels.token_rows import rows_of_tokens, strides


def norm_modulate_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, split: int = 0
) -> torch.Tensor:
    """LayerNorm(x) * weight + bias, in fp32 inside.

    x             [B, S, C]       bf16, fp16 or fp32
    weight, bias  [B or 1, R, C]  fp32; R = 1, or 2: the first `split` tokens have row 0, the others row 1
    returns       [B, S, C]       in x's dtype
    Reads and writes x once: 4 B S C bytes in bf16. Bandwidth-bound.
    """
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (y * rows_of_tokens(weight, x.shape[1], split) + rows_of_tokens(bias, x.shape[1], split)).to(x.dtype)


def norm_modulate_quantize_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    split: int = 0,
    rotate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm_modulate in 8 bits, never rounded to bf16 in between: ([B, S, C] dtype, [B, S] fp32 scales).

    scale, rotate   as in quantize_rows: [] fp32, static, or None for each token's own; whether to rotate first
    Reads x once and writes half of it: 3 B S C bytes in bf16.
    """
    return quantize_rows_reference(norm_modulate_reference(x.float(), weight, bias, eps, split), dtype, scale, rotate)


def residual_norm_modulate_reference(
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    split: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x = residual + gate * y, and norm_modulate of x as rounded to its dtype.

    y, residual         [B, S, C]       bf16, fp16 or fp32
    gate, weight, bias  [B or 1, R, C]  fp32, each with an R of its own, see norm_modulate; gate None means 1
    returns             two [B, S, C]   in residual's dtype: x, and LayerNorm(x) * weight + bias
    Reads two and writes two: 8 B S C bytes in bf16; by two kernels 10.
    """
    gate = torch.ones_like(weight[:1, :1]) if gate is None else gate
    x = gated_residual_reference(y, gate, residual, split)
    return x, norm_modulate_reference(x, weight, bias, eps, split)


@triton.jit(do_not_specialize=["tokens", "split"])
def norm_kernel(
    X,
    Y,
    Gate,
    Sums,
    Weight,
    Bias,
    Out,
    Scale,
    StaticScale,
    tokens,
    split,
    video_stride,
    row_stride,
    gate_video_stride,
    gate_row_stride,
    eps,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if Sums is None:
        chunks = load_row(X + row * C, C, CHUNK)
    else:
        of_gate = row // tokens * gate_video_stride + (row % tokens >= split) * gate_row_stride
        unrounded = add_gated(X + row * C, Y + row * C, Gate, of_gate, C, CHUNK)
        store_row(Sums + row * C, unrounded, C, CHUNK)
        chunks = ()
        for j in tl.static_range(len(unrounded)):
            chunks += (unrounded[j].to(Sums.dtype.element_ty).to(tl.float32),)
    total = chunks[0]
    for j in tl.static_range(1, len(chunks)):
        total += chunks[j]
    mean = tl.sum(total, 0) / C
    columns = tl.arange(0, CHUNK)
    centred = ()
    squares = tl.zeros([CHUNK], tl.float32)
    for j in tl.static_range(len(chunks)):
        x = chunks[j] - mean
        if (j + 1) * CHUNK > C:
            x = tl.where(j * CHUNK + columns < C, x, 0.0)
        squares += x * x
        centred += (x,)
    inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / C + eps)
    of_token = row // tokens * video_stride + (row % tokens >= split) * row_stride
    weights = load_row(Weight + of_token, C, CHUNK)
    biases = load_row(Bias + of_token, C, CHUNK)
    out = ()
    for j in tl.static_range(len(chunks)):
        out += (centred[j] * inverse * weights[j] + biases[j],)
    if Scale is None:
        store_row(Out + row * C, out, C, CHUNK)
    else:
        store_codes(Out + row * C, out, Scale + row, StaticScale, inverse * 0.0, C, CHUNK, LARGEST, ROTATE)


def norm_into(
    out, x, weight, bias, eps, split, scale=None, static_scale=None, rotate=False, y=None, gate=None, sums=None
) -> None:
    """Write `out` [B, S, C]: LayerNorm(x) * weight + bias, in 8 bits and their `scale` [B, S] where that is given.

    Where `sums` [B, S, C] is given, write that too: x + gate * y, which is then normed instead of x.
    """
    B, S, C = x.shape
    x, y = x.contiguous(), None if y is None else y.contiguous()
    weight, bias, gate = (None if v is None else v.float().contiguous() for v in (weight, bias, gate))
    which = (S, split, *strides(weight), *((0, 0) if gate is None else strides(gate)))
    static = {"LARGEST": LARGEST.get(out.dtype, 0.0), "ROTATE": rotate} | row_meta(C)
    operands = x, y, gate, sums, weight, bias, out, scale, static_scale
    with torch.cuda.device_of(x):
        start(norm_kernel, (B * S,), *operands, *which, eps, **static)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, split: int = 0) -> torch.Tensor:
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    norm_into(out, x, weight, bias, eps, split)
    return out


def launch_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    split: int = 0,
    rotate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, device=x.device, dtype=dtype)
    row_scale = torch.empty(x.shape[:-1], device=x.device, dtype=torch.float32)
    norm_into(codes, x, weight, bias, eps, split, row_scale, scale, rotate)
    return codes, row_scale


def launch_residual(
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    split: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = (torch.empty(residual.shape, device=residual.device, dtype=residual.dtype) for _ in range(2))
    norm_into(out, residual, weight, bias, eps, split, y=y, gate=gate, sums=x)
    return x, out


def case(
    B: int, S: int, C: int, samples: int, dtype: torch.dtype | None = None, static=False, split: int = -1, rotate=False
):
    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        x = gaussian(B, S, C).add(0.5).to(torch.bfloat16)
        rows = (samples, 1 if split < 0 else 2, C)
        weight, bias = gaussian(*rows) * 0.3 + 1, gaussian(*rows) * 0.3
        scale = torch.tensor(4.0 / LARGEST[dtype], device=device) if static else None
        quantised = () if dtype is None else (dtype, scale)
        return x, weight, bias, 1e-6, *quantised, max(split, 0), *((rotate,) if quantised else ())

    return arguments


def residual_case(B: int, S: int, C: int, gates: tuple | None, rows: tuple, split: int = 0, dtype=torch.bfloat16):
    """gates, rows: (videos, R) of the gate, or None, and of weight and bias."""

    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        y, residual = gaussian(B, S, C).to(dtype), gaussian(B, S, C).add(0.5).to(dtype)
        gate = None if gates is None else gaussian(*gates, C)
        return y, gate, residual, gaussian(*rows, C) * 0.3 + 1, gaussian(*rows, C) * 0.3, 1e-6, split

    return arguments


norm_modulate = define(
    norm_modulate_reference,
    launch,
    cases={
        "one token": case(1, 1, 384, 1),
        "modulated, two videos": case(2, 63, 384, 2),
        "affine, wide": case(2, 5, 5120, 1),
        "odd width": case(1, 257, 1536 + 16, 1),
        "two rows": case(2, 63, 384, 2, split=7),
        "two rows, the first unused": case(1, 5, 384, 1, split=0),
        "two rows, the last unused": case(2, 5, 384, 1, split=5),
    },
    cost=lambda x, weight, bias, eps, split=0: Cost(0, 2 * x.numel() * x.element_size()),
)
norm_modulate_quantize = define(
    norm_modulate_quantize_reference,
    launch_quantize,
    cases={
        "modulated, int8": case(2, 63, 384, 2, torch.int8),
        "affine, wide, rotated": case(1, 63, 5120, 1, torch.int8, rotate=True),
        "affine, e4m3": case(1, 257, 5120, 1, torch.float8_e4m3fn),
        "static, int8": case(1, 63, 1536, 1, torch.int8, static=True),
        "two rows, int8": case(2, 63, 384, 2, torch.int8, split=62),
    },
    exact=lambda x, weight, bias, eps, dtype, scale=None, split=0, rotate=False: (rotated if rotate else torch.clone)(
        norm_modulate_reference(x.float(), weight, bias, eps, split)
    ),
    decode=decoded,
    cost=lambda x, weight, bias, eps, dtype, scale=None, split=0, rotate=False: Cost(
        0, x.numel() * (x.element_size() + 1)
    ),
)
residual_norm_modulate = define(
    residual_norm_modulate_reference,
    launch_residual,
    cases={
        "gate, affine": residual_case(2, 5, 5120, (2, 1), (1, 1)),
        "one token": residual_case(1, 1, 384, (1, 1), (1, 1)),
        "two gates, affine": residual_case(2, 63, 384, (2, 2), (1, 1), split=7),
        "gate and modulation of two rows": residual_case(2, 63, 384, (1, 2), (2, 2), split=62),
        "two gates, the last unused, odd width": residual_case(1, 5, 1536 + 16, (1, 2), (1, 1), split=5),
        "no gate, two rows": residual_case(2, 63, 384, None, (2, 2), split=7),
        "no gate, fp32": residual_case(1, 257, 384, None, (1, 1), dtype=torch.float32),
        "no gate, fp16": residual_case(1, 63, 384, None, (1, 1), dtype=torch.float16),
        "no gate, modulated": residual_case(2, 5, 5120, None, (2, 1)),
    },
    cost=lambda y, gate, residual, weight, bias, eps, split=0: Cost(0, 4 * y.numel() * y.element_size()),
)
