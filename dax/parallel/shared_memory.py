"""Memory that the ranks of one host see of each other: on GPUs torch's symmetric memory, on CPUs a file that all map.

`problem` and `tried` say whether they do, and why not.
"""

import hashlib
import os
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from dax.parallel.wire import gather

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ALONE = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # of torch: memory is mapped by each peer, and by nothing else
TRIED = 256  # bytes that every rank writes to every other before any is believed


class OnGpus:
    """`size` bytes of every rank: peers[rank], uint8. What was written before a `barrier` is there after it, in stream
    order. On a GPU a barrier waits without an end: who starts the ranks ends them when one is lost."""

    def __init__(self, wire, size: int):
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed._symmetric_memory import rendezvous

        self.size = size
        device = torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.mem_get_info()[0] < 2 * size:
            torch.cuda.empty_cache()  # this comes from the driver: torch gives back what it only keeps
        with torch.inference_mode(False), without_multicast():
            own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)  # no pool: freed when dropped
            torch.cuda.synchronize()  # its flags are zeroed in stream order: before a peer sees them, not after
            self.handle = rendezvous(own, wire.group_name)
            others = {r: self.handle.get_buffer(r, (size,), torch.uint8) for r in range(wire.ranks) if r != wire.rank}
        self.peers = [others.get(rank, own) for rank in range(wire.ranks)]

    def barrier(self) -> None:
        self.handle.barrier()


class OnHost:
    """The same for ranks on CPUs; a barrier is an exchange over their wire."""

    def __init__(self, wire, size: int):
        self.size, self.wire = size, wire
        name = torch.zeros(1, 256, dtype=torch.uint8)
        if wire.rank == 0:
            handle, path = tempfile.mkstemp(prefix="dax-window-")
            os.truncate(handle, size * wire.ranks)
            os.close(handle)
            name[0, : len(path)] = torch.tensor(list(path.encode()))
        path = bytes(gather(wire, name, (1,) * wire.ranks, 0)[0].tolist()).rstrip(b"\0").decode()
        with torch.inference_mode(False):
            whole = torch.from_file(path, shared=True, size=size * wire.ranks, dtype=torch.uint8)
        self.peers = list(whole.split(size))
        self.barrier()
        if wire.rank == 0:
            os.unlink(path)

    def barrier(self) -> None:
        gather(self.wire, torch.zeros(1), (1,) * self.wire.ranks, 0)


def memory_of(wire, size: int, device: str):
    """At least `size` bytes of every rank of a wire. Collective; all ask for the same."""
    return (OnGpus if device == "cuda" else OnHost)(wire, -(-size // TRIED) * TRIED)


def problem(wire, device: str) -> str | None:
    """Why the ranks of a wire do not see each other's memory, as far as can be told without a try; else None.

    Collective.
    """
    if device != "cuda":
        return "the ranks are on CPUs"
    why = "NCCL_P2P_DISABLE is set" if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0") else None
    host = hashlib.sha256((BOOT_ID.read_text() + socket.gethostname()).encode()).digest()
    here = torch.tensor([[int.from_bytes(host[:7]), torch.cuda.current_device()]], device=device)
    hosts, cards = gather(wire, here, (1,) * wire.ranks, 0).T.tolist()
    if len(set(hosts)) > 1:
        why = "the ranks are on several hosts"
    elif not all(sees(cards[wire.rank], card) for rank, card in enumerate(cards) if rank != wire.rank):
        why = "the GPUs do not see each other's memory"
    return agreed(wire, why, device)


def sees(own: int, other: int) -> bool:
    """Whether a GPU of this process can reach another's memory."""
    known = own != other and other < torch.cuda.device_count()
    return known and torch.cuda.can_device_access_peer(own, other)


def tried(wire, device: str) -> str | None:
    """Why memory of the ranks could not be had, or does not hold what the others wrote; else None. Collective."""
    memory, why = None, None
    try:
        memory = memory_of(wire, TRIED * wire.ranks, device)
    except Exception as error:  # of torch, the driver or the host: many kinds
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if why := agreed(wire, why, device):
        return why
    for peer in memory.peers:
        peer[TRIED * wire.rank :][:TRIED].fill_(wire.rank + 1)
    memory.barrier()
    wanted = torch.arange(1, wire.ranks + 1, device=device).repeat_interleave(TRIED)
    return agreed(wire, None if torch.equal(memory.peers[wire.rank].long(), wanted) else "not what was written", device)


def agreed(wire, why: str | None, device: str) -> str | None:
    """The same of all ranks: why not here, else which rank cannot; None if all can."""
    flags = gather(wire, torch.tensor([why is not None], device=device), (1,) * wire.ranks, 0).tolist()
    return why or next((f"rank {rank} of the group cannot" for rank, flag in enumerate(flags) if flag), None)


@contextmanager
def without_multicast():
    """Inside, torch makes no multicast object beside the memory: nothing here uses it, and not every machine has it."""
    before = os.environ.get(ALONE)
    os.environ[ALONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALONE]
        else:
            os.environ[ALONE] = before
