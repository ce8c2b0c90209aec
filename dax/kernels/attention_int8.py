"""softmax(q k^T) v with 8-bit operands: int8 scores, exact in int32; fp8 probabilities and values, summed in fp32.

Probabilities are made without exponentials, by integers, relative to the largest of their row and tile of keys. On
Hopper the kernel is written in Gluon (`attention_int8_hopper`), elsewhere in Triton (`attention_int8_triton`): same
operands, same result up to rounding. `q_quantize`, `k_quantize` and `v_quantize` make the operands.
"""

import torch

from dax.errors import DaxError
from dax.kernels import attention_int8_hopper, attention_int8_triton
from dax.kernels.attention_int8_triton import LARGEST, LOWEST, OCTAVE, SHARPEST
from dax.kernels.hopper import compute_capability, hopper
from dax.kernels.k_quantize import k_quantize_reference
from dax.kernels.op import Cost, define
from dax.kernels.q_quantize import q_quantize_reference
from dax.kernels.rooms import token_addresses
from dax.kernels.v_quantize import ORDER, v_quantize_reference

ROWS_ON_CPU = 1024  # queries whose scores the reference holds at a time
HEAD_DIMS = (64, 128)


def attention_int8_reference(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor,
    num_keys: int,
    portable: bool = False,
) -> torch.Tensor:
    """Attention of quantized operands, not causal, without a mask.

    q, q_scale  [B, H, S, D] int8, [B, H, S] fp32         q_quantize: softmax's scale and log2 e are in the scales
    k, k_scale  [B, H, T, 128, D] int8, [B, H, T] fp32    k_quantize
    v, v_scale  [B, H, T, D, 128] fp8 or fp16, [B, H, D]  v_quantize
    num_keys    of the T 128 that are real
    portable    the Triton kernel even where Hopper's would run
    returns     [B, S, H, D] bf16
    p = 224 2^(s - max s), the maximum over the 128 keys of a tile, with a straight line for 2^x within each octave (at
    most 6 % above it, 4 % on average and so at the maximum too), is rounded to v's dtype; tiles are weighed by
    2^(max s - max of all) in fp32, and the sum of those very p divides the output.
    4 B H S num_keys D operations at 8 bits. DaxError("bad_request") for operands that do not fit together.
    """
    return attention(q, q_scale, k, k_scale, v, v_scale, num_keys, v.dtype).to(torch.bfloat16)


def attention_exact(q, q_scale, k, k_scale, v, v_scale, num_keys, portable=False) -> torch.Tensor:
    """The same with exponentials, not rounded: fp32 [B, S, H, D]."""
    return attention(q, q_scale, k, k_scale, v, v_scale, num_keys)


def attention(q, q_scale, k, k_scale, v, v_scale, num_keys, p_dtype=None):
    check(q, q_scale, k, k_scale, v, v_scale, num_keys)
    tiles = k.shape[2:4]
    keys = k.float().flatten(2, 3).transpose(2, 3)
    restore = torch.tensor([ORDER.index(token) for token in range(16)], device=v.device)
    values = v.float().unflatten(-1, (-1, 16))[..., restore].flatten(-2).transpose(3, 4).flatten(2, 3)
    real = (torch.arange(keys.shape[-1], device=v.device) < num_keys).float()
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for first in range(0, q.shape[2], ROWS_ON_CPU):
        rows = slice(first, first + ROWS_ON_CPU)
        scale = (q_scale[:, :, rows, None] * k_scale[:, :, None])[..., None]
        s = (q[:, :, rows].float() @ keys).unflatten(-1, tiles)  # integers
        top = s.amax(-1, keepdim=True)
        s = s.sub_(top)
        p = probabilities(s, scale).to(p_dtype).float() if p_dtype else torch.exp2(s * scale)
        top = top * scale
        p = p.mul_(torch.exp2(top - top.amax(-2, keepdim=True))).flatten(-2).mul_(real)
        out[:, :, rows] = (p @ values) / p.sum(-1, keepdim=True)
    return (out * v_scale[:, :, None]).transpose(1, 2).contiguous()


def probabilities(s, scale):
    """p of scores less their tile's largest, [..., 128] fp32 integers, each worth scale [..., 1] octaves."""
    sharp = scale.clamp_max(SHARPEST)
    step = (sharp * OCTAVE + 0.5).nan_to_num(0.0).int()
    bits = s.maximum(-(LOWEST / sharp).clamp_max(OCTAVE).trunc()).int().mul_(step)
    bits += torch.tensor(LARGEST).view(torch.int32).item()
    return bits.view(torch.float32)


def launch(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor,
    num_keys: int,
    portable: bool = False,
) -> torch.Tensor:
    check(q, q_scale, k, k_scale, v, v_scale, num_keys)
    operands = [x.contiguous() for x in (q, q_scale, k, k_scale, v, v_scale)]
    sm = compute_capability(q.device)
    if hopper(sm) and not portable and v.dtype == torch.float8_e4m3fn:
        return attention_int8_hopper.launch(*operands, num_keys)
    return attention_int8_triton.launch(*operands, num_keys, sm)


def attention_int8_into(q, q_scale, k, k_scale, v, v_scale, num_keys: int, rooms: list[torch.Tensor]) -> torch.Tensor:
    """attention_int8 by Hopper's kernel, its tokens written to one of `rooms` after the other; returns the first.

    rooms   bf16 [B, s, H, D] each, a head's channels and its heads side by side, of memory that this GPU can reach
    Each row is stored where it belongs while others are computed, over NVLink too: no copy, nothing to wait for.
    """
    check(q, q_scale, k, k_scale, v, v_scale, num_keys)
    operands = [x.contiguous() for x in (q, q_scale, k, k_scale, v, v_scale)]
    rows = token_addresses(rooms, q.shape[0], q.shape[2])
    return attention_int8_hopper.launch(*operands, num_keys, rooms[0], rows)


def check(q, q_scale, k, k_scale, v, v_scale, num_keys) -> None:
    """DaxError("bad_request") unless the operands fit together."""
    shapes = ", ".join(str(list(x.shape)) for x in (q, q_scale, k, k_scale, v, v_scale))
    where = f"attention_int8 of {shapes} and {num_keys} keys"
    if q.ndim != 4 or k.ndim != 5 or v.ndim != 5:
        raise DaxError("bad_request", f"{where}: expected q [B, H, S, D], k [B, H, T, 128, D], v [B, H, T, D, 128]")
    B, H, S, D = q.shape
    T, tile = k.shape[2:4]
    if D not in HEAD_DIMS:
        raise DaxError("bad_request", f"{where}: heads of {D} channels; it takes {' or '.join(map(str, HEAD_DIMS))}")
    wanted = ((B, H, S, D), (B, H, S), (B, H, T, tile, D), (B, H, T), (B, H, T, D, tile), (B, H, D))
    if shapes != ", ".join(str(list(shape)) for shape in wanted) or S == 0 or tile % 128:
        raise DaxError("bad_request", f"{where}: they do not fit together")
    if not T * tile - tile < num_keys <= T * tile:
        raise DaxError("bad_request", f"{where}: {T} tiles hold {T * tile - tile + 1} to {T * tile} keys")
    dtypes = (torch.int8, torch.float32, torch.int8, torch.float32, v.dtype, torch.float32)
    given = (q, q_scale, k, k_scale, v, v_scale)
    if any(x.dtype != dtype for x, dtype in zip(given, dtypes)) or len({x.device for x in given}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}".removeprefix("torch.") for x in given)
        raise DaxError("bad_request", f"{where}: they are {kinds}; expected int8 and fp32 on one device")


def cost(q, q_scale, k, k_scale, v, v_scale, num_keys, portable=False) -> Cost:
    B, H, S, D = q.shape
    moved = sum(x.numel() * x.element_size() for x in (q, q_scale, k, k_scale, v, v_scale)) + 2 * q.numel()
    return Cost(4 * B * H * S * num_keys * D, moved, "int8")


def case(B, S, N, H, D, *, v_dtype=torch.float8_e4m3fn, scale=1.0, portable=False):
    def arguments(generator, device):
        q, k, v = (torch.randn(B, n, H, D, generator=generator, device=device) * scale for n in (S, N, N))
        has_fp8 = device != "cuda" or compute_capability(device) >= 89
        return *arguments_of(q, k, v, v_dtype if has_fp8 else torch.float16), portable

    return arguments


def arguments_of(q, k, v, v_dtype):
    """Operands by the references, for tests."""
    D = q.shape[-1]
    return (
        *q_quantize_reference(q.flatten(2), q.shape[2], D**-0.5),
        *k_quantize_reference(k.flatten(2), k.shape[2], k.mean(1)),
        *v_quantize_reference(v, v.abs().amax(1), v_dtype),
        k.shape[1],
    )


ATTENTION_INT8 = define(
    attention_int8_reference,
    launch,
    cases={
        "one token, one key": case(1, 1, 1, 3, 128),
        "63 in two batches": case(2, 63, 63, 2, 64),
        "257 to 512": case(1, 257, 512, 2, 128),
        "500 to 1361": case(1, 500, 1361, 2, 128),
        "fp16 values": case(1, 130, 300, 2, 64, v_dtype=torch.float16),
        "zeros": case(1, 65, 129, 1, 128, scale=0.0),
        "hundreds": case(1, 65, 200, 1, 64, v_dtype=torch.float16, scale=100.0),
        "portable, 63 in two batches": case(2, 63, 63, 2, 64, portable=True),
        "portable, 500 to 1361": case(1, 500, 1361, 2, 128, portable=True),
    },
    cost=cost,
    exact=attention_exact,
)
