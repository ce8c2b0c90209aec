"""A LoRA added to a Wan transformer's weights: w + scale * B A, in place, before anything is quantised.

Needs no peft and reads safetensors alone. diffusers' own converters turn the formats in use into one; what is then not
a pair of matrices of a layer this model has is refused, where loading it as an adapter would silently do nothing.
"""

import json
from pathlib import Path

import torch
from torch import nn

from dax.errors import DaxError, nearest
from dax.quant.linear import QuantLinear

PAIR = (".lora_A.weight", ".lora_B.weight")


def fuse_lora(transformer: nn.Module, path: "str | Path", scale: float = 1.0) -> int:
    """Add a LoRA file to the weights of a transformer, in place; returns how many layers it changed.

    scale   how much of it; 0 leaves the weights as they are
    DaxError("bad_model"), before any weight is changed: not a safetensors file, no key matches or only some do, wrong
    shapes, an unfinished pair, values that are not finite, differences of whole tensors; ("bad_request") for a layer
    that is quantised already.
    """
    pairs = read_pairs(path)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    unknown = [name for name in pairs if name not in layers]
    if unknown:
        raise DaxError(
            "bad_model",
            f"LoRA {path}: {len(pairs) - len(unknown)} of {len(pairs)} layers matched; this model has no "
            f"{unknown[0]!r}{nearest(unknown[0], layers)}",
        )
    for name, (down, up, _) in pairs.items():
        layer = layers[name]
        if isinstance(layer, QuantLinear):
            raise DaxError("bad_request", f"LoRA {path}: {name} is quantised already: fuse first, then quantise")
        wanted = (layer.out_features, layer.in_features)
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != wanted or up.shape[1] != down.shape[0]:
            raise DaxError(
                "bad_model",
                f"LoRA {path}: {name} is {list(wanted)}, "
                f"the file's matrices are {list(up.shape)} and {list(down.shape)}",
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise DaxError("bad_model", f"LoRA {path}: {name} has NaN or infinity in it: the file is damaged")
    with torch.no_grad():
        for name, (down, up, factor) in pairs.items():
            weight = layers[name].weight
            down, up = (matrix.to(weight.device, torch.float32) for matrix in (down, up))
            weight.copy_(weight.float() + scale * factor * (up @ down))
    return len(pairs)


def read_pairs(path: "str | Path") -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """{layer: (A [r, K], B [N, r], what their product counts)} of a file."""
    from diffusers import WanPipeline
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}
        dropped = [name for name in state if name.endswith((".diff", ".diff_b")) and state[name].any()]
        state = WanPipeline.lora_state_dict(state)
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        names = list(dict.fromkeys(key[: -len(PAIR[0])] for key in state if key.endswith(PAIR)))
        left = set(state) - {name + end for name in names for end in PAIR}
        torn = [name for name in names if not all(name + end in state for end in PAIR)]
        if not names or left or torn or dropped:
            odd = sorted([*left, *torn, *dropped])[:1] or ["no pair of matrices at all"]
            raise DaxError("bad_model", f"LoRA {path}: {len(names)} layers, and what cannot be fused: {odd[0]}")
        down_up = {name: [state[name + end] for end in PAIR] for name in names}
        return {name: (*pair, strength(header, name, len(pair[0]))) for name, pair in down_up.items()}
    except (OSError, SafetensorError) as error:
        raise DaxError(
            "bad_model", f"LoRA {path}: not a safetensors file ({error}); pickled ones are not read"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise DaxError("bad_model", f"LoRA {path}: not of a format diffusers knows for Wan ({error})") from None


def strength(header: dict, name: str, rank: int) -> float:
    """What B A of a layer counts: alpha / rank; rank-stabilised, alpha / sqrt(rank); 1 where the header says nothing.

    header   peft's config as diffusers writes it; `alpha_pattern` names layers by the end of their names
    """
    alpha = header.get("transformer.lora_alpha") or rank
    for pattern, its_own in (header.get("transformer.alpha_pattern") or {}).items():
        if f".{name}".endswith(f".{pattern}"):
            alpha = its_own
    return alpha / (rank**0.5 if header.get("transformer.use_rslora") else rank)
