"""softmax(q k^T) v in 16 bits, summed in fp32, for Hopper: `attention_bf16_hopper`, in Gluon.

The operands are the projections as they lie, [B, S, H, D]: nothing is copied, transposed or padded before.
"""

import torch

from dax.errors import DaxError
from dax.kernels import attention_bf16_hopper
from dax.kernels.hopper import compute_capability, hopper
from dax.kernels.op import Cost, define
from dax.kernels.rooms import token_addresses

ROWS_ON_CPU = 1024  # queries whose scores the reference holds at a time
HEAD_DIMS = (64, 128)


def attention_bf16_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention, not causal, without a mask; torch refuses to differentiate it.

    q        [B, S, H, D] bf16 or fp16; the last dimension lies densely, others as they may
    k, v     [B, T, H, D], the same dtype
    scale    above 0; 1 / sqrt(D) when None
    returns  [B, S, H, D] in q's dtype, contiguous
    p = 2^(s - max s) is rounded to q's dtype before it weighs v; the sum that divides is that of p unrounded.
    A score of 2^29 and more may give NaN: the maximum, once scaled, is known to 2^-24 of itself.
    4 B H S T D operations. DaxError("bad_request") for operands that do not fit together, ("unsupported") on a GPU that
    is not a Hopper.
    """
    scale = check(q, k, v, scale)
    q_, keys, values = (x.float().transpose(1, 2) for x in (q, k, v))
    out = torch.empty(q_.shape, dtype=torch.float32, device=q.device)
    for first in range(0, q.shape[1], ROWS_ON_CPU):
        rows = slice(first, first + ROWS_ON_CPU)
        s = q_[:, :, rows] @ keys.transpose(2, 3) * (scale * attention_bf16_hopper.LOG2_E)
        p = torch.exp2(s - s.amax(-1, keepdim=True))
        out[:, :, rows] = (p.to(q.dtype).float() @ values) / p.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(q.dtype).contiguous()


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    return attention_bf16_hopper.launch(*ready(q, k, v, scale))


def attention_bf16_into(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, rooms: list[torch.Tensor]
) -> torch.Tensor:
    """attention_bf16 by the kernel, its tokens written to one of `rooms` after the other; returns the first.

    rooms   [B, s, H, D] each in q's dtype, a head's channels and its heads side by side, of memory that this GPU can
            reach: see attention_int8_into
    """
    operands = ready(q, k, v, scale)
    return attention_bf16_hopper.launch(*operands, rooms[0], token_addresses(rooms, *q.shape[:2]))


def ready(q, k, v, scale) -> tuple:
    """q, k, v as the kernel can read them, and the scale. DaxError where it does not run on them."""
    scale = check(q, k, v, scale)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise DaxError("bad_request", f"attention_bf16: q, k, v are {q.dtype}; it takes bfloat16 or float16")
    if not hopper(compute_capability(q.device)):
        raise DaxError("unsupported", "attention_bf16: runs on compute capability 9.0, with a Triton that has Gluon")
    return *map(attention_bf16_hopper.readable, (q, k, v)), scale


def check(q, k, v, scale) -> float:
    """The scale. DaxError("bad_request") unless the operands fit together."""
    where = "attention_bf16 of " + ", ".join(str(list(x.shape)) for x in (q, k, v))
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise DaxError("bad_request", f"{where}: expected q [B, S, H, D], k and v [B, T, H, D]")
    if 0 in (*q.shape, *k.shape):
        raise DaxError("bad_request", f"{where}: every size must be at least 1")
    if q.shape[3] not in HEAD_DIMS:
        raise DaxError("bad_request", f"{where}: heads of {q.shape[3]}; it takes {' or '.join(map(str, HEAD_DIMS))}")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}".removeprefix("torch.") for x in (q, k, v))
        raise DaxError("bad_request", f"{where}: they are {kinds}; expected one dtype on one device")
    if scale is not None and not 0 < scale < float("inf"):
        raise DaxError("bad_request", f"{where}: scale {scale} must be above 0 and finite")
    return q.shape[3] ** -0.5 if scale is None else scale


def cost(q, k, v, scale=None) -> Cost:
    B, S, H, D = q.shape
    return Cost(4 * B * H * S * k.shape[1] * D, 2 * (2 * q.numel() + k.numel() + v.numel()))


def case(B, S, T, H, D, *, dtype=torch.bfloat16, scale=None, size=1.0, fused=False):
    """fused: q, k and v are slices of one projection."""

    def arguments(generator, device):
        def gaussian(n, heads):
            return (torch.randn(B, n, heads, D, generator=generator, device=device) * size).to(dtype)

        if fused:
            return *gaussian(S, 3 * H).chunk(3, 2), scale
        return gaussian(S, H), gaussian(T, H), gaussian(T, H), scale

    return arguments


ATTENTION_BF16 = define(
    attention_bf16_reference,
    launch,
    cases={
        "one token, one key": case(1, 1, 1, 3, 128),
        "63 in two batches": case(2, 63, 63, 2, 64),
        "257 to 512": case(1, 257, 512, 2, 128),
        "500 to 1361 in two batches": case(2, 500, 1361, 2, 128),
        "128 to 129": case(1, 128, 129, 1, 64, scale=0.3),
        "slices": case(2, 300, 300, 2, 128, fused=True),
        "fp16": case(1, 130, 300, 2, 128, dtype=torch.float16),
        "zeros": case(1, 65, 129, 1, 128, size=0.0),
        "hundreds": case(1, 65, 200, 1, 64, size=100.0),
    },
    cost=cost,
    min_sm=90,
)
