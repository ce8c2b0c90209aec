"""What each knob of a plan would buy before it is tried: the expected time of a clip with that one setting changed."""

from dax.attention import backend
from dax.bench import costs, roofline
from dax.facts import Facts
from dax.plan import Plan
from dax.quant import scheme as schemes

BUDGETS = (0.5, 0.4, 0.33)  # shares of the steps that a step cache computes


def gains(facts: Facts, plan: Plan, size: dict, machine, steps: int, forwards: int) -> list[dict]:
    """One row for each setting of attention, linears, blocks, compiler and step cache that `plan`, resolved, has not.

    size       height, width, num_frames
    forwards   that the plan runs, both branches of all steps
    Each row: key, value, the clip's seconds expected with it, and how many times faster that is. What the card cannot
    run is left out; what a setting does to fidelity is not said here.
    """

    def seconds(changed: Plan, count: int) -> float:
        operations = roofline.forward_operations(facts, **size, **costs.arithmetic(changed))
        return count * sum(costs.expected_s(op, changed, machine) for op in operations)

    def row(key: str, value, changes: dict, count: int = forwards) -> dict:
        changed = plan.model_copy(update=changes)
        found = seconds(changed, count)
        return {"key": key, "value": value, "seconds_expected": found, "times": seconds(plan, forwards) / found}

    def part(name: str, **values):
        return {name: getattr(plan, name).model_copy(update=values)}

    rows = [
        row("attention.kernel", kernel, part("attention", kernel=kernel))
        for kernel in backend.KERNELS
        if kernel != plan.attention.kernel and backend.reason(kernel, machine, head_dim=facts.head_dim) is None
    ]
    rows += [
        row("linear.scheme", scheme, part("linear", scheme=scheme))
        for scheme in ("none", *schemes.SCHEMES)
        if scheme != plan.linear.scheme and (scheme == "none" or schemes.reason(scheme, machine) is None)
    ]
    fused = not plan.blocks.fused
    rows.append(row("blocks.fused", fused, part("blocks", fused=fused) | {"compile": "none"}))
    if plan.compile == "none":
        rows.append(row("compile", "blocks", part("blocks", fused=False) | {"compile": "blocks"}))
    full = 2 * steps
    rows += [row("cache.budget", budget, {}, 2 * int(budget * steps)) for budget in BUDGETS if budget * full < forwards]
    if forwards < full:
        rows.append(row("cache.policy", "none", {}, full))
    return sorted(rows, key=lambda found: -found["times"])
