"""Attention kernels: which exist, which run here, and one call for all of them.

`backend` decides (no torch needed), `dense` holds those that take q, k and v as they are, `apply_attention` puts one
into a model's attention layers.
"""

from dax.attention.backend import (
    KERNELS,
    Turn,
    apply_attention,
    backend_of,
    choose,
    kernel_for_cross,
    lesser,
    passed_over,
    reason,
)

__all__ = [
    "KERNELS",
    "Turn",
    "apply_attention",
    "attend",
    "available",
    "backend_of",
    "choose",
    "kernel_for_cross",
    "lesser",
    "passed_over",
    "reason",
]


def available() -> dict[str, str | None]:
    """{kernel: None if it runs on this machine in bf16 with heads of 128, else the reason}. Imports torch.

    Without a GPU, `int8` is told as "int8 (reference)": the same arithmetic in plain torch, for tests and trials.
    """
    from dax.hardware import machine

    here = machine()
    shown = {"int8": "int8 (reference)"} if here.device == "cpu" else {}
    return {shown.get(kernel, kernel): reason(kernel, here) for kernel in KERNELS}


def attend(q, k, v, *, kernel: str = "auto", scale: float | None = None):
    """softmax(q k^T * scale) v, not causal, with the named kernel.

    q        [B, S, H, D]  queries; bf16 or fp16 for every kernel but sdpa
    k, v     [B, T, H, D]  keys and values
    scale    1 / sqrt(D) when None
    returns  [B, S, H, D]  in q's dtype
    DaxError("bad_request") for tensors that do not fit together, ("unsupported") for a kernel that does not run here.
    4 B H S T D floating-point operations.
    """
    from dax.attention.call import attend

    return attend(q, k, v, kernel=kernel, scale=scale)
