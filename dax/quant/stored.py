"""Linear layers that have 8 bits before a plan meets them: as a checkpoint says, and what of a plan they leave. Pure.

A folder that `save_pretrained` wrote under `dax.quant.register()` holds codes and scales, not the weights they were
made from. A plan may ask for the same 8 bits and for more layers; what it asks otherwise cannot be had. Without torch.
"""

from collections import Counter
from collections.abc import Mapping

from dax.errors import DaxError
from dax.facts import Facts
from dax.plan import Linear
from dax.quant.scheme import NONE, SCHEMES, Rule, check_rotation, match, rules_of


def stored_layers(config: Mapping, facts: Facts, part: str = "transformer") -> dict[str, Rule]:
    """{layer: Rule} of what a transformer's config says was saved in 8 bits; {} for one in floating point.

    DaxError("bad_model") for a quantisation that is not DAX's, or rules that this model does not fit.
    """
    found, where = config.get("quantization_config"), f"{part}/config.json: quantization_config"
    if found is None:
        return {}
    if not isinstance(found, dict) or found.get("quant_method") != "dax":
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise DaxError("bad_model", f"{where}: quant_method = {method!r}; supported: 'dax', or weights as published")
    rules, granularity = found.get("rules"), found.get("granularity", "token-channel")
    if not isinstance(rules, dict) or not all(isinstance(scheme, str) for scheme in rules.values()):
        raise DaxError("bad_model", f"{where}: rules = {rules!r} must be a mapping of layer to scheme")
    if odd := found.keys() - {"quant_method", "rules", "granularity", "rotation"}:
        raise DaxError("bad_model", f"{where}: unknown key {min(odd)!r}")
    if not isinstance(granularity, str):
        raise DaxError("bad_model", f"{where}: granularity = {granularity!r} must be a word")
    try:
        layers = {name: Rule(scheme, granularity) for name, scheme in match(facts.linear_layers(), rules).items()}
    except DaxError as error:
        raise DaxError("bad_model", f"{where}: {error}") from None
    if not layers:
        raise DaxError("bad_model", f"{where}: its rules name no layer")
    check_rotation(found.get("rotation"), where)
    return layers


def stored_tensors(layers: Mapping[str, Rule], shapes: Mapping[str, tuple]) -> tuple[dict[str, tuple], dict[str, str]]:
    """({scale: shape} beside the tensors of the model, {tensor: dtype in safetensors' words} of codes and scales)."""
    scales = {f"{name}.weight_scale": shapes[f"{name}.weight"][:1] for name in layers}
    words = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}
    codes = {f"{name}.weight": words[SCHEMES[rule.scheme].weight] for name, rule in layers.items()}
    return scales, codes | dict.fromkeys(scales, "F32")


def held_to(part: Linear, facts: Facts, stored: Mapping[str, Rule]) -> tuple[Linear, list[str], list[str]]:
    """(the plan's part as it can be had, notes, fallbacks) on a model whose `stored` layers have 8 bits already.

    DaxError("bad_request") where other 8 bits are asked for than a layer has.
    """
    if not stored:
        return part, [], []
    rules, optional = rules_of(part, facts)
    asked = match(facts.linear_layers(), rules, optional) if part.active else {}
    static = part.activation == "static"
    some = next(iter(stored.values()))
    for name, scheme in asked.items():
        rule = stored.get(name, Rule(scheme, some.granularity, some.static))
        if Rule(scheme, part.granularity, static) != rule:
            raise DaxError(
                "bad_request",
                f"linear: {name} is asked as {scheme}, {part.granularity}{', static' * static}, and the checkpoint's "
                f"layers are quantised already: {rule.scheme}, {rule.granularity}{', static' * rule.static}: ask for "
                "that, or load the original weights",
            )
    count = " and ".join(f"{n} {s}" for s, n in counted(stored).items())
    left = {name: rule.scheme for name, rule in stored.items() if name not in asked}
    if not left:
        return part, [f"linear.scheme: {count} linear layers were saved in 8 bits: left as they are"], []
    part = part.model_copy(update={"granularity": some.granularity, **scheme_and_rules(asked | left, facts)})
    said = f"linear.scheme = none: {len(left)} of {len(facts.linear_layers())} linear layers were saved in 8 bits"
    return part, [], [f"{said} ({count}), which cannot be taken back; as saved instead"]


def counted(stored: Mapping[str, Rule]) -> dict[str, int]:
    """{scheme: layers}."""
    return dict(Counter(rule.scheme for rule in stored.values()))


def scheme_and_rules(schemes: Mapping[str, str], facts: Facts) -> dict:
    """The plan's keys that give exactly these layers these schemes: the usual one, and a rule for each that differs."""
    names = facts.linear_layers()
    usual = Counter(schemes.get(name, NONE) for name in names).most_common(1)[0][0]
    given = match(names, *rules_of(Linear(scheme=usual), facts))
    wanted = {name: schemes.get(name, NONE) for name in names}
    return {"scheme": usual, "rules": {name: s for name, s in wanted.items() if s != given.get(name, NONE)}}
