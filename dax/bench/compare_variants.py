"""What a comparison runs: the reference, the noise floor, the plans asked for, and each of their knobs alone.

A knob is one part of the plan (attention, linear, blocks, cache, ...), since its keys belong together. Pure: plans in,
arrangements out; the model is not touched here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dax.attention import KERNELS, reason
from dax.errors import DaxError
from dax.plan import Plan, presets

REFERENCE = "exact"
FLOOR = "noise floor"
WHERE_ONLY = ("parallel", "offload")  # parts that say where a model runs, not what it computes


@dataclass(frozen=True)
class Arrangement:
    """One way to run the model. `resolved` is dax.optimize's Resolved; `rounded`: q, k, v of attention in bf16."""

    name: str
    role: str
    description: str
    asked: Plan
    resolved: object = None
    rounded: bool = False

    @property
    def plan(self) -> Plan:
        return self.resolved.plan


@dataclass(frozen=True)
class Split:
    """The knobs of one plan: {part: name of its arrangement}, and {part: why it cannot stand alone}."""

    plan: str
    knobs: dict[str, str]
    refused: dict[str, str]


def arrangements(plans: list[str], resolve: Callable, machine, dtype: str, head_dim: int, knobs: bool = True):
    """(every Arrangement, the reference first and the floor second; one Split per plan of two knobs or more).

    resolve   Plan -> Resolved, for this model on this machine
    DaxError("bad_request") for a plan named twice, or like the reference, or one that cannot be resolved.
    """
    named: dict[str, Plan] = {}
    for path in plans:
        name = path if path in presets() else Path(path).stem
        if name in named:
            raise DaxError("bad_request", f"--plan {path}: a plan called {name!r} is given already")
        named[name] = Plan.load(path)
    exact = Plan.load(REFERENCE)
    for name in (REFERENCE, FLOOR):
        if named.get(name, exact) != exact:
            raise DaxError("bad_request", f"--plan: {name!r} is what plans are held against here: rename the file")
    found = [
        Arrangement(REFERENCE, "reference", "the unoptimised computation, by DAX's exact kernels", exact),
        floor(exact, machine, dtype, head_dim),
    ]
    named.pop(REFERENCE, None)
    found += [Arrangement(name, "plan", described(plan, exact), plan) for name, plan in named.items()]
    found = [replace(each, resolved=resolve(each.asked)) for each in found]
    splits = []
    for each in [each for each in found if each.role == "plan"] if knobs else []:
        split, added = split_of(each, found, resolve)
        if len(split.knobs) + len(split.refused) > 1:
            splits.append(split)
            found += added
    return found, splits


def floor(exact: Plan, machine, dtype: str, head_dim: int) -> Arrangement:
    """exact by another exact attention kernel; where there is but one, with its operands rounded to bf16."""
    from dax.attention import choose

    usual = choose(machine, dtype, head_dim)
    for kernel in ("cudnn", "flash", "sdpa"):
        if kernel != usual and KERNELS[kernel].exact and reason(kernel, machine, dtype, head_dim) is None:
            plan = changed(exact, {"attention.kernel": kernel})
            return Arrangement(FLOOR, "floor", f"exact by the attention kernel {kernel} instead of {usual}", plan)
    described = "exact with q, k and v of every attention rounded to bf16, as any GPU run has them"
    return Arrangement(FLOOR, "floor", described, exact, rounded=True)


def split_of(whole: Arrangement, found: list[Arrangement], resolve: Callable) -> tuple[Split, list[Arrangement]]:
    """The knobs of a plan, each on top of the reference; one that is an arrangement already is not run again."""
    reference = found[0]
    by_part: dict[str, dict] = {}
    for key, value in differences(whole.plan, reference.plan).items():
        by_part.setdefault(key.split(".")[0], {})[key] = value
    by_part = {part: values for part, values in by_part.items() if part not in WHERE_ONLY}
    knobs, refused, added = {}, {}, []
    for part, values in by_part.items():
        try:
            asked = changed(reference.asked, values)
            resolved = resolve(asked)
        except DaxError as error:
            refused[part] = str(error)
            continue
        if resolved.plan == reference.plan:
            refused[part] = f"changes nothing alone: {'; '.join(resolved.fallbacks) or 'it needs another knob'}"
            continue
        same = next((each for each in found if each.resolved.plan == resolved.plan and not each.rounded), None)
        if same is None:
            name = part if part not in [each.name for each in found] else f"{part} of {whole.name}"
            same = Arrangement(name, "knob", describe(values), asked, resolved)
            added.append(same)
        knobs[part] = same.name
    return Split(whole.name, knobs, refused), added


def changed(plan: Plan, values: dict) -> Plan:
    """The plan with other values of some keys, checked like any other."""
    return Plan.from_layers([("plan", plan.leaves()), ("compare", values)])[0]


def differences(plan: Plan, reference: Plan) -> dict:
    """{key: the plan's value} where it is not the reference's."""
    theirs = reference.leaves()
    return {key: value for key, value in plan.leaves().items() if value != theirs[key]}


def described(plan: Plan, reference: Plan) -> str:
    return describe(differences(plan, reference)) or "the same plan as the reference"


def describe(values: dict) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())
