"""Outputs that lie in several places: a kernel is told where each row or each head goes, in other GPUs' memory too."""

from functools import lru_cache

import torch

from dax.errors import DaxError

UNIT = 16  # bytes: where a row or a head may begin


def addresses(rooms: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Where each index of `dim` lies, the rooms one after the other: int64 [B, n], in units of 16 bytes after rooms[0].

    rooms   [B, ...] each, of one dtype
    """
    places = tuple(
        (x.data_ptr(), x.shape[0], x.shape[dim], x.stride(0) * x.element_size(), x.stride(dim) * x.element_size())
        for x in rooms
    )
    return table(places, rooms[0].device)


def token_addresses(rooms: list[torch.Tensor], B: int, S: int) -> torch.Tensor:
    """addresses of the tokens of rooms [B, s, h, D]. DaxError("bad_request") unless they have room for B x S."""
    rows = addresses(rooms, 1)
    if rows.shape != (B, S):
        raise DaxError("bad_request", f"rooms for {list(rows.shape)} tokens; the attention has {[B, S]}")
    return rows


@lru_cache(maxsize=64)  # asked on every layer; a window's rooms stay where they are
def table(places: tuple, device: torch.device) -> torch.Tensor:
    """places   (address, B, n, strides of both in bytes) of each room"""
    found = []
    for address, B, n, of_batch, of_index in places:
        batch, index = (torch.arange(count, device=device) for count in (B, n))
        found.append(address - places[0][0] + batch[:, None] * of_batch + index * of_index)
    return torch.cat(found, 1) // UNIT


def fill(rooms: list[torch.Tensor], whole: torch.Tensor, dim: int) -> None:
    """Copy `whole`, split along `dim`, into the rooms: what a kernel does that writes there itself."""
    for room, part in zip(rooms, whole.split([room.shape[dim] for room in rooms], dim)):
        room.copy_(part)
