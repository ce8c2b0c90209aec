"""The knobs a tune turns, each with its settings: attention, linears, step cache, guidance. What does not run here is
left out by name.
"""

from dax.attention import KERNELS
from dax.attention import reason as attention_reason
from dax.hardware import Machine
from dax.plan import Plan
from dax.quant.scheme import reason as linear_reason
from dax.tune.search import Option

PERIODS = (2, 3, 4, 6)  # of an even mask
PRESETS = ("balanced", "fast")  # what most people would take instead
SCHEMES = ("int8", "fp8")
SPARED = (0.2, 0.4)  # share of the last steps without guidance


def knobs(machine: Machine, dtype: str, head_dim: int, steps: int, budgets, calibration: str, rule_lists) -> tuple:
    """([the options of each knob, the neutral one first], [what is left out, and why]).

    budgets       (of step plans that the calibration holds, why there are none): without, masks of even steps instead
    rule_lists    {scheme: [{pattern: none}]} of what sensitivity found
    """
    left_out = []
    attention = [Option("attention", "exact attention", {})]
    for kernel, needs in KERNELS.items():
        if needs.exact:
            continue
        if problem := attention_reason(kernel, machine, dtype, head_dim):
            left_out.append(f"attention.kernel = {kernel}: {problem}")
        else:
            attention.append(Option("attention", f"{kernel} attention", {"attention.kernel": kernel}))
    linear = [Option("linear", "bf16 linears", {})]
    for scheme in SCHEMES:
        if problem := linear_reason(scheme, machine):
            left_out.append(f"linear.scheme = {scheme}: {problem}")
            continue
        linear.append(Option("linear", f"{scheme} linears", {"linear.scheme": scheme}))
        for spared in rule_lists.get(scheme, ()):
            name = f"{scheme} linears but {len(spared)} groups"
            linear.append(Option("linear", name, {"linear.scheme": scheme, "linear.rules": spared}))
    cache = [Option("cache", "every step", {})]
    held, why_none = budgets
    for budget in held:
        values = {"cache.policy": "calibrated", "cache.budget": budget, "cache.file": calibration}
        cache.append(Option("cache", f"{100 * budget:.0f} % of steps", values))
    if not held:
        left_out.append(f"cache.policy = calibrated: {why_none}; even masks instead (dax calibrate)")
        masks = [(f"1 step in {n}", even_mask(steps, n)) for n in PERIODS]
        cache += [Option("cache", name, {"cache.policy": "mask", "cache.mask": mask}) for name, mask in masks]
    guidance = [Option("guidance", "full guidance", {})]
    guidance.append(Option("guidance", "uncond every 2nd", {"cache.uncond_every": 2}))
    for share in SPARED:
        last = round(share * steps)
        guidance.append(Option("guidance", f"no guidance in the last {last}", {"cache.drop_uncond": last}))
    return [attention, linear, cache, guidance], left_out


def presets_among(combinations, exact: Plan) -> list:
    """Those of the combinations that are presets: what is found shall not be dearer than one of them that holds."""
    usual = exact.leaves()

    def changed(values: dict) -> dict:
        return {key: value for key, value in values.items() if value != usual[key] and key != "cache.file"}

    presets = [changed(Plan.load(name).leaves()) for name in PRESETS]
    return [
        options
        for options in combinations
        if changed({key: value for option in options for key, value in option.values.items()}) in presets
    ]


def even_mask(steps: int, period: int) -> str:
    """A fifth of the steps first, where the picture is decided; then every `period`-th, and the last."""
    first = max(1, steps // 5)
    computed = [i < first or (i - first) % period == period - 1 or i == steps - 1 for i in range(steps)]
    return "".join("01"[each] for each in computed)


def plan_of(options, base: Plan, steps: int) -> Plan:
    """The plan of a combination, on top of exact. Guidance alone is carried by a mask of ones."""
    values: dict = {}
    for option in options:
        values |= option.values
    if any(key in values for key in ("cache.uncond_every", "cache.drop_uncond")) and "cache.policy" not in values:
        values |= {"cache.policy": "mask", "cache.mask": "1" * steps}
    return Plan.from_layers([("exact", base.leaves()), ("tune", values)])[0]
