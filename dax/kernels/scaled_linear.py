"""A linear layer in 8 bits, with what follows it done before the result leaves the registers.

    out = act((x w^T) * x_scale * weight_scale + bias)        act: none, GELU(tanh), or residual + gate * (...)

int8 multiplies into int32, fp8 into fp32. The gate is folded into weight_scale and bias, so it costs nothing. On Hopper
`scaled_linear_hopper` does it, elsewhere the Triton kernel here. K and N must be multiples of 16; any number of rows.
"""

import torch
import torch.nn.functional as F

from dax.errors import DaxError
from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.quantize import LARGEST, decoded, quantize_rows_reference, to_codes
from dax.kernels.start import start
from dax.kernels.token_rows import rows_of_tokens


def scaled_linear_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    gelu: bool = False,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    split: int = 0,
) -> torch.Tensor:
    """A linear layer of 8-bit operands, with bias, and GELU(tanh) or gate and residual after it.

    x, x_scale            [B, S, K] 8 bits, [B, S] fp32   see quantize_rows; any leading shape without a gate
    weight, weight_scale  [N, K] 8 bits, [N] fp32         bias  [N] or None
    gate, residual        [B or 1, R, N] fp32, [B, S, N]  out = residual + gate * (...); gate None means 1. Of R = 2
                                                          rows the first `split` tokens have the first
    returns               [B, S, N]                       in `dtype`, computed in fp32
    DaxError("bad_request") for K or N that is not a multiple of 16. 2 B S K N operations.
    """
    check_shapes(x, weight)
    y = exact_product(x, weight) * x_scale[..., None] * weight_scale
    y = y if bias is None else y + bias.float()
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = y * rows_of_tokens(gate, y.shape[1], split).float()
    return (y if residual is None else residual.float() + y).to(dtype)


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in fp32 [..., N]. Integers go through torch's own product: the same numbers, eight times sooner."""
    if x.dtype == torch.int8 and x.is_cpu and x.numel():
        return torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t()).float().view(*x.shape[:-1], -1)
    return F.linear(x.float(), weight.float())


def scaled_linear_quantize_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor,
    gelu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scaled_linear in the 8 bits of the next one, by a static scale: ([..., N] x's dtype, [...] fp32 scales).

    out_scale  [] fp32  the next layer's input scale. A row that was not finite gets a scale that is not.
    """
    y = scaled_linear_reference(x, x_scale, weight, weight_scale, bias, torch.float32, gelu)
    return to_codes(y / out_scale, x.dtype), out_scale + x_scale * 0


def check_shapes(x: torch.Tensor, weight: torch.Tensor) -> None:
    N, K = weight.shape
    if x.shape[-1] != K or K % 16 or N % 16:
        raise DaxError(
            "bad_request",
            f"8-bit linear: x {list(x.shape)}, weight [N, K] = [{N}, {K}]: x must end in K, and K and N be multiples "
            "of 16; keep this layer in bf16 with a rule of `none`",
        )


@triton.jit
def gelu_tanh(y):
    u = y * (0.7978845608 + 0.0356774081 * y * y)
    return y * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * u)))  # y (1 + tanh u) / 2


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["XScale"])  # it may begin at any token
def linear_kernel(
    X,
    XScale,
    W,
    WScale,
    Bias,
    Residual,
    OutScale,
    Out,
    M,
    N,
    K,
    GELU: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, rows, columns = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tile // (GROUP * columns) * GROUP  # groups of GROUP row blocks share weights in the cache
    height = tl.minimum(rows - first, GROUP)
    m = (first + tile % (GROUP * columns) % height) * BM + tl.arange(0, BM)
    n = tile % (GROUP * columns) // height * BN + tl.arange(0, BN)
    m_inside, n_inside = m < M, n < N
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.int32 if X.dtype.element_ty == tl.int8 else tl.float32)
    x_rows, w_rows = X + m[:, None].to(tl.int64) * K, W + n[:, None].to(tl.int64) * K
    for done in range(0, K, BK):
        inside = (done + k)[None, :] < K
        x = tl.load(x_rows + (done + k)[None, :], mask=m_inside[:, None] & inside, other=0.0)
        w = tl.load(w_rows + (done + k)[None, :], mask=n_inside[:, None] & inside, other=0.0)
        acc += tl.dot(x, w.T, out_dtype=acc.dtype)
    y = acc.to(tl.float32) * tl.load(XScale + m, m_inside, 0.0)[:, None] * tl.load(WScale + n, n_inside, 0.0)[None, :]
    y += tl.load(Bias + n, n_inside, 0.0)[None, :]
    if GELU:
        y = gelu_tanh(y)
    where = m[:, None].to(tl.int64) * N + n[None, :]
    inside = m_inside[:, None] & n_inside[None, :]
    if Residual is not None:
        y += tl.load(Residual + where, inside, 0.0).to(tl.float32)
    if OutScale is not None:
        y = tl.minimum(tl.maximum(y / tl.load(OutScale), -LARGEST), LARGEST)
        if INTEGER:
            y = (y + 12582912.0) - 12582912.0  # rounds, see quantize.store_codes
    tl.store(Out + where, y.to(Out.dtype.element_ty), inside)


TILE = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def product(x, x_scale, weight, weight_scale, bias, residual, out_scale, out, gelu) -> None:
    """Write `out` [M, N]; everything two-dimensional, scales and bias fp32."""
    operands = x, x_scale, weight, weight_scale, bias, residual, out_scale, out
    with torch.cuda.device_of(x):
        if torch.cuda.get_device_capability(x.device)[0] == 9 and out.element_size() < 4:
            from dax.kernels.scaled_linear_hopper import product as on_hopper

            on_hopper(*operands, gelu)
        else:
            portable_product(*operands, gelu)


def portable_product(x, x_scale, weight, weight_scale, bias, residual, out_scale, out, gelu) -> None:
    (M, K), N = x.shape, len(weight)
    grid = (triton.cdiv(M, TILE["BM"]) * triton.cdiv(N, TILE["BN"]),)
    meta = {"GELU": gelu, "LARGEST": LARGEST.get(out.dtype, 0.0), "INTEGER": out.dtype == torch.int8}
    operands = x, x_scale, weight, weight_scale, bias, residual, out_scale, out
    start(linear_kernel, grid, *operands, M, N, K, **meta, **TILE)


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    gelu: bool = False,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    split: int = 0,
) -> torch.Tensor:
    check_shapes(x, weight)
    N = len(weight)
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=dtype)
    bias = torch.zeros_like(weight_scale) if bias is None else bias.float()
    x, x_scale = x.contiguous(), x_scale.contiguous()
    for where, factor in pieces(gate, x.shape[:-1], split):
        scale, offset = (weight_scale, bias) if factor is None else (weight_scale * factor, bias * factor)
        product(
            x[where].reshape(-1, x.shape[-1]),
            x_scale[where].reshape(-1),
            weight,
            scale,
            offset,
            None if residual is None else residual[where].reshape(-1, N).contiguous(),
            None,
            out[where].view(-1, N),
            gelu,
        )
    return out


def pieces(gate: torch.Tensor | None, shape: torch.Size, split: int) -> list:
    """[(index, [N] gate)] of the tokens that have one gate: all, a video's, or a video's first ones and its others."""
    if gate is None or gate.shape[:2] == (1, 1):
        return [(..., None if gate is None else gate[0, 0])]
    B, S = shape
    runs = [(0, S)] if gate.shape[1] == 1 else [(0, split), (split, S)]
    return [
        ((i, slice(start, stop)), gate[i % len(gate), row])
        for i in range(B)
        for row, (start, stop) in enumerate(runs)
        if start < stop
    ]


def launch_quantize(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor,
    gelu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_shapes(x, weight)
    N = len(weight)
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    bias = torch.zeros_like(weight_scale) if bias is None else bias.float()
    x, x_scale = x.contiguous(), x_scale.contiguous()
    product(
        x.view(-1, x.shape[-1]), x_scale.view(-1), weight, weight_scale, bias, None, out_scale, out.view(-1, N), gelu
    )
    return out, out_scale + x_scale * 0


def case(shape: tuple, N: int, dtype: torch.dtype, static: bool = False, **flags):
    """flags: gelu, bias=False, residual=True, gates=(videos, rows) of the gate, split."""

    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        x, x_scale = quantize_rows_reference(gaussian(*shape), dtype)
        weight_dtype = torch.float8_e4m3fn if dtype == torch.float8_e5m2 else dtype
        w = gaussian(N, shape[-1]) * shape[-1] ** -0.5
        weight, weight_scale = quantize_rows_reference(w, weight_dtype)
        bias = gaussian(N) if flags.get("bias", True) else None
        operands = [x, x_scale, weight, weight_scale, bias]
        gelu = flags.get("gelu", False)
        if static:
            return *operands, torch.tensor(3.0 / LARGEST[dtype], device=device), gelu
        gate = gaussian(*flags["gates"], N) if "gates" in flags else None
        residual = gaussian(*shape[:-1], N).bfloat16() if flags.get("residual") else None
        return *operands, torch.bfloat16, gelu, gate, residual, flags.get("split", 0)

    return arguments


def cost(x, x_scale, weight, weight_scale, bias, dtype_or_scale, gelu=False, gate=None, residual=None, split=0) -> Cost:
    """Operands once, the output once; the residual too where there is one."""
    rows, (N, K) = x.numel() // x.shape[-1], weight.shape
    out = dtype_or_scale.itemsize if isinstance(dtype_or_scale, torch.dtype) else 1
    moved = rows * K + N * K + rows * N * (out + (residual.element_size() if residual is not None else 0))
    return Cost(2 * rows * N * K, moved, "int8" if x.dtype == torch.int8 else "fp8")


scaled_linear = define(
    scaled_linear_reference,
    launch,
    cases={
        "one row, int8": case((1, 384), 384, torch.int8),
        "odd, int8": case((257, 400), 528, torch.int8),
        "odd, no bias, e4m3": case((63, 384), 272, torch.float8_e4m3fn, bias=False),
        "gelu, int8": case((1, 130, 384), 1024, torch.int8, gelu=True),
        "gate and residual, int8": case((2, 65, 1024), 384, torch.int8, gates=(2, 1), residual=True),
        "one gate, e4m3": case((2, 65, 1024), 256, torch.float8_e4m3fn, gates=(1, 1), residual=True),
        "two gates, int8": case((2, 65, 400), 384, torch.int8, gates=(1, 2), residual=True, split=33),
        "two gates a video, the last unused, int8": case((2, 9, 384), 64, torch.int8, gates=(2, 2), split=9),
        "residual alone, int8": case((1, 129, 384), 512, torch.int8, residual=True),
        "e5m2 by e4m3": case((63, 384), 256, torch.float8_e5m2),
        "long, int8": case((3, 13824), 32, torch.int8),
    },
    exact=lambda x, x_scale, weight, weight_scale, bias, dtype, *rest: scaled_linear_reference(
        x, x_scale, weight, weight_scale, bias, torch.float32, *rest
    ),
    cost=cost,
)
scaled_linear_quantize = define(
    scaled_linear_quantize_reference,
    launch_quantize,
    cases={
        "gelu, int8": case((130, 384), 1024, torch.int8, static=True, gelu=True),
        "gelu, e4m3": case((63, 400), 528, torch.float8_e4m3fn, static=True, gelu=True),
    },
    exact=lambda x, x_scale, weight, weight_scale, bias, out_scale, gelu: scaled_linear_reference(
        x, x_scale, weight, weight_scale, bias, torch.float32, gelu
    ),
    decode=decoded,
    cost=cost,
)
