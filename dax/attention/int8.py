"""DAX's own 8-bit attention as a backend.

int8 queries and keys, fp8 values (fp16 on GPUs without fp8). What all tokens must share, the keys' mean and the values'
range, are its stats; the rest is done token by token, so that operands can travel between ranks in 8 bits.
"""

from functools import partial

import torch

from dax.attention.backend import Backend
from dax.kernels.attention_int8 import ATTENTION_INT8, attention_int8_into
from dax.kernels.hopper import compute_capability, on_hopper
from dax.kernels.k_quantize import K_QUANTIZE, TILE, k_quantize_into, num_tiles
from dax.kernels.q_quantize import Q_QUANTIZE, q_quantize_into
from dax.kernels.token_stats import KEY_MEANS, TOKEN_AMAX
from dax.kernels.v_quantize import V_QUANTIZE, v_quantize_into

LAYOUT = ((1, 2, 1), (1, 2, 1), (1, 2, TILE), (1, 2, TILE), (1, 2, TILE), (1, None, 1))
CODES = (0, 2, 4)  # of the operands; between them, their scales


def backend(portable: bool | None = None) -> Backend:
    """The functions of the kernel. portable: the Triton kernel even on Hopper; None: what the self-check found."""
    if not torch.cuda.is_available():
        return build("int8 (reference)", portable=False)
    if portable is None:
        from dax.attention.self_check import self_check

        portable = self_check("int8").portable
    return build("int8 (Triton)" if portable else "int8", portable)


def build(name: str, portable: bool) -> Backend:
    def attend(operands, num_keys, scale=None):
        return ATTENTION_INT8(*operands, num_keys, portable)

    def attend_into(operands, num_keys, rooms, scale=None):
        B, _, _, D = operands[0].shape
        return attention_int8_into(*operands, num_keys, rooms(B, D, torch.bfloat16))

    return Backend(
        name,
        stats,
        partial(prepare, dtype=value_dtype()),
        attend,
        layout=LAYOUT,
        num_query_operands=2,
        token_align=TILE,
        attend_into=attend_into if on_hopper() and not portable else None,
        forms=partial(forms, dtype=value_dtype()),
        written=CODES,
    )


def forms(B, s, heads, D, dtype=torch.float8_e4m3fn):
    """(shape, dtype) of what `prepare` makes of s tokens."""
    T = num_tiles(s)
    return (
        ((B, heads, s, D), torch.int8),
        ((B, heads, s), torch.float32),
        ((B, heads, T, TILE, D), torch.int8),
        ((B, heads, T), torch.float32),
        ((B, heads, T, D, TILE), dtype),
        ((B, heads, D), torch.float32),
    )


def stats(k, v, heads, turn):
    """Means of the keys [B, T, H, D] over each 128 tokens, and the largest magnitudes of the values [B, H, D]; fp32."""
    return KEY_MEANS(k, heads, turn.k_weight, turn.cos, turn.sin, turn.eps), TOKEN_AMAX(v.unflatten(2, (heads, -1)))


def prepare(q, k, v, heads, turn, stats, scale=None, dtype=torch.float8_e4m3fn, rooms=None):
    """[B, s, C] each -> q, q scales, k, k scales, v, v scales, as attention_int8 takes them.

    The keys are shifted by the mean of the means, though of a sample: any shift gives the same attention.
    The queries need no stats: where these come from other ranks, that hides their way.
    rooms   where the codes are written, and not returned: see Backend.written
    """
    v, (q_weight, k_weight, *angles) = v.unflatten(2, (heads, -1)), turn
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    if rooms is None:
        q = Q_QUANTIZE(q, heads, scale, q_weight, *angles)
        means, amax = stats() if callable(stats) else stats
        return *q, *K_QUANTIZE(k, heads, means.mean(1), k_weight, *angles), *V_QUANTIZE(v, amax, dtype)
    q_scale = q_quantize_into(q, heads, scale, q_weight, *angles, rooms[0])
    means, amax = stats() if callable(stats) else stats
    k_scale = k_quantize_into(k, heads, means.mean(1), k_weight, *angles, rooms[2])
    v_scale = v_quantize_into(v, amax, rooms[4])
    shapes = forms(v.shape[0], v.shape[1], heads, v.shape[3], dtype)
    q, k, v = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in (shapes[i] for i in CODES))
    return q, q_scale, k, k_scale, v, v_scale


def value_dtype() -> torch.dtype:
    """fp8, or fp16 on a GPU without it."""
    return torch.float16 if torch.cuda.is_available() and compute_capability(None) < 89 else torch.float8_e4m3fn
