"""`dax bench step`: what a predicted step costs, at a model's real latent size, without the model.

A stand-in answers in place of the transformer, so only the gate is timed: both branches, the most weights a plan may
have. Torch raises if anything waits for the device meanwhile.
"""

from contextlib import contextmanager
from dataclasses import asdict

from dax.bench import report
from dax.bench.model import facts_of
from dax.bench.size import checked_size, named
from dax.bench.timing import measure
from dax.cache.step_plan import BRANCHES, COMPUTE, MOST_WEIGHTS, StepPlan
from dax.edits import Edits
from dax.errors import DaxError

WEIGHTS = (1.9, -1.2, 0.5, -0.2)
LIMIT = 5e-3  # bf16 rounding of a prediction
COLUMNS = {"what": "what", "ms": "ms", "state_mb": "state MB", "error": "error", "sm_mhz": "SM MHz", "watts": "W"}


def bench(model: str | None, size, warm_up_s: float, timed_s: float, device: str | None = None) -> dict:
    """The record of a predicted step of both branches. DaxError("check_failed") if it predicts something else."""
    import torch

    from dax.cache.gate import apply_cache
    from dax.hardware import machine

    facts, device = facts_of(model or "tiny"), machine(device).device
    pixels = checked_size(facts, size)
    model = stand_in((1, facts.out_channels, *facts.latent_shape(**asdict(pixels))[1:]), device)
    row = (COMPUTE,) * MOST_WEIGHTS + (WEIGHTS,) * 3
    plan = StepPlan(row, row, "a timed table")
    gate = apply_cache([model], None, lambda *_: plan, Edits(), residual=False, checkpoint=None, kernels="exact")
    for step in range(MOST_WEIGHTS):
        ask(model, step, plan.steps)
    error = distance(ask(model, MOST_WEIGHTS, plan.steps), model.said)
    if not error < LIMIT:
        raise DaxError(
            "check_failed", f"bench step: a prediction lies {error:.4f} from the sum it should be; not timed"
        )
    state = sum(v.nbytes for kept in gate.run.history.values() for v in kept)

    def predicted_step():
        gate.run.step = MOST_WEIGHTS  # back by one, so that the table never ends
        return ask(model, MOST_WEIGHTS + 1, plan.steps)

    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
        predicted_step()
        torch.cuda.set_sync_debug_mode("default")
    timing = measure({"step": predicted_step}, device, warm_up_s, timed_s)["step"]
    figures = {"ms": timing.ms, "state_mb": state / 1e6, "error": error, **asdict(timing.reading)}
    rows = [{"what": "predicted step, both branches", **figures}]
    return report.record("step", device, **named(facts, pixels), weights=MOST_WEIGHTS, sync_checked=gpu, rows=rows)


def ask(model, step: int, steps: int) -> list:
    """What the model, or the gate before it, says of both branches at a step of a run of `steps`."""
    found = []
    for branch in BRANCHES:
        with model.cache_context(branch, step_index=step, num_inference_steps=steps):
            found.append(model.forward()[0])
    return found


def distance(predicted: list, said: dict) -> float:
    """Relative L2 of the worse branch to the weighted sum of the velocities that were said before."""
    sums = [sum(w * v.float() for w, v in zip(WEIGHTS, reversed(said[branch]))) for branch in BRANCHES]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(predicted, sums))


def stand_in(shape: tuple[int, ...], device: str):
    """What the gate needs of a transformer: at each step another velocity in bf16."""
    import torch

    class StandIn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator(device).manual_seed(0)
            new = lambda: torch.randn(shape, generator=generator, device=device).bfloat16()
            self.said = {branch: [new() for _ in range(MOST_WEIGHTS)] for branch in BRANCHES}

        @contextmanager
        def cache_context(self, name, **announced):
            self.at = name, announced["step_index"]
            yield

        def forward(self):
            branch, step = self.at
            return (self.said[branch][step],)

    return StandIn()
