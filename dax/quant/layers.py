"""The linear layers of a module, and a digest that names the model they make."""

import hashlib

import torch
from torch import nn

from dax.errors import DaxError
from dax.quant.scales import Scales

SAMPLES = 64  # values of each weight that enter the digest


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """{name: linear layer}. DaxError("bad_request") where an adapter sits on one: its weights would be cut down too."""
    for name, child in module.named_modules():
        if hasattr(child, "base_layer"):
            raise DaxError(
                "bad_request",
                f"{name} carries an adapter: call fuse_lora() and unload_lora_weights() before quantising, or load the "
                "adapter afterwards",
            )
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def digest(module: nn.Module) -> str:
    """sha256 (hex) of a model: its linear layers' names and shapes and 64 evenly spaced values of each weight.

    The values are taken in bf16, so that loading the same checkpoint in another dtype gives the same digest.
    """
    parts = hashlib.sha256()
    for name, layer in sorted(linears(module).items()):
        weight = layer.weight.detach().flatten()
        step = max(1, len(weight) // SAMPLES)
        sample = weight[::step][:SAMPLES]
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
        parts.update(f"{name} {list(layer.weight.shape)} {sample.tolist()}\n".encode())
    return parts.hexdigest()


def check_scales(scales: Scales, module: nn.Module) -> None:
    """DaxError("bad_model") unless the scales were measured on this model, before it was quantised."""
    if (found := digest(module)) != scales.model:
        raise DaxError("bad_model", f"static scales are of model {scales.model[:12]}, this is {found[:12]}: calibrate")
