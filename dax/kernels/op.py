"""What belongs to one operation: its plain torch reference, its GPU kernel, its test cases, its cost.

The reference is the specification: it runs on the CPU, is the oracle of the test and gives the shapes of the outputs
under torch.compile. Defining an op registers it with torch.library, so that a compiled block stays one graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations of `dtype` (MACs count two) and bytes moved."""

    flops: float
    bytes: float
    dtype: str = "bf16"


@dataclass(frozen=True)
class Op:
    """One operation. Calling it runs the kernel on a GPU and the reference on a CPU.

    reference  plain torch, any device; fp32 inside
    launch     the same signature, annotated; starts the GPU kernel on the current stream
    cases      {name: (generator, device) -> arguments}: shapes worth a test, odd ones on purpose
    cost       the same signature; tensors may be on the meta device
    min_sm     the oldest GPU generation the kernel runs on
    exact      the same signature; what decoded outputs approximate, in fp32. None: the reference on fp32 arguments
    decode     (the outputs) -> fp32 numbers to compare, where codes and scales are not
    """

    name: str
    reference: Callable
    launch: Callable
    cases: dict[str, Callable]
    cost: Callable[..., Cost]
    min_sm: int
    run: Callable
    exact: Callable | None = None
    decode: Callable | None = None

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def define(
    reference: Callable,
    launch: Callable,
    *,
    cases: dict[str, Callable],
    cost: Callable[..., Cost],
    min_sm: int = 80,
    exact: Callable | None = None,
    decode: Callable | None = None,
) -> Op:
    """Register `reference` and `launch` as the operator torch.ops.dax.<name of the reference without _reference>.

    Neither may return an input or a view of one: torch.library's rule.
    """
    name = reference.__name__.removesuffix("_reference")
    run = torch.library.custom_op(f"dax::{name}", launch, mutates_args=(), device_types="cuda")
    run.register_kernel("cpu")(reference)
    run.register_fake(reference)
    OPS[name] = Op(name, reference, launch, cases, cost, min_sm, run, exact, decode)
    return OPS[name]
