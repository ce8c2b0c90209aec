"""Whether DAX's own kernels compute attention on the GPU at hand: each is compared with SDPA once, before it is chosen.

What is compared is small and odd; no kernel is compiled for its number of tokens, so these are the ones that run.
"""

from dataclasses import dataclass
from functools import cache

import torch

from dax.attention import dense, int8
from dax.attention.backend import Backend, Turn
from dax.kernels.hopper import compute_capability
from dax.kernels.language import Absent, gl
from dax.kernels.start import compiled_ahead

MOST_ERROR = {"int8": 0.06, "bf16": 0.006}  # relative L2, against SDPA in fp32; 0.03 and 0.002 are usual
MOST_DRIFT = {"int8": 0.005, "bf16": 0.01}  # of O from 1 where V is 1; bf16's next number above 1 is 1.0078


@dataclass(frozen=True)
class Verdict:
    """problem: why nothing runs, or None.  lesser: what runs instead of the best, and why, or None.

    portable: whether the Triton kernel is the one to run.
    """

    problem: str | None = None
    lesser: str | None = None
    portable: bool = False


def self_check(kernel: str) -> Verdict:
    """Of "int8" or "bf16" on the current GPU. Seconds, once."""
    if not torch.cuda.is_available():
        return Verdict()
    return CHECKS[kernel](torch.cuda.current_device())


@cache
def check_int8(device: int) -> Verdict:
    """Hopper's kernel, else Triton's, else none."""
    here, why = torch.device("cuda", device), None
    if compute_capability(here) == 90:
        if why := no_gluon():
            pass
        elif why := difference("int8", int8.build("int8", portable=False), here):
            why = f"Hopper's kernel failed its self-check ({why})"
        else:
            return Verdict()
    if failure := difference("int8", int8.build("int8", portable=True), here):
        return Verdict(problem="; ".join(filter(None, (why, f"the Triton kernel failed its self-check ({failure})"))))
    return Verdict(lesser=why and f"{why}; the Triton kernel instead", portable=True)


@cache
def check_bf16(device: int) -> Verdict:
    """There is one kernel, and it runs or not."""
    if why := no_gluon():
        return Verdict(problem=why)
    failure = difference("bf16", dense.backend("bf16"), torch.device("cuda", device))
    return Verdict(problem=failure and f"failed its self-check ({failure})")


CHECKS = {"int8": check_int8, "bf16": check_bf16}


def no_gluon() -> str | None:
    if gl is not Absent:
        return None
    import triton

    return f"Triton {triton.__version__} lacks Gluon"


def difference(name: str, kernel: Backend, device) -> str | None:
    """How far attention on small random tensors is from SDPA's, and O from 1 where V is 1; None if close enough."""
    B, S, T, H, D = 1, 300, 400, 2, 128
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, n, H, D, generator=generator, device=device, dtype=torch.bfloat16) for n in (S, T, T))

    def attend(v):
        flat = [x.flatten(2) for x in (q, k, v)]
        operands = kernel.prepare(*flat, H, Turn(), kernel.stats(*flat[1:], H, Turn()))
        return kernel.attend(operands, T).float()

    try:
        with compiled_ahead():
            attend(v)
        wanted = dense.sdpa(q.float(), k.float(), v.float())
        error = ((attend(v) - wanted).norm() / wanted.norm()).item()
        drift = (attend(torch.ones_like(v)) - 1).abs().max().item()
    except Exception as failure:  # a compiler's or a driver's: whatever it is, the kernel does not run here
        first = next(iter(str(failure).splitlines()), "")
        return f"{type(failure).__name__}: {first}"
    if not (error < MOST_ERROR[name] and drift < MOST_DRIFT[name]):
        return (
            f"error {error:.3g} (at most {MOST_ERROR[name]}), V = 1 gives O = 1 within {drift:.2g} "
            f"(at most {MOST_DRIFT[name]})"
        )
    return None
