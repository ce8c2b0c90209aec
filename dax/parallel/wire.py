"""How bytes get from rank to rank: issue() starts one all-to-all, wait() gives what arrived.

torch's functional collectives are used throughout: the same call is asynchronous in eager mode and stays one graph
under torch.compile. Everything travels as uint8: gloo knows no 8-bit float, and NCCL needs no type to move bytes.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist
from torch.compiler import is_compiling

c10d = torch.ops._c10d_functional


class Wire:
    """All-to-all over one process group (NCCL or gloo). `tick`, if given, is called at every issue."""

    def __init__(self, group: dist.ProcessGroup, tick=None):
        self.group_name = group.group_name
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.tick = tick

    def issue(self, send: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]) -> torch.Tensor:
        """Start to send the parts of `send`, one to each rank.

        send           [sum(send_sizes)] uint8, contiguous; must not be written before wait()
        receive_sizes  bytes that each rank sends here: both sides know them from the layout
        returns        a handle for wait(). Runs on the group's own stream, so what is computed next hides it.
        """
        if self.tick is not None and not is_compiling():
            self.tick()
        return c10d.all_to_all_single(send, receive_sizes, send_sizes, self.group_name)

    def wait(self, handle: torch.Tensor) -> torch.Tensor:
        """[sum(receive_sizes)] uint8: the parts in the order of the ranks that sent them."""
        return c10d.wait_tensor(handle)


def gather(wire, x: torch.Tensor, sizes: tuple[int, ...], dim: int) -> torch.Tensor:
    """Every rank's share of a tensor, joined along `dim`, on every rank.

    x      this rank's share: sizes[rank] long in `dim`
    sizes  the length of each rank's share
    """
    return start_gather(wire, x, sizes, dim)()


def start_gather(wire, x: torch.Tensor, sizes: tuple[int, ...], dim: int) -> Callable[[], torch.Tensor]:
    """Start to gather; returns a function that waits and gives the whole."""
    first = x.movedim(dim, 0).contiguous()
    row = prod(first.shape[1:]) * x.element_size()
    part = as_bytes(first)
    handle = wire.issue(part.repeat(wire.ranks), [part.numel()] * wire.ranks, [size * row for size in sizes])

    def arrive() -> torch.Tensor:
        joined = wire.wait(handle).view(x.dtype).view(sum(sizes), *first.shape[1:])
        return joined.movedim(0, dim)

    return arrive


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as flat uint8; no copy."""
    return x.reshape(-1).view(torch.uint8)
