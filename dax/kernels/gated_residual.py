"""residual + gate * y in one pass, for branches whose last matrix product cannot do it itself."""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.quantize import row_grid


def gated_residual_reference(y: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual + gate * y, in fp32 inside.

    y, residual  [B, S, C]    bf16, fp16 or fp32
    gate         [B or 1, C]  fp32
    returns      [B, S, C]    in residual's dtype
    Reads two and writes one: 6 B S C bytes in bf16.
    """
    return (residual.float() + y.float() * gate[:, None]).to(residual.dtype)


@triton.jit
def gate_kernel(Y, Gate, Residual, Out, C, tokens, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    y = tl.load(Y + row * C + columns, mask, 0.0).to(tl.float32)
    residual = tl.load(Residual + row * C + columns, mask, 0.0).to(tl.float32)
    gate = tl.load(Gate + row // tokens * gate_stride + columns, mask, 0.0)
    tl.store(Out + row * C + columns, (residual + y * gate).to(Out.dtype.element_ty), mask)


def launch(y: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    B, S, C = residual.shape
    out = torch.empty(residual.shape, device=residual.device, dtype=residual.dtype)
    gate = gate.float().contiguous()
    grid, meta = row_grid(B * S, C)
    stride = C if len(gate) > 1 else 0
    gate_kernel[grid](y.contiguous(), gate, residual.contiguous(), out, C, S, stride, **meta)
    return out


def case(B: int, S: int, C: int, samples: int):
    def arguments(generator, device):
        y, residual = (torch.randn(B, S, C, generator=generator).to(device, torch.bfloat16) for _ in range(2))
        return y, torch.randn(samples, C, generator=generator).to(device), residual

    return arguments


gated_residual = define(
    gated_residual_reference,
    launch,
    cases={"one token": case(1, 1, 384, 1), "two videos": case(2, 63, 384, 2), "wide": case(2, 5, 5120, 1)},
    cost=lambda y, gate, residual: Cost(0, 3 * y.numel() * y.element_size()),
)
