"""The process groups of a topology, as a DeviceMesh of cfg x sequence, and the wires over them.

A process makes a group once, and every engine that needs the same ranks takes the same group; `undo` ends none. All
ranks of a communicator of NCCL must come to end it, so that an undo on one of them alone, or beside a dead one, would
wait; and torch names a split group by how many there are: after an early end the next may be named like one that lives.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dax.parallel import board
from dax.parallel.topology import Topology
from dax.parallel.wire import Wire


@dataclass(frozen=True)
class Mesh:
    """One rank's place: `sequence` joins the ranks of its branch, `cfg` those with the same tokens, `world` all.

    None where this rank would be alone.
    """

    topology: Topology
    rank: int
    sequence: Wire | None
    cfg: Wire | None
    world: Wire


def build(topology: Topology, device: str) -> Mesh:
    """One rank's place in a topology of all ranks. Collective: every rank calls it."""
    mine, world = board.mine(), dist.group.WORLD
    tick = mine.tick if mine else None
    found = groups(world, topology.cfg, topology.sequence, device)
    wires = (group and Wire(group, tick) for group in found)
    return Mesh(topology, dist.get_rank(), *wires, Wire(world, tick))


@cache
def groups(world, cfg: int, sequence: int, device: str) -> tuple:
    """(the group that shares this rank's tokens out, the group of its branches), of cfg x sequence ranks that are all
    of `world`; None for one of a single rank.

    The exchanges of NCCL get a stream of high priority: without it a queued one waits until a whole GEMM has been
    scheduled, and hides behind nothing.
    """
    if sequence == 1:
        return None, world if cfg > 1 else None
    high = None
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=board.LOADING_S)  # it brings its own, too short to compile in
        high = {"sequence": options}
    axes = {"cfg": cfg, "sequence": sequence} if cfg > 1 else {"sequence": sequence}
    mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes), backend_override=high)
    return mesh.get_group("sequence"), mesh.get_group("cfg") if cfg > 1 else None
