"""What ranks started by `run_ranks` do in the tests: join, then meet the fault that is planted on rank 1."""

import os
import signal
import sys
import time
from pathlib import Path


def meet(fault, note, agreed=None, window=False):
    """Rank 1 meets the fault in the second of three rounds of a collective, and notes when; the other waits for it.

    window   in the barrier of memory that both see
    """
    from dax.parallel import board
    from dax.parallel.join import joined, place

    here = place()
    with joined(here, "cpu", agreed[here.rank] if agreed else {}):
        import torch
        import torch.distributed as dist

        from dax.parallel.shared_memory import memory_of
        from dax.parallel.wire import Wire

        mine, total = board.mine(), torch.ones(1)
        memory = memory_of(Wire(dist.group.WORLD), 256, "cpu") if window else None
        for turn in range(3):
            mine.enter(f"round {turn + 1}", patience_s=2.0)
            if turn == 1 and here.rank == 1:
                Path(note).write_text(str(time.monotonic()))
                strike(fault)
            mine.tick()
            memory.barrier() if window else dist.all_reduce(total)
        return here.count, total.item()


def strike(fault):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        sys.exit(0)
    if fault == "raise":
        raise ValueError("the dog ate it\nall of it")
    if fault == "hang":
        time.sleep(60)


def on_gpus(task, *calls):
    """Answers of all ranks to each call of a task of tests.parallel.tasks, on GPUs."""
    from dax.parallel.join import joined, place
    from tests.parallel import tasks

    with joined(place(), "cuda", {}):
        import torch.distributed as dist

        answers = [None] * place().count
        dist.all_gather_object(answers, [getattr(tasks, task)(*call) for call in calls])
        return answers


def wait_forever(path):
    """Every rank writes its process id and waits."""
    part = Path(path) / f"{os.environ['RANK']}.part"
    part.write_text(str(os.getpid()))
    part.rename(part.with_suffix(""))
    time.sleep(300)


if __name__ == "__main__":  # a run of its own, for whoever kills it; with a fault, a rank of torchrun's
    from dax.errors import DaxError
    from dax.parallel.launch import run_ranks

    try:
        meet(*sys.argv[1:]) if sys.argv[2:] else run_ranks(wait_forever, (sys.argv[1],), 2)
    except DaxError as error:
        print(f"dax: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
