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
COLUMNS = {"what": "what", "ms": "ms", "state_mb": "state MB", "error": "error", "sm_mhz": "SM MHz", "watts": "W"}


def bench(model: str | None, size, warm_up_s: float, timed_s: float, device: str | None = None) -> dict:
    """The record of a predicted step of both branches. DaxError("check_failed") if it predicts something else."""
    import torch

    from dax.cache.gate import apply_cache
    from dax.hardware import machine

    facts, device = facts_of(model or "tiny"), machine(device).device
    pixels = checked_size(facts, size)
    gpu = device.startswith("cuda")
    model = stand_in((1, facts.out_channels, *facts.latent_shape(**asdict(pixels))[1:]), device)
    row = (COMPUTE,) * MOST_WEIGHTS + (WEIGHTS,) * 3
    steps = len(row)
    edits, plan = Edits(), StepPlan(row, row, "a timed table")
    gate = apply_cache([model], None, lambda *_: plan, edits, residual=False, checkpoint=None, kernels="exact")

    def ask(step: int) -> list:
        found = []
        for branch in BRANCHES:
            with model.cache_context(branch, step_index=step, num_inference_steps=steps):
                found.append(model.forward()[0])
        return found

    for step in range(MOST_WEIGHTS):
        ask(step)
    truth = [sum(w * v.float() for w, v in zip(WEIGHTS, reversed(model.said[b]))) for b in BRANCHES]
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(ask(MOST_WEIGHTS), truth))
    if not error < 5e-3:
        raise DaxError(
            "check_failed", f"bench step: a prediction lies {error:.4f} from the sum it should be; not timed"
        )
    state = sum(v.nbytes for kept in gate.run.history.values() for v in kept)

    def predicted_step():
        gate.run.step = MOST_WEIGHTS  # back by one, so that the table never ends
        return ask(MOST_WEIGHTS + 1)

    if gpu:
        torch.cuda.set_sync_debug_mode("error")
        predicted_step()
        torch.cuda.set_sync_debug_mode("default")
    timing = measure({"step": predicted_step}, device, warm_up_s, timed_s)["step"]
    figures = {"ms": timing.ms, "state_mb": state / 1e6, "error": error, **asdict(timing.reading)}
    return report.record(
        "step",
        device,
        **named(facts, pixels),
        weights=MOST_WEIGHTS,
        sync_checked=gpu,
        rows=[{"what": "predicted step, both branches", **figures}],
    )


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
