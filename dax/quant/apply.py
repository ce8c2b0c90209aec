"""Linear layers of a model into 8 bits, by rules: every one asked for, or none at all.

All layers are checked before the first is touched, so a refusal leaves the model as it was.
"""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import nn

from dax.edits import Edits
from dax.errors import DaxError
from dax.kernels.quantize import LARGEST
from dax.quant.layers import check_scales, linears
from dax.quant.linear import QuantLinear, check
from dax.quant.scales import Scales
from dax.quant.scheme import SCHEMES, Rule, match, rules_of

GONE = "linear.keep_original = none: the original weights were not kept; load the model again"
PREQUANTIZED = "the checkpoint was quantised before it was loaded: its original weights were never here"
CASTS_INPUT = "time_embedder.linear_1"  # of a diffusers transformer


def quantize_(module: nn.Module, rules: "Mapping[str, str] | str", granularity: str = "token-channel") -> int:
    """Replace the linear layers that the rules name, in any module, in place; returns how many.

    rules   {pattern: scheme or "none"}, see dax.quant.scheme; a scheme's name alone means every layer
    DaxError("bad_request"), before anything is changed, for a rule that matches nothing, zero layers in all, a layer of
    an odd size or one that is quantised or carries an adapter, a module that is itself a linear layer; ("bad_model")
    for weights that are not finite.
    """
    plan = planned(module, {"*": rules} if isinstance(rules, str) else rules, granularity)
    replace(module, plan, Edits(), keep=False)
    refuse_saving(module, Edits())
    return len(plan)


def planned(
    module: nn.Module, rules: Mapping[str, str], granularity: str, static: bool = False, optional: tuple = ()
) -> dict[str, Rule]:
    """{layer: Rule} of what the rules ask for, every layer checked."""
    layers = linears(module)
    if "" in layers:
        raise DaxError("bad_request", "linear: the module is itself a linear layer: use QuantLinear.from_float")
    schemes = match(layers, rules, optional)
    if not schemes:
        raise DaxError("bad_request", f"linear: the rules leave none of {len(layers)} linear layers to quantise")
    plan = {name: Rule(scheme, granularity, static) for name, scheme in schemes.items()}
    for name, rule in plan.items():
        layer = layers[name]
        if name.endswith(CASTS_INPUT) and rule.scheme.startswith("fp8"):
            raise DaxError(
                "bad_request",
                f"linear: diffusers casts what {name} is given to the type of its weight, which {rule.scheme} would "
                f"destroy: add the rule {name}: none",
            )
        if not isinstance(layer, QuantLinear):
            check(layer, name)
        elif layer.rule != rule:
            raise DaxError("bad_request", f"{name} is quantised already: {layer.rule}, asked: {rule}")
    return plan


def replace(
    module: nn.Module,
    plan: Mapping[str, Rule],
    edits: Edits,
    keep: bool,
    scales: "Mapping[str, float] | None" = None,
    device: torch.device | None = None,
) -> Counter:
    """Put quantised twins in place, through the journal; {scheme: layers}.

    keep     move the original weights to host memory for undo(); else they are gone, layer by layer
    scales   {layer: largest input seen}, for static rules
    device   where the twins are made and stay; None: where each layer is
    """
    counts: Counter = Counter()
    for name, rule in plan.items():
        old = module.get_submodule(name)
        counts[rule.scheme] += 1
        if isinstance(old, QuantLinear):
            edits.seal(PREQUANTIZED)
            continue
        home = old.weight.device
        away = device is not None and home != device
        here = deepcopy(old).to(device) if away else old
        new = QuantLinear.from_float(here, rule, input_scale(rule, name, scales))
        parent, _, leaf = name.rpartition(".")
        parent = module.get_submodule(parent)
        if keep:
            edits.call(partial(setattr, parent, leaf, new), partial(put_back, parent, leaf, new, old))
            edits.call(partial(move, old, "cpu"), partial(move_back, old, new, home if away else None))
        else:
            edits.seal(GONE)
            setattr(parent, leaf, new)
    for name, child in module.named_modules():
        if hasattr(child, "fuse_projections"):
            edits.set_attribute(child, "fuse_projections", refuse_fusing(name))
    return counts


def input_scale(rule: Rule, name: str, scales: "Mapping[str, float] | None") -> float | None:
    if not rule.static:
        return None
    if scales is None or name not in scales:
        raise DaxError("bad_request", f"{name}: static activations need its scale: run dax.quant.calibrate on it")
    return scales[name] / LARGEST[getattr(torch, SCHEMES[rule.scheme].activation)]


def put_back(parent: nn.Module, leaf: str, new: QuantLinear, old: nn.Linear) -> None:
    """The original in its twin's place: under the adapter, if one was loaded on top."""
    found = getattr(parent, leaf)
    if getattr(found, "base_layer", None) is new:
        found.base_layer = old
    else:
        setattr(parent, leaf, old)


def move(linear: nn.Linear, device) -> None:
    """A layer's tensors to a device, the same Parameter objects."""
    for parameter in linear.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def move_back(old: nn.Linear, new: QuantLinear, home: torch.device | None) -> None:
    """A kept layer to its home; None: wherever its twin is by now."""
    move(old, new.weight.device if home is None else home)


def refuse_fusing(name: str):
    def fuse_projections(*_, **__):
        raise DaxError("bad_request", f"{name}: projections are fused before quantising, not after: undo() first")

    return fuse_projections


def refuse_saving(module: nn.Module, edits: Edits) -> None:
    """Refuse diffusers' save_pretrained: what it would write loads as weights, codes for numbers and no scales."""

    def save_pretrained(*_, **__):
        raise DaxError(
            "bad_request",
            "save_pretrained: the linear layers have 8 bits, which would load as weights: undo() first, or use "
            "dax.quant.save; dax.quant.register() loads and saves by itself",
        )

    for child in module.modules():
        if hasattr(child, "save_pretrained"):
            edits.set_attribute(child, "save_pretrained", save_pretrained)


def apply_linear(target, facts, part, edits: Edits, scales: Scales | None = None) -> Counter:
    """Quantise the linear layers of a model's transformers as the plan's part `linear` says: {scheme: layers}.

    DaxError as of quantize_. `scales` are for static activations.
    """
    rules, optional = rules_of(part, facts)
    counts: Counter = Counter()
    plans = [
        planned(transformer, rules, part.granularity, part.activation == "static", optional)
        for transformer in target.transformers
    ]
    if scales is not None:
        for transformer in target.transformers:
            check_scales(scales, transformer)
    device = target.transformers[0].device  # a second expert that waits in host memory comes over layer by layer
    for transformer, plan in zip(target.transformers, plans):
        if not all(isinstance(transformer.get_submodule(name), QuantLinear) for name in plan):
            refuse_saving(transformer, edits)
        counts += replace(transformer, plan, edits, part.keep_original == "cpu", scales and scales.amax, device)
    return counts
