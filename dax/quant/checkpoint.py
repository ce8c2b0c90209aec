"""Quantised weights in one safetensors file: codes, fp32 scales bit for bit, and what they were made from.

The header names every quantised layer with its rule and the shapes of the model, so that a file of another model or
version is refused before a tensor is read.
"""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from dax.edits import Edits
from dax.errors import DaxError
from dax.quant.apply import refuse_saving
from dax.quant.layers import linears
from dax.quant.linear import QuantLinear
from dax.quant.scheme import Rule

FORMAT = "dax-quant-2"  # 1: before int8 was rotated


def save(module: nn.Module, path: "str | Path", source: str) -> None:
    """Write a quantised module's tensors as safetensors.

    source   the digest of the model before it was quantised (dax.quant.layers.digest)
    DaxError("bad_request") for a module without a quantised layer, ("cannot_write") if the path refuses.
    """
    from safetensors.torch import save_file

    rules = {name: asdict(layer.rule) for name, layer in linears(module).items() if isinstance(layer, QuantLinear)}
    if not rules:
        raise DaxError("bad_request", "quant.save: no layer of this module is quantised")
    header = {"format": FORMAT, "source": source, "layers": json.dumps(rules), "shapes": json.dumps(shapes(module))}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    part = Path(f"{path}.part")
    try:
        save_file(tensors, part, metadata=header)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DaxError("cannot_write", f"quantised weights {path}: {error}") from None


def load(module: nn.Module, path: "str | Path", source: str | None = None) -> int:
    """Give a module the quantised weights of a file, in place; returns how many layers are quantised.

    module   of the same shapes, still in floating point; the tensors go where it is, to the host from the meta device
    source   if given, the digest the file must say it was made from
    DaxError("bad_model"), with the module as it was, for a file that is none, of another version, model or source.
    """
    from safetensors import SafetensorError, safe_open

    home = str(next((parameter.device for parameter in module.parameters()), "cpu")).replace("meta", "cpu")
    try:
        with safe_open(path, "pt", device=home) as file:
            header = file.metadata() or {}
            check_header(header, module, path, source)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DaxError("bad_model", f"quantised weights {path}: {error}") from None
    rules = {name: Rule(**rule) for name, rule in json.loads(header["layers"]).items()}
    wanted = set(module.state_dict()) | {f"{name}.weight_scale" for name in rules}
    wanted |= {f"{name}.input_scale" for name, rule in rules.items() if rule.static}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))
        raise DaxError("bad_model", f"quantised weights {path}: {len(odd)} tensors differ, the first is {odd[0]}")
    for name, rule in rules.items():
        old = module.get_submodule(name)
        new = QuantLinear(old.in_features, old.out_features, old.bias is not None, rule, "meta")
        module.set_submodule(name, new.train(old.training))
    module.load_state_dict(tensors, assign=True)
    refuse_saving(module, Edits())
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return len(rules)


def check_header(header: dict, module: nn.Module, path, source: str | None) -> None:
    if header.get("format") != FORMAT:
        raise DaxError(
            "bad_model", f"quantised weights {path}: format {header.get('format')!r}, this version reads {FORMAT!r}"
        )
    theirs, ours = json.loads(header["shapes"]), shapes(module)
    if theirs != ours:
        odd = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))[0]
        raise DaxError(
            "bad_model",
            f"quantised weights {path}: of another model: {odd} is {theirs.get(odd)} there, {ours.get(odd)} here",
        )
    if source is not None and header["source"] != source:
        raise DaxError(
            "bad_model", f"quantised weights {path}: made from {header['source'][:12]}, asked for {source[:12]}"
        )


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """{linear layer: [N, K]}: what makes a model this one and not another."""
    return {name: list(layer.weight.shape) for name, layer in linears(module).items()}
