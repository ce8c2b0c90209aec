"""One pass through the denoising loop under a step cache: what is kept of it, and what is told afterwards."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dax.cache.step_plan import BRANCHES, StepPlan
from dax.edits import Edits


@dataclass
class Run:
    """One pass through the loop. `history` holds each branch's last computed velocities, newest first."""

    plan: StepPlan
    step: int = 0
    expert: object | None = None  # whose velocities the history holds
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # of the step that is open, by branch
    fresh: set[str] = field(default_factory=set)  # branches the open step computed
    branches: set[str] = field(default_factory=set)  # seen so far
    history: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 0))
    predicted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 0))
    form: type = tuple  # of the transformer's output
    dtype: torch.dtype | None = None

    def close_step(self) -> None:
        """Keep what the step computed. Only now: with guidance on two ranks the outputs are filled after both calls."""
        self.branches |= set(self.outputs)
        for branch in self.fresh:
            kept = self.history.setdefault(branch, [])
            kept.insert(0, self.outputs[branch].clone())  # whoever made it may write there again
            del kept[self.plan.depth :]
        self.outputs.clear()
        self.fresh.clear()

    def done(self) -> bool:
        """Whether every branch seen so far has its velocity of the last step."""
        return self.step == self.plan.steps - 1 and self.branches <= set(self.outputs) and bool(self.branches)


@dataclass(frozen=True)
class Report:
    """What a run of the loop really did: forwards of each branch that ran the model, and that did not."""

    plan: StepPlan
    computed: dict[str, int]
    predicted: dict[str, int]
    warnings: tuple[str, ...]


def around_loop(pipe, context: Callable, edits: Edits) -> None:
    """Let every denoising loop of a pipeline run inside a fresh `context()`.

    The pipeline's progress bar spans the loop, and closes however the loop ends.
    """
    vendors = pipe.progress_bar

    @contextmanager
    def loop(total):
        with context(), vendors(total=total) as bar:
            yield bar

    def progress_bar(iterable=None, total=None):
        return loop(total) if iterable is None else vendors(iterable)

    edits.set_attribute(pipe, "progress_bar", progress_bar)
