"""A process becomes a rank: its place read from the environment, the same run agreed on, the process group made."""

import atexit
import hashlib
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from dax.errors import DaxError
from dax.parallel import board
from dax.parallel.board import LOADING_S
from dax.parallel.launch import ECHO_S, Watch, is_echo
from dax.parallel.nodes import Nodes
from dax.parallel.planner import Ranks

NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank of `count`, and its number on its machine."""

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """This process's place, as torchrun or the agent of `--gpus` tells it; rank 0 of 1 where nobody does.

    DaxError("unsupported") for a variable that is missing, no number or out of range.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return Place()
    for name in NEEDED:
        value = os.environ.get(name)
        if value is None:
            raise DaxError("unsupported", f"{name} is not set, though others of torchrun's are: start with torchrun")
        if name != "MASTER_ADDR" and not (value.isascii() and value.isdigit()):
            raise DaxError("unsupported", f"{name} = {value!r} is no number: start with torchrun or --gpus N")
    rank, local_rank, count = (int(os.environ[name]) for name in NEEDED[:3])
    if not rank < count or local_rank > rank:
        raise DaxError("unsupported", f"RANK {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {count} do not fit together")
    return Place(rank, local_rank, count)


def ranks_here(guided: bool) -> Ranks:
    """The ranks of the process group that is up."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))
    return Ranks(num_ranks(), node, guided)


def num_ranks() -> int:
    """1 unless a process group is up; asks torch.distributed only if something has imported it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed.get_world_size() if distributed and distributed.is_initialized() else 1


def code_digest() -> str:
    """sha256 (hex) of DAX's own source: ranks with different code would wait for each other forever."""
    total = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def check_gpus(count: int, device: str | None, found: int) -> None:
    """DaxError("unsupported") for more ranks on this machine than it has GPUs, unless they are to run on the CPU."""
    if device != "cpu" and count > found:
        have = f"this machine has {found}" if found else "this machine has none that torch can see"
        raise DaxError("unsupported", f"{count} ranks need {count} GPUs: {have}; fewer ranks, or --device cpu")


@contextmanager
def joined(here: Place, device: str, agreed: dict[str, str]):
    """Inside, there is a process group of all ranks: NCCL on GPUs, gloo on CPUs.

    agreed   what must be the same on every rank, by name: compared before the first collective
    DaxError("rank_failed") names the first difference.
    """
    import torch
    import torch.distributed as dist

    spawned = board.PATH in os.environ
    timeout = timedelta(seconds=LOADING_S)
    store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
    watch = None if spawned else watched(here, store)
    agree(dist.PrefixStore("dax", store), rank, agreed)
    if device == "cuda":
        torch.cuda.set_device(here.local_rank)
    gpu = torch.device("cuda", here.local_rank) if device == "cuda" else None
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout, device_id=gpu)
    try:
        yield
    except RuntimeError as error:
        if not spawned and is_echo(error):
            if watch:
                watch.thread.join(ECHO_S)  # this may only echo what it is about to tell
            first = next(iter(str(error).splitlines()), "")
            raise DaxError("rank_failed", f"rank {rank} lost the others: {first}") from error
        raise  # of spawned ranks, the parent tells which was lost
    if mine := board.mine():
        mine.enter("done")
    dist.destroy_process_group()  # not after a failure: the others may never answer
    if watch:
        watch.stop()


def watched(here: Place, store) -> Watch | None:
    """Under torchrun nobody looks: then the ranks of one machine look at each other, and the first of each machine at
    the other machines. None where that was not torchrun.

    The page is named after torchrun's own process, so that no other run has it.
    """
    local, node = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_RANK")
    alone = local == str(here.count)
    if local is None or not (alone or node):
        return None
    path = Path(tempfile.gettempdir()) / f"dax-board-{os.getppid()}"
    os.environ |= {board.PATH: str(path), board.COUNT: str(here.count)}
    atexit.register(path.unlink, missing_ok=True)
    mine, nodes = board.mine(), None
    if not alone and here.local_rank == 0:
        own = range(here.rank, here.rank + int(local))
        nodes = Nodes(mine, own_connection(store), int(node), int(os.environ["GROUP_WORLD_SIZE"]), own)
    return Watch(mine, lambda line: print(f"dax: {line}", file=sys.stderr, flush=True), nodes=nodes)


def own_connection(store):
    """The run's store once more, for a thread that must not wait while another one does."""
    from torch.distributed import PrefixStore

    return PrefixStore("dax nodes", store.clone())


def agree(store, rank: int, mine: dict[str, str]) -> None:
    """Compare with rank 0's. DaxError("rank_failed") for the first name whose value differs."""
    if rank == 0:
        store.set("agreed", json.dumps(mine))
        return
    theirs = json.loads(store.get("agreed"))
    for name in mine:
        if mine[name] != theirs.get(name):
            raise DaxError("rank_failed", f"rank {rank} has {name} {mine[name]}, rank 0 has {theirs.get(name)}")
