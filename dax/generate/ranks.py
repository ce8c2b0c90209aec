"""A job on several ranks: which plan they follow, where each one is, and what rank 0 does for all of them.

`Team` is this process among them; alone, it is a team of one, and the job runs the same lines.
"""

import time
from contextlib import contextmanager
from statistics import median

from dax.errors import DaxError
from dax.parallel import board
from dax.parallel.board import LOADING_S
from dax.parallel.join import Place, check_gpus, code_digest, joined, place
from dax.parallel.planner import Ranks
from dax.parallel.topology import too_narrow

LEAST_PATIENCE_S = 60.0
PATIENCE_STEPS = 20  # a step that takes longer than so many usual ones hangs


def count_of(gpus: int, device: str | None) -> tuple[Place, int]:
    """(this process's place, ranks of the job). DaxError for more ranks than GPUs, or another count than torchrun's."""
    here = place()
    if gpus < 1:
        raise DaxError("bad_request", f"--gpus {gpus}: at least 1")
    if here.count > 1 and gpus not in (1, here.count):
        raise DaxError("bad_request", f"--gpus {gpus}: torchrun has started {here.count} ranks; leave one out")
    count = max(gpus, here.count)
    if count > 1:
        import torch

        local = gpus if here.count == 1 else here.local_rank + 1
        check_gpus(local, device, torch.cuda.device_count())
        if here.count > 1 and device != "cpu":
            torch.cuda.set_device(here.local_rank)
    return here, count


def parallel_plan(asked, request, facts, count: int, strict: bool, remarks: list[str]):
    """(the plan with what this request rules out ruled out, Ranks for resolve). Fallbacks are added to `remarks`."""
    update, columns = {}, facts.latent_shape(request.height, request.width, request.num_frames)[-1]
    guided = request.guidance_scale > 1
    if count > 1 and not guided and asked.parallel.cfg == "auto":
        update["cfg"] = 1
    if count > 1 and asked.parallel.vae != "none" and (problem := too_narrow(columns, count)):
        if strict:
            raise DaxError("unsupported", f"--strict: {problem}")
        remarks.append(problem)
        update["vae"] = "none"
    asked = asked.model_copy(update={"parallel": asked.parallel.model_copy(update=update)})
    tokens = facts.tokens(request.height, request.width, request.num_frames)
    return asked, Ranks(count, guided=guided, tokens=tokens)


class Team:
    """This process among the ranks of a job. `first` is the one that reads the text, writes the clip and speaks."""

    def __init__(self, here: Place):
        self.first, self.count, self.board = here.first, here.count, board.mine()
        self.steps_s: list[float] = []
        self.began = 0.0

    def enter(self, stage: str, patience_s: float = LOADING_S) -> None:
        """Say what comes next, for whoever has to tell where a rank died."""
        if self.board is not None:
            self.board.enter(stage, patience_s)

    def step(self, step: int, steps: int) -> None:
        """Say that denoising step `step` (from 0) begins. The first may compile; the others know how long one takes."""
        now = time.monotonic()
        if step > 0:
            self.steps_s.append(now - self.began)
        self.began = now
        usual = max(LEAST_PATIENCE_S, PATIENCE_STEPS * median(self.steps_s)) if self.steps_s else LOADING_S
        if step < steps:
            self.enter(f"denoise step {step + 1} of {steps}", usual)

    def most(self, counts: dict[str, int]) -> dict[str, int]:
        """The largest of every rank's count, by name: what was done at all, whoever did it."""
        if self.count == 1:
            return counts
        import torch
        import torch.distributed as dist

        every = torch.tensor(list(counts.values()), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        return dict(zip(counts, every.tolist()))

    def share_text(self, make, shape: tuple[int, ...], guided: bool, dtype, device):
        """The embeddings that rank 0 makes, on every rank: the prompt's and, with guidance, the negative prompt's."""
        if self.count == 1:
            return make()
        import torch
        import torch.distributed as dist

        if self.first:  # in the dtype that the pipeline would give them next
            embeds = [tensor.to(device, dtype).contiguous() for tensor in make()[: 1 + guided]]
        else:
            embeds = [torch.empty(shape, dtype=dtype, device=device) for _ in range(1 + guided)]
        for tensor in embeds:
            if tuple(tensor.shape) != shape:
                raise DaxError("bug", f"text embeddings are {tuple(tensor.shape)}, not {shape}")
            dist.broadcast(tensor, src=0)
        return tuple(embeds) if guided else (embeds[0], None)


@contextmanager
def team(here: Place, device: str, agreed: dict[str, str]):
    """This process as a member of the team; alone where it is. `agreed` is what all ranks must have the same."""
    if here.count == 1:
        yield Team(here)
        return
    with joined(here, device, {"code": code_digest(), **agreed}):
        yield Team(here)
