"""DAX's own 8-bit attention as a backend.

int8 queries and keys, fp8 values (fp16 on GPUs without fp8). What all tokens must share, the keys' mean and the values'
range, are its stats; the rest is done token by token, so that operands can travel between ranks in 8 bits.
"""

from functools import partial

import torch

from dax.attention.backend import Backend
from dax.kernels.attention_int8 import ATTENTION_INT8
from dax.kernels.hopper import compute_capability
from dax.kernels.qk_quantize import K_QUANTIZE, Q_QUANTIZE, TILE
from dax.kernels.token_stats import TOKEN_AMAX, TOKEN_MEANS
from dax.kernels.v_quantize import V_QUANTIZE

LAYOUT = ((1, 2, 1), (1, 2, 1), (1, 2, TILE), (1, 2, TILE), (1, 2, TILE), (1, None, 1))


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

    prepared = partial(prepare, dtype=value_dtype())
    return Backend(name, stats, prepared, attend, layout=LAYOUT, num_query_operands=2, token_align=TILE)


def stats(k, v, heads, turn=None):
    """Means of the keys [B, T, H, D] over each 128 tokens, and the largest magnitudes of the values [B, H, D]; fp32."""
    return TOKEN_MEANS(k.unflatten(2, (heads, -1))), TOKEN_AMAX(v.unflatten(2, (heads, -1)))


def prepare(q, k, v, heads, turn, stats, scale=None, dtype=torch.float8_e4m3fn):
    """[B, s, C] each -> q, q scales, k, k scales, v, v scales, as attention_int8 takes them.

    The keys are shifted by the mean of the means, which need not be exact: any shift gives the same attention.
    The queries need no stats: where these come from other ranks, that hides their way.
    """
    k, v = k.unflatten(2, (heads, -1)), v.unflatten(2, (heads, -1))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q = Q_QUANTIZE(q, heads, scale, turn.q_weight, turn.cos, turn.sin, turn.eps)
    means, amax = stats() if callable(stats) else stats
    return *q, *K_QUANTIZE(k, means.mean(1)), *V_QUANTIZE(v, amax, dtype)


def value_dtype() -> torch.dtype:
    """fp8, or fp16 on a GPU without it."""
    return torch.float16 if torch.cuda.is_available() and compute_capability(None) < 89 else torch.float8_e4m3fn
