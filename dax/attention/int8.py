"""DAX's own 8-bit attention as a backend, and the check that it computes attention on the GPU at hand.

int8 queries and keys, fp8 values (fp16 on GPUs without fp8). What all tokens must share, the keys' mean and the values'
range, are its stats; the rest is done token by token, so that operands can travel between ranks in 8 bits.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch

from dax.attention.backend import Backend
from dax.kernels.attention_int8 import ATTENTION_INT8
from dax.kernels.hopper import compute_capability
from dax.kernels.language import Absent, gl
from dax.kernels.qk_quantize import K_QUANTIZE, Q_QUANTIZE, TILE
from dax.kernels.start import compiled_ahead
from dax.kernels.token_stats import TOKEN_AMAX, TOKEN_MEANS
from dax.kernels.v_quantize import V_QUANTIZE

LAYOUT = ((1, 2, 1), (1, 2, 1), (1, 2, TILE), (1, 2, TILE), (1, 2, TILE), (1, None, 1))
MOST_ERROR = 0.06  # relative L2 of the self-check, against SDPA in fp32; 0.03 is usual
MOST_DRIFT = 0.005  # of O from 1 where V is 1


def backend(portable: bool | None = None) -> Backend:
    """The functions of the kernel. portable: the Triton kernel even on Hopper; None: what the self-check found."""
    if not torch.cuda.is_available():
        return build("int8 (reference)", portable=False)
    if portable is None:
        portable = self_check().portable
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


@dataclass(frozen=True)
class Verdict:
    """problem: why nothing runs, or None.  lesser: what runs instead of the best, and why, or None.

    portable: whether the Triton kernel is the one to run.
    """

    problem: str | None = None
    lesser: str | None = None
    portable: bool = False


def self_check() -> Verdict:
    """Which kernel computes attention on the current GPU: Hopper's, else Triton's, else none. Seconds, once."""
    return check_on(torch.cuda.current_device()) if torch.cuda.is_available() else Verdict()


@cache
def check_on(device: int) -> Verdict:
    here = torch.device("cuda", device)
    why = None
    if compute_capability(here) == 90:
        if gl is Absent:
            import triton

            why = f"Triton {triton.__version__} lacks Gluon"
        elif why := difference(here, portable=False):
            why = f"Hopper's kernel failed its self-check ({why})"
        else:
            return Verdict()
    if failure := difference(here, portable=True):
        return Verdict(problem="; ".join(filter(None, (why, f"the Triton kernel failed its self-check ({failure})"))))
    return Verdict(lesser=why and f"{why}; the Triton kernel instead", portable=True)


def difference(device, portable: bool) -> str | None:
    """How far attention on small random tensors is from SDPA's, and O from 1 where V is 1; None if close enough."""
    from dax.attention.backend import Turn
    from dax.attention.dense import sdpa

    B, S, T, H, D = 1, 300, 400, 2, 128  # no kernel is compiled for its number of tokens: these are the ones that run
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, n, H, D, generator=generator, device=device, dtype=torch.bfloat16) for n in (S, T, T))
    kernel = build("int8", portable)

    def attend(v):
        flat = [x.flatten(2) for x in (q, k, v)]
        operands = kernel.prepare(*flat, H, Turn(), kernel.stats(*flat[1:], H))
        return kernel.attend(operands, T).float()

    try:
        with compiled_ahead():
            attend(v)
        wanted = sdpa(q.float(), k.float(), v.float())
        error = ((attend(v) - wanted).norm() / wanted.norm()).item()
        drift = (attend(torch.ones_like(v)) - 1).abs().max().item()
    except Exception as failure:  # a compiler's or a driver's: whatever it is, the kernel does not run here
        first = next(iter(str(failure).splitlines()), "")
        return f"{type(failure).__name__}: {first}"
    if not (error < MOST_ERROR and drift < MOST_DRIFT):
        return f"error {error:.3g} (at most {MOST_ERROR}), V = 1 gives O = 1 within {drift:.2g} (at most {MOST_DRIFT})"
    return None
