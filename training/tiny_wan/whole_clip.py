"""The diffusers Wan autoencoder over whole clips at once, for training: the same function, many times faster.

`AutoencoderKLWan` walks a clip in pieces and keeps caches between them, so that a long video fits; a short clip needs
neither. Here time is folded into the batch, and a causal 3x3x3 convolution becomes a 2D one over the channels of the
frame and the two before it, which cuDNN runs at full speed and torch.compile can fuse around. The modules are read, not
changed: gradients reach their own parameters. `tests/training/test_whole_clip.py` holds the two to each other.
"""

import torch
import torch.nn.functional as F


def encode(vae, clip):
    """Mean and log variance, each [B, 16, 1 + T / 4, H / 8, W / 8], of clips [B, 3, 1 + T, H, W] in [-1, 1]."""
    encoder, batch = vae.encoder, len(clip)
    x = causal(encoder.conv_in, clip.transpose(1, 2).flatten(0, 1), batch)
    for layer in encoder.down_blocks:
        x = (down if hasattr(layer, "resample") else residual)(layer, x, batch)
    x = middle(encoder.mid_block, x, batch)
    x = causal(encoder.conv_out, activate(encoder.norm_out, x), batch)
    x = pointwise(vae.quant_conv, x)
    return x.unflatten(0, (batch, -1)).transpose(1, 2).chunk(2, 1)


def decode(vae, z):
    """Clips [B, 3, 1 + T, H, W], not clamped, of latents [B, 16, 1 + T / 4, H / 8, W / 8]."""
    decoder, batch = vae.decoder, len(z)
    x = pointwise(vae.post_quant_conv, z.transpose(1, 2).flatten(0, 1))
    x = middle(decoder.mid_block, causal(decoder.conv_in, x, batch), batch)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = residual(layer, x, batch)
        if block.upsamplers is not None:
            x = up(block.upsamplers[0], x, batch)
    x = causal(decoder.conv_out, activate(decoder.norm_out, x), batch)
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def causal(conv, x, batch):
    """A causal convolution of frames [B * T, C, H, W], kernel (3, k, k), zeros before the first frame."""
    x = x.unflatten(0, (batch, -1))
    past = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    window = torch.cat([past[:, :-2], past[:, 1:-1], x], 2).flatten(0, 1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    return F.conv2d(window, weight, conv.bias, padding=weight.shape[-1] // 2)


def pointwise(conv, x):
    return F.conv2d(x, conv.weight[:, :, 0], conv.bias)


def activate(norm, x):
    return F.silu(F.normalize(x.float(), dim=1).to(x.dtype) * norm.scale * norm.gamma.view(1, -1, 1, 1))


def residual(layer, x, batch):
    """Norm, SiLU and convolution twice, beside a shortcut."""
    shortcut = pointwise(layer.conv_shortcut, x) if hasattr(layer.conv_shortcut, "weight") else x
    x = causal(layer.conv1, activate(layer.norm1, x), batch)
    return shortcut + causal(layer.conv2, activate(layer.norm2, x), batch)


def middle(block, x, batch):
    x = residual(block.resnets[0], x, batch)
    for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
        x = residual(layer, attention(x[:, :, None])[:, :, 0], batch)
    return x


def down(layer, x, batch):
    """Half the rows and columns; `downsample3d` then keeps the first frame and halves the rest."""
    x = layer.resample(x)
    if layer.mode == "downsample3d":
        x = x.unflatten(0, (batch, -1))
        window = torch.cat([x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]], 2)
        weight = layer.time_conv.weight.transpose(1, 2).flatten(1, 2)
        rest = F.conv2d(window.flatten(0, 1), weight, layer.time_conv.bias).unflatten(0, (batch, -1))
        x = torch.cat([x[:, :1].to(rest.dtype), rest], 1).flatten(0, 1)
    return x


def up(layer, x, batch):
    """Twice the rows and columns; `upsample3d` first makes two frames of every one after the first."""
    if layer.mode == "upsample3d":
        frames = x.unflatten(0, (batch, -1))
        pairs = causal(layer.time_conv, frames[:, 1:].flatten(0, 1), batch)
        pairs = pairs.unflatten(1, (2, -1)).flatten(0, 1).unflatten(0, (batch, -1))
        x = torch.cat([frames[:, :1].to(pairs.dtype), pairs], 1).flatten(0, 1)
    return layer.resample(x)
