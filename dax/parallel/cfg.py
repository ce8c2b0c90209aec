"""Guidance parallelism: the pipeline asks for the branch with the prompt, then for the one without. Each half of the
ranks computes one, and both have both before the pipeline combines them. Exact, on the stock pipeline.

Asked for a branch that others compute, a rank answers with a buffer, and fills it when the second branch is asked for:
diffusers reads neither before both are there.
"""

from contextlib import contextmanager
from functools import partial

import torch

from dax.errors import DaxError
from dax.parallel.wire import as_bytes

BRANCHES = ("cond", "uncond")  # the order in which diffusers' Wan pipelines ask for them


class Guidance:
    """The exchange between the two branches of one run. `wire` joins the ranks with the same tokens in each branch.

    guided    tells whether the run that is under way asks for both branches
    channels  of what the transformer returns: with an image it is given more
    """

    def __init__(self, wire, guided, channels: int):
        self.wire, self.guided, self.channels = wire, guided, channels
        self.branch = BRANCHES[wire.rank]
        self.asked: str | None = None
        self.first: torch.Tensor | None = None

    @contextmanager
    def context(self, inner, name, *args, **kwargs):
        """The model's own cache_context, in which the pipeline says which branch it is going to ask for."""
        if name not in BRANCHES:
            raise DaxError("unsupported", f"parallel.cfg = 2: the pipeline asks for an unknown branch {name!r}")
        before, self.asked = self.asked, name
        try:
            with inner(name, *args, **kwargs):
                yield
        except BaseException:
            self.first = None
            raise
        finally:
            self.asked = before

    def forward(self, inner, hidden_states, *args, return_dict=True, **kwargs):
        """The transformer's forward: computes the rank's own branch, and exchanges once both were asked for."""
        if self.asked is None or return_dict:
            raise DaxError("bad_request", "parallel.cfg = 2 serves diffusers' Wan pipelines only; use cfg = 1")
        if not self.guided():
            raise DaxError("bad_request", "parallel.cfg = 2 needs guidance (guidance_scale above 1); use cfg = 1")
        if self.asked == self.branch:
            sample = inner(hidden_states, *args, return_dict=False, **kwargs)[0]
        else:
            batch, _, *cells = hidden_states.shape
            nan = torch.nan  # whoever reads it before it is filled shall see that
            sample = hidden_states.new_full((batch, self.channels, *cells), nan)
        if self.asked == BRANCHES[0]:
            if self.first is not None:
                raise DaxError("bad_request", "parallel.cfg = 2: the branch without the prompt was not asked for")
            self.first = sample
        else:
            self.exchange(self.first, sample)
            self.first = None
        return (sample,)

    def exchange(self, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        """Fill the branch this rank did not compute."""
        mine, other = (cond, uncond) if self.branch == BRANCHES[0] else (uncond, cond)
        count = mine.numel() * mine.element_size()
        sizes = [count, 0] if self.wire.rank == 1 else [0, count]
        received = self.wire.wait(self.wire.issue(as_bytes(mine.contiguous()), sizes, sizes))
        other.copy_(received.view(mine.dtype).view(mine.shape))


def apply_guidance(transformer, guidance: Guidance, edits) -> int:
    """Divide the branches of one transformer; returns 1."""
    context, forward = transformer.cache_context, transformer.forward
    edits.set_attribute(transformer, "cache_context", partial(guidance.context, context))
    edits.set_attribute(transformer, "forward", partial(guidance.forward, forward))
    return 1
