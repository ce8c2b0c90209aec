"""Which attention kernel runs where: a table, and two questions asked of it; and what every kernel is once it runs.

Nothing here imports torch, so a plan is resolved for a machine that is not there. `auto` is the fastest exact kernel;
a kernel that changes the numbers beyond rounding is used only when it is asked for by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dax.edits import Edits
from dax.errors import DaxError, nearest
from dax.hardware import Machine, no_kernels

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Kernel:
    """exact: rounding apart, the result of softmax attention. head_dims: sizes of a head it takes, () for any.

    packages: any one of these, best first.  min_sm: the oldest GPU generation; None if a CPU will do
    max_sm: the newest, or None
    """

    exact: bool
    head_dims: tuple[int, ...] | range = ()
    packages: tuple[str, ...] = ()
    min_sm: int | None = None
    max_sm: int | None = None
    install: str = ""


KERNELS = {
    "sdpa": Kernel(exact=True),
    "cudnn": Kernel(exact=True, head_dims=range(8, 129, 8), min_sm=80),
    "flash": Kernel(
        exact=True,
        head_dims=range(8, 257, 8),
        packages=("flash_attn_interface", "flash_attn"),
        min_sm=80,
        install="FlashAttention 3 (Hopper) or pip install flash-attn",
    ),
    "bf16": Kernel(exact=True, head_dims=(64, 128), min_sm=90, max_sm=90),
    "sage": Kernel(
        exact=False,
        head_dims=(64, 96, 128),
        packages=("sageattention",),
        min_sm=80,
        install="pip install sageattention",
    ),
    "int8": Kernel(exact=False, head_dims=(64, 128)),
}
OWN = ("bf16", "int8")  # DAX's own: in Triton or Gluon, and checked before they are chosen


class Turn(NamedTuple):
    """What projected queries and keys go through before they meet: RMS norm over all heads, rotation by position.

    q_weight, k_weight  [C]          of the norms, or None
    cos, sin            [s, D] fp32  of this rank's tokens, every value twice; or None
    """

    q_weight: Any = None
    k_weight: Any = None
    cos: Any = None
    sin: Any = None
    eps: float = 1e-6


@dataclass(frozen=True)
class Backend:
    """A kernel as four functions, so that its operands can travel between ranks in the form it wants them.

    q, k, v are projected queries, keys and values [B, s, C] of this rank's tokens; rows may be strided. Queries and
    keys still have to go through `turn`.
    stats    (k, v, heads, turn) -> (per_tile, range): what prepare must know of all tokens, or None if nothing.
             Over ranks: per_tile is concatenated along dim 1 in token order, range is the elementwise maximum, and
             stats is a function that waits for both
    prepare  (q, k, v, heads, turn, stats, scale) -> operands, a tuple of tensors; it also takes q and k through `turn`
    attend   (operands, num_keys, scale) -> o [B, S, h, D]; scale is 1 / sqrt(D) when None, and the same for both
    attend_into  (operands, num_keys, rooms, scale) -> any of rooms(B, D, dtype), a list of [B, s, h, D], 16-byte
             aligned: the same written there, the tokens one room after the other; rooms may be memory of other GPUs.
             None: it can't
    forms    (B, s, heads, D) -> (shape, dtype) of every operand of s tokens
    written  of the operands, those that prepare writes where its argument `rooms` says, {operand: [B, h, ...] each,
             some heads after the other}, and then returns on the meta device: shape and dtype alone
    layout   of each operand: (dim of heads, dim of tokens or None, tokens per entry)
    num_query_operands  of the operands, how many belong to queries: the first ones
    token_align  a rank's share of the tokens begins at a multiple of it
    name     as summaries tell it
    """

    name: str
    stats: Callable
    prepare: Callable
    attend: Callable
    layout: tuple[tuple[int, int | None, int], ...]
    num_query_operands: int = 1
    token_align: int = 1
    attend_into: Callable | None = None
    forms: Callable | None = None
    written: tuple[int, ...] = ()


def backend_of(kernel: str) -> Backend:
    """The functions of a kernel that runs here. Imports torch."""
    from dax.attention import dense, int8

    return int8.backend() if kernel == "int8" else dense.backend(kernel)


def reason(kernel: str, machine: Machine, dtype: str = "bfloat16", head_dim: int = 128) -> str | None:
    """Why `kernel` does not run there on such tensors, or None if it does.

    A machine that is only a data sheet is taken to have the package.
    """
    return unfit(kernel, machine, dtype, head_dim) or failure(kernel, machine)


def unfit(kernel: str, machine: Machine, dtype: str, head_dim: int) -> str | None:
    """The same before any self-check."""
    if kernel not in KERNELS:
        raise DaxError("bad_request", f"unknown attention kernel {kernel!r}{nearest(kernel, ['auto', *KERNELS])}")
    needs = KERNELS[kernel]
    if needs.min_sm is not None:
        if machine.device != "cuda":
            return "needs an NVIDIA GPU"
        newest = machine.sm if needs.max_sm is None else needs.max_sm
        if machine.sm is not None and not needs.min_sm <= machine.sm <= newest:
            more = " or newer" if needs.max_sm is None else ""
            return f"needs compute capability {needs.min_sm / 10}{more}, {machine.name} has {machine.sm / 10}"
    if needs.packages and not machine.is_data_sheet and package(kernel, machine) is None:
        failed = [
            f"{name} does not import ({machine.broken[name]})" for name in needs.packages if name in machine.broken
        ]
        return "; ".join(failed) or f"package {needs.packages[-1]} is not installed: {needs.install}"
    on_gpu = needs.min_sm is not None or (kernel in OWN and machine.device == "cuda")
    if on_gpu and dtype not in HALF:
        return f"needs bfloat16 or float16, the model is {dtype}"
    if needs.head_dims and head_dim not in needs.head_dims:
        return f"does not take heads of {head_dim}"
    return no_kernels(machine) if kernel in OWN else None


def failure(kernel: str, machine: Machine) -> str | None:
    """What the self-check of a kernel of DAX's own found on a GPU that is here, or None."""
    checked = kernel in OWN and machine.device == "cuda" and not machine.is_data_sheet
    return self_check(kernel).problem if checked else None


def lesser(kernel: str, machine: Machine) -> str | None:
    """What a kernel that runs there runs as instead of its best, and why; None if it is at its best."""
    if kernel not in OWN or machine.device != "cuda" or machine.is_data_sheet:
        return None
    return self_check(kernel).lesser


def passed_over(best: str, machine: Machine, dtype: str, head_dim: int) -> str | None:
    """Why `auto` became `best` and not the kernel of DAX's own, if a self-check failed; None otherwise."""
    if best in ("flash", "bf16") or unfit("bf16", machine, dtype, head_dim):
        return None
    return failure("bf16", machine)


def self_check(kernel: str):
    from dax.attention.self_check import self_check

    return self_check(kernel)


def package(kernel: str, machine: Machine) -> str | None:
    """The package that serves `kernel` there. FlashAttention 3 is for Hopper alone."""
    for name in KERNELS[kernel].packages:
        if name not in (machine.packages or {}) or name in machine.broken:
            continue
        if name == "flash_attn_interface" and machine.sm != 90:
            continue
        return name
    return None


def choose(machine: Machine, dtype: str = "bfloat16", head_dim: int = 128) -> str:
    """What `auto` means there: FlashAttention 3 if it is installed or else DAX's own, on Hopper alone; else cuDNN, from
    Hopper on; else torch's own choice.

    On older cards torch's SDPA is FlashAttention 2 already.
    """
    if package("flash", machine) == "flash_attn_interface" and reason("flash", machine, dtype, head_dim) is None:
        return "flash"
    if reason("bf16", machine, dtype, head_dim) is None:
        return "bf16"
    return choose_of_torch(machine, dtype, head_dim)


def choose_of_torch(machine: Machine, dtype: str, head_dim: int) -> str:
    return "cudnn" if (machine.sm or 0) >= 90 and reason("cudnn", machine, dtype, head_dim) is None else "sdpa"


def kernel_for_cross(kernel: str, machine: Machine, dtype: str = "bfloat16", head_dim: int = 128) -> str:
    """The kernel of cross-attention: the same if it is exact, but for DAX's own, which are made for many keys.

    To 512 text tokens 8 bits save nothing, and `bf16` takes 1.86 ms where cuDNN takes 1.60 (docs/attention.md).
    """
    kernel = kernel if KERNELS[kernel].exact else choose(machine, dtype, head_dim)
    return choose_of_torch(machine, dtype, head_dim) if kernel == "bf16" else kernel


def apply_attention(layers: Iterable, processor: Callable, edits: Edits) -> int:
    """Give each of a model's attention layers `processor`, through diffusers' own door; returns how many."""
    count = 0
    for layer in layers:
        old = layer.get_processor()
        edits.call(
            lambda layer=layer: layer.set_processor(processor), lambda layer=layer, old=old: layer.set_processor(old)
        )
        count += 1
    return count
