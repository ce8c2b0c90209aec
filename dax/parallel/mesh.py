"""The process groups of a topology, as a DeviceMesh of cfg x sequence, and the wires over them."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dax.parallel import board
from dax.parallel.topology import Topology
from dax.parallel.wire import Wire


@dataclass(frozen=True)
class Mesh:
    """One rank's place: `sequence` joins the ranks of its branch, `cfg` those with the same tokens, `world` all."""

    topology: Topology
    rank: int
    sequence: Wire
    cfg: Wire
    world: Wire


def build(topology: Topology, device: str) -> Mesh:
    """Make the groups. Collective: every rank calls it. The exchanges of NCCL get a stream of high priority.

    Without the priority a queued exchange waits until a whole GEMM has been scheduled, and hides behind nothing.
    """
    high, mine = None, board.mine()
    tick = mine.tick if mine else None
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=board.LOADING_S)  # it brings its own, too short to compile in
        high = {"sequence": options}
    shape = (topology.cfg, topology.sequence)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("cfg", "sequence"), backend_override=high)
    return Mesh(
        topology,
        dist.get_rank(),
        Wire(mesh.get_group("sequence"), tick),
        Wire(mesh.get_group("cfg"), tick),
        Wire(dist.group.WORLD, tick),
    )
