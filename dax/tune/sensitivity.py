"""Which layers must stay as they are: each group of linears in 8 bits alone, on latents of real runs.

The error of a group is how far one forward's velocity moves. Errors of groups add in squares, as their noise is
independent, so a rule list is found by leaving out those that hurt most for the work they save.
"""

from collections.abc import Iterable

from dax.bench.costs import FLOPS

ROLES = {"self": "attn1", "cross": "attn2", "ffn in": "ffn.net.0", "ffn out": "ffn.net.2"}
SHARES = (0.5, 0.8)  # of the squared error that a list of rules takes away


def groups(num_layers: int) -> dict[str, float]:
    """{pattern of a group: its share of the linears' work}: every role of every block."""
    total = num_layers * sum(FLOPS.values())
    return {
        f"blocks.{index}.{prefix}": sum(f for name, f in FLOPS.items() if name.startswith(prefix)) / total
        for index in range(num_layers)
        for prefix in ROLES.values()
    }


def measure(transformer, states: Iterable, scheme: str, num_layers: int) -> dict[str, float]:
    """{group: relative L2 of the velocity with that group alone in `scheme`}, mean over the states.

    states   (latents [1, 16, F, h, w], timestep [1], text [1, T, text_dim]) of real runs
    Costs a forward per group and state.
    """
    import torch

    from dax.optimize import optimize
    from dax.plan import Plan

    states = list(states)

    @torch.no_grad()
    def velocities() -> list:
        return [transformer(x, t, text, return_dict=False)[0].float() for x, t, text in states]

    def arranged(values: dict) -> list:
        plan, _ = Plan.from_layers([("sensitivity", {"blocks.fused": False, **values})])
        with optimize(transformer, plan):
            return velocities()

    whole, found = arranged({}), {}
    for pattern in groups(num_layers):
        moved = arranged({"linear.rules": {pattern: scheme}})
        found[pattern] = sum(float((a - b).norm() / b.norm()) for a, b in zip(moved, whole)) / len(states)
    return found


def rules(errors: dict[str, float], num_layers: int) -> list[dict[str, str]]:
    """Rule lists {pattern: none} that take away SHARES of the squared error for the least work kept in bf16."""
    work = groups(num_layers)
    total = sum(error**2 for error in errors.values())
    worst = sorted(errors, key=lambda pattern: errors[pattern] ** 2 / work[pattern], reverse=True)
    found, kept, gone = [], {}, 0.0
    shares = iter(SHARES)
    share = next(shares)
    for pattern in worst:
        kept[pattern] = "none"
        gone += errors[pattern] ** 2 / total if total else 1.0
        if gone >= share:
            found.append(dict(kept))
            share = next((each for each in shares if each > gone), None)
            if share is None:
                break
    return found
