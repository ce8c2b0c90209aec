"""The attention kernels that take q, k and v as they are: torch's SDPA, cuDNN, FlashAttention, SageAttention, and DAX's
own in 16 bits.

All take [B, S, H, D] and give it back. Packages that torch.compile cannot look into are wrapped as operators, so that
a compiled block stays one graph.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dax.attention.backend import Backend, package
from dax.hardware import machine
from dax.kernels.attention_bf16 import ATTENTION_BF16, attention_bf16_into
from dax.kernels.hopper import on_hopper
from dax.kernels.qk_norm_rope import QK_NORM_ROPE

TORCHS_OWN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q, k, v, scale=None):
    """torch's choice of its own kernels: FlashAttention 2 in 16 bits. cuDNN's, which some versions prefer, is an entry
    of its own: two names of one kernel could not be held against each other.
    """
    if not q.is_cuda:
        return scaled_dot_product(q, k, v, scale)
    with sdpa_kernel(TORCHS_OWN):
        return scaled_dot_product(q, k, v, scale)


def cudnn(q, k, v, scale=None):
    """cuDNN's fused attention, and nothing else: torch raises where cuDNN does not take the shape."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product(q, k, v, scale)


def scaled_dot_product(q, k, v, scale):
    """torch's, on [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


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


RUN = {"sdpa": sdpa, "cudnn": cudnn, "flash": flash, "bf16": ATTENTION_BF16, "sage": sage}


def backend(kernel: str) -> Backend:
    """A kernel of this file as attention's functions: the operands are q, k, v themselves, normed and turned."""
    run = RUN[kernel]
    return Backend(
        name=kernel,
        stats=lambda k, v, heads, turn: None,
        prepare=prepare,
        attend=lambda operands, num_keys, scale=None: run(*operands, scale),
        layout=((2, 1, 1),) * 3,
        attend_into=attend_into if kernel == "bf16" and on_hopper() else None,
    )


def attend_into(operands, num_keys, rooms, scale=None):
    """The kernel `bf16`, into several places; q, k and v come to it as copies."""
    B, _, _, D = operands[0].shape
    return attention_bf16_into(*operands, scale, rooms(B, D, operands[0].dtype))


def prepare(q, k, v, heads, turn, stats=None, scale=None):
    """[B, s, C] each -> q, k, v [B, s, H, D], q and k normed and turned in a pass each."""
    q = turned(q, heads, turn.q_weight, turn.cos, turn.sin, turn.eps)
    k = turned(k, heads, turn.k_weight, turn.cos, turn.sin, turn.eps)
    return q, k, v.unflatten(2, (heads, -1))


def turned(x, heads, weight, cos, sin, eps):
    """qk_norm_rope, or a view of x where there is nothing to do."""
    if weight is None and cos is None:
        return x.unflatten(2, (heads, -1))
    return QK_NORM_ROPE(x, heads, weight, cos, sin, eps)
