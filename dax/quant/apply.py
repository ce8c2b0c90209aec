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

FUSE_FIRST = "projections are fused before quantising, not after: undo() first"
NOT_WEIGHTS = (
    "the linear layers have 8 bits, which would load as weights: undo() first, or use dax.quant.save; "
    "dax.quant.register() loads and saves by itself"
)
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


def apply_linear(target, facts, part, edits: Edits, scales: Scales | None = None) -> Counter:
    """Quantise the linear layers of a model's transformers as the plan's part `linear` says: {scheme: layers}.

    DaxError as of quantize_, and ("bad_request") for static activations without a scale. `scales` are for those.
    """
    rules, optional = rules_of(part, facts)
    static, keep = part.activation == "static", part.keep_original == "cpu"
    plans = [planned(each, rules, part.granularity, static, optional) for each in target.transformers]
    if scales is not None:
        for transformer in target.transformers:
            check_scales(scales, transformer)
    amax = scales.amax if scales else {}
    input_scales = [scales_of(each, plan, amax) for each, plan in zip(target.transformers, plans)]
    device = target.transformers[0].device  # a second expert that waits in host memory comes over layer by layer
    counts: Counter = Counter()
    for transformer, plan, static_scales in zip(target.transformers, plans, input_scales):
        if not all(isinstance(transformer.get_submodule(name), QuantLinear) for name in plan):
            refuse_saving(transformer, edits if keep else Edits())
        counts += replace(transformer, plan, edits, keep, static_scales, device)
    return counts


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


def scales_of(module: nn.Module, plan: Mapping[str, Rule], amax: Mapping[str, float]) -> dict[str, float]:
    """{layer: input scale} of the static layers that are not quantised yet, from {layer: largest input seen}."""
    found = {}
    for name, rule in plan.items():
        if rule.static and not isinstance(module.get_submodule(name), QuantLinear):
            if name not in amax:
                raise DaxError(
                    "bad_request", f"{name}: static activations need its scale: run dax.quant.calibrate on it"
                )
            found[name] = amax[name] / LARGEST[getattr(torch, SCHEMES[rule.scheme].activation)]
    return found


def replace(
    module: nn.Module,
    plan: Mapping[str, Rule],
    edits: Edits,
    keep: bool,
    input_scales: "Mapping[str, float] | None" = None,
    device: torch.device | None = None,
) -> Counter:
    """Put quantised twins in the places of a plan's layers; {scheme: layers}.

    keep           move the original weights to host memory for undo(); else they are gone, layer by layer
    input_scales   {layer: input scale}, of static rules
    device         where the twins are made and stay; None: where each layer is
    """
    for name, rule in plan.items():
        old = module.get_submodule(name)
        if isinstance(old, QuantLinear):
            edits.seal(PREQUANTIZED)
            continue
        here = old if device in (None, old.weight.device) else deepcopy(old).to(device)
        new = QuantLinear.from_float(here, rule, (input_scales or {}).get(name))
        if keep:
            swap_kept(module, name, old, new, edits)
        else:
            edits.seal(GONE)
            module.set_submodule(name, new)
    refuse(module, "fuse_projections", FUSE_FIRST, edits if keep else Edits())
    return Counter(rule.scheme for rule in plan.values())


def swap_kept(module: nn.Module, name: str, old: nn.Linear, new: QuantLinear, edits: Edits) -> None:
    """The twin in a layer's place, and the layer into host memory: undone, it lies where it did."""
    parent, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent)
    home = None if old.weight.device == new.weight.device else old.weight.device
    edits.call(partial(setattr, parent, leaf, new), partial(put_back, parent, leaf, new, old))
    edits.call(partial(move, old, "cpu"), partial(move_back, old, new, home))


def put_back(parent: nn.Module, leaf: str, new: QuantLinear, old: nn.Linear) -> None:
    """The original in its twin's place: under the adapter, if one was loaded on top."""
    found = getattr(parent, leaf)
    if getattr(found, "base_layer", None) is new:
        found.base_layer = old
    else:
        setattr(parent, leaf, old)


def move(linear: nn.Linear, device, dtype: torch.dtype | None = None) -> None:
    """A layer's tensors to a device, and to a dtype if one is given; the same Parameter objects."""
    for parameter in linear.parameters(recurse=False):
        parameter.data = parameter.data.to(device=device, dtype=dtype)


def move_back(old: nn.Linear, new: QuantLinear, home: torch.device | None) -> None:
    """A kept layer to its home; None: wherever its twin is by now. Cast, if the model was cast meanwhile."""
    cast = None if new.float_dtype == old.weight.dtype else new.float_dtype
    move(old, new.weight.device if home is None else home, cast)


def refuse_saving(module: nn.Module, edits: Edits) -> None:
    """Refuse diffusers' save_pretrained: what it would write loads as weights, codes for numbers and no scales."""
    refuse(module, "save_pretrained", NOT_WEIGHTS, edits)


def refuse(module: nn.Module, method: str, why: str, edits: Edits) -> None:
    """Make a method of a module, and of all below that have it, raise DaxError("bad_request")."""
    for name, child in module.named_modules():
        if hasattr(child, method):
            edits.set_attribute(child, method, partial(refusal, f"{name or method}: {why}"))


def refusal(text: str, *_, **__):
    raise DaxError("bad_request", text)
