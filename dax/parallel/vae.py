"""One clip decoded by several ranks: each decodes a strip of columns, exact in its mathematics, without seams.

A convolution of width 3 needs one column of each neighbour: the layers that have one fetch it. The decoder's attention
needs every pixel's key and value: it gathers those. Norms are per pixel and upsampling doubles columns, so all else is
local. Duck-typed on AutoencoderKLWan: convolutions, and blocks with `to_qkv`.
"""

import warnings
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from dax.errors import DaxError
from dax.parallel.topology import ranges, split_sizes, too_narrow
from dax.parallel.wire import as_bytes, gather


class Strips:
    """How the columns of the clip that is being decoded are shared out; `widths` (latent columns) is None outside."""

    def __init__(self, wire):
        self.wire = wire
        self.widths: tuple[int, ...] | None = None

    def halo(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The last column of the left neighbour and the first of the right one; None at the clip's own edges."""
        rank, ranks = self.wire.rank, self.wire.ranks
        columns = {rank - 1: x[..., :1], rank + 1: x[..., -1:]}
        count = x[..., :1].numel() * x.element_size()
        sizes = [count if other in columns else 0 for other in range(ranks)]
        send = torch.cat([as_bytes(column.contiguous()) for other, column in columns.items() if 0 <= other < ranks])
        received = self.wire.wait(self.wire.issue(send, sizes, sizes)).view(x.dtype).view(-1, *x.shape[:-1], 1)
        left = received[0] if rank > 0 else None
        return left, received[-1] if rank < ranks - 1 else None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All columns of a tensor at any resolution, on every rank."""
        scale = x.shape[-1] // self.widths[self.wire.rank]
        return gather(self.wire, x, tuple(width * scale for width in self.widths), -1)


def apply_vae(vae, wire, edits) -> int:
    """Make vae.decode share its work over the ranks of `wire`; returns how many of its layers talk to other ranks.

    Every rank calls decode with the same latents, and every rank gets the whole clip.
    """
    strips, count = Strips(wire), 0
    for layer in vae.decoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.kernel_size[-1] > 1:
            forward = partial(conv_forward, strips, layer, layer.forward)
        elif hasattr(layer, "to_qkv"):
            forward = partial(attention_forward, strips, layer, layer.forward)
        else:
            continue
        edits.set_attribute(layer, "forward", forward)
        count += 1
    edits.set_attribute(vae, "decode", partial(decode, strips, vae, vae.decode))
    return count


def decode(strips: Strips, vae, inner, z: torch.Tensor, return_dict: bool = True):
    """vae.decode. A clip narrower than the ranks are many is decoded whole by each, with a warning.

    DaxError("bad_request") for a tiled VAE.
    """
    if vae.use_tiling or vae.use_slicing:
        raise DaxError("bad_request", "parallel.vae = split: the VAE is tiled or sliced already; choose one of the two")
    if problem := too_narrow(z.shape[-1], strips.wire.ranks):
        warnings.warn(problem, stacklevel=2)
        return inner(z, return_dict=return_dict)
    widths = split_sizes(z.shape[-1], strips.wire.ranks)
    start, end = ranges(widths)[strips.wire.rank]
    strips.widths = widths
    try:
        output = inner(z[..., start:end].contiguous())
        output.sample = strips.gather(output.sample).contiguous()
    finally:
        strips.widths = None
    return output if return_dict else (output.sample,)


def conv_forward(strips: Strips, conv, inner, x: torch.Tensor, *cache):
    """A convolution on a strip: padded as the layer pads the whole clip, with the neighbours' columns at the sides.

    cache  the frames before x, for a causal layer
    """
    if strips.widths is None:
        return inner(x, *cache)
    causal = hasattr(conv, "_padding")  # (W, W, H, H, 2 T, 0): diffusers pads by hand
    padding = list(conv._padding) if causal else [side for axis in reversed(conv.padding) for side in (axis, axis)]
    if cache and cache[0] is not None and padding[4] > 0:
        x = torch.cat([cache[0], x], dim=2)
        padding[4] -= cache[0].shape[2]
    height, (left, right) = x.shape[-2], strips.halo(x)
    x = F.pad(x, padding)
    inside = x[..., padding[2] : padding[2] + height, :]
    if causal:
        inside = inside[:, :, padding[4] :]
    if left is not None:
        inside[..., :1] = left
    if right is not None:
        inside[..., -1:] = right
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    return convolve(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def attention_forward(strips: Strips, block, inner, x: torch.Tensor):
    """The decoder's self-attention of one head: this strip's queries over every column's keys and values."""
    if strips.widths is None:
        return inner(x)
    B, C, T, H, w = x.shape
    frames = block.norm(x.transpose(1, 2).flatten(0, 1))  # [B T, C, H, w]
    q, keys_values = block.to_qkv(frames).split([C, 2 * C], dim=1)
    k, v = strips.gather(keys_values).chunk(2, dim=1)
    q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(1) for part in (q, k, v))
    o = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    o = block.proj(o.squeeze(1).transpose(1, 2).reshape(B * T, C, H, w))
    return o.unflatten(0, (B, T)).transpose(1, 2) + x
