"""residual + gate * y in one pass, for branches whose last matrix product cannot do it itself."""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.quantize import load_row, row_meta, store_row
from dax.kernels.start import start
from dax.kernels.token_rows import rows_of_tokens, strides


def gated_residual_reference(
    y: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor, split: int = 0
) -> torch.Tensor:
    """residual + gate * y, in fp32 inside.

    y, residual  [B, S, C]       bf16, fp16 or fp32
    gate         [B or 1, R, C]  fp32; R = 1, or 2: the first `split` tokens have row 0, the others row 1
    returns      [B, S, C]       in residual's dtype
    Reads two and writes one: 6 B S C bytes in bf16.
    """
    return (residual.float() + y.float() * rows_of_tokens(gate, y.shape[1], split)).to(residual.dtype)


@triton.jit
def add_gated(Residual, Y, Gate, of_token, C: tl.constexpr, CHUNK: tl.constexpr):
    """The row at Residual + that at Gate + of_token (Gate None: 1) * that at Y, in fp32, as chunks."""
    ys = load_row(Y, C, CHUNK)
    residuals = load_row(Residual, C, CHUNK)
    if Gate is not None:
        gates = load_row(Gate + of_token, C, CHUNK)
    out = ()
    for j in tl.static_range(len(ys)):
        out += (residuals[j] + (ys[j] if Gate is None else ys[j] * gates[j]),)
    return out


@triton.jit(do_not_specialize=["tokens", "split"])
def gate_kernel(Y, Gate, Residual, Out, tokens, split, video_stride, row_stride, C: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    of_token = row // tokens * video_stride + (row % tokens >= split) * row_stride
    out = add_gated(Residual + row * C, Y + row * C, Gate, of_token, C, CHUNK)
    store_row(Out + row * C, out, C, CHUNK)


def launch(y: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor, split: int = 0) -> torch.Tensor:
    B, S, C = residual.shape
    out = torch.empty(residual.shape, device=residual.device, dtype=residual.dtype)
    gate = gate.float().contiguous()
    which = (S, split, *strides(gate))
    with torch.cuda.device_of(y):
        start(gate_kernel, (B * S,), y.contiguous(), gate, residual.contiguous(), out, *which, **row_meta(C))
    return out


def case(B: int, S: int, C: int, samples: int, split: int = -1):
    def arguments(generator, device):
        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        y, residual = (gaussian(B, S, C).to(torch.bfloat16) for _ in range(2))
        gate = gaussian(samples, 1 if split < 0 else 2, C)
        return y, gate, residual, max(split, 0)

    return arguments


gated_residual = define(
    gated_residual_reference,
    launch,
    cases={
        "one token": case(1, 1, 384, 1),
        "two videos": case(2, 63, 384, 2),
        "wide": case(2, 5, 5120, 1),
        "two rows": case(2, 63, 384, 2, split=7),
        "two rows, the last unused": case(2, 5, 384, 1, split=5),
    },
    cost=lambda y, gate, residual, split=0: Cost(0, 3 * y.numel() * y.element_size()),
)
