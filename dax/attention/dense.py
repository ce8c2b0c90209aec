"""The attention kernels that are other people's: torch's SDPA, cuDNN, FlashAttention, SageAttention.

All take [B, S, H, D] and give it back. Packages that torch.compile cannot look into are wrapped as operators, so that
a compiled block stays one graph.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dax.attention.backend import KERNELS, choose, package, reason
from dax.errors import DaxError
from dax.hardware import machine


def sdpa(q, k, v, scale=None):
    """torch's own choice of kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def cudnn(q, k, v, scale=None):
    """cuDNN's fused attention, and nothing else: torch raises where cuDNN does not take the shape."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scale)


@torch.library.custom_op("dax::flash_attention", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """FlashAttention 3 where it is installed on Hopper, else 2."""
    out = flash_function()(q, k, v, softmax_scale=scale, causal=False)
    return out[0] if isinstance(out, tuple) else out  # some builds of 3 return the log-sum-exp too


@torch.library.custom_op("dax::sage_attention", mutates_args=())
def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """SageAttention's pick for this GPU: int8 q k, fp8 or fp16 p v. Lossy: about 4 % on the output of one attention."""
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale)


@flash.register_fake
@sage.register_fake
def _(q, k, v, scale=None):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@cache
def flash_function():
    name = package("flash", machine("cuda"))
    if name == "flash_attn_interface":
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    return flash_attn_func


RUN = {"sdpa": sdpa, "cudnn": cudnn, "flash": flash, "sage": sage}


def attend(q, k, v, *, kernel: str = "auto", scale: float | None = None):
    """`dax.attention.attend`, see there."""
    check_operands(q, k, v)
    here, dtype, head_dim = machine(q.device.type), str(q.dtype).removeprefix("torch."), q.shape[-1]
    if kernel == "auto":
        kernel = choose(here, dtype, head_dim)
    problem = reason(kernel, here, dtype, head_dim)
    if problem:
        runs = [name for name in KERNELS if reason(name, here, dtype, head_dim) is None]
        raise DaxError("unsupported", f"attention kernel {kernel!r} {problem}; these run here: {', '.join(runs)}")
    return RUN[kernel](q, k, v, scale)


def check_operands(q, k, v) -> None:
    """DaxError("bad_request") unless the three are [B, S, H, D], [B, T, H, D] twice, of one dtype on one device."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise DaxError("bad_request", f"attend: {shapes}: expected [B, S, H, D] and twice [B, T, H, D]")
    if not q.is_floating_point() or len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise DaxError("bad_request", f"attend: q, k, v are {kinds}: give one floating dtype on one device")
