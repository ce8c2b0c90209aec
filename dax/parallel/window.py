"""The exchange of an attention through memory that the ranks of one host see of each other: bytes only, no messages.

A rank writes its tokens where each peer's attention will read them, in the order it wants, and its output where each
peer's next layer will: nothing is packed, joined or put in place. A kernel that can write there does so itself
(`rooms_of` operands, `rooms` of the output); what others made is copied, on a stream beside the attention of the chunk
before where there are chunks.

One place for each operand and for the output is enough. A rank writes a layer's operands after it has left the last
barrier of the layer before, which a peer enters after its attention has read what was there; it writes a layer's output
after it has left that layer's first barrier, which a peer enters after it has consumed the output that was there.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from dax.parallel.messages import Axes, taken, whole_rooms, words
from dax.parallel.shared_memory import memory_of, problem, tried
from dax.parallel.topology import Layout

ALIGN = 256  # bytes: where an operand begins
OUTPUT = Axes(1, 2)


class Window:
    """What messages.Messages does, through the memory of the ranks of `wire`, all on one host.

    Its memory is allotted by the first attention that needs as much, on all ranks, and kept until `close`. Models may
    share a window if they run one after the other, in the same order on every rank.
    """

    def __init__(self, wire, device: str):
        self.wire, self.device = wire, device
        self.held: dict = {}
        self.stream = torch.cuda.Stream(priority=-1) if device == "cuda" else None

    def bring(self, layout: Layout, operands: tuple, axes: list[Axes], chunk: int, chunks: int) -> Callable:
        """Start to write a head chunk of every operand to all; returns a function that waits and gives what came.

        What is on the meta device has been written into `rooms_of` it.
        """
        rank = self.wire.rank
        memory, laid = self.laid(layout, [(x.shape, x.dtype) for x in operands], axes, chunks)

        def write(other: int) -> None:
            start, end = layout.head_chunk(other % layout.ulysses, chunk, chunks)
            for x, axis, place in zip(operands, axes, laid[other][chunk]):
                if place and end > start and place.counts[rank] and not x.is_meta:
                    put(self.room(memory, other, place, x.dtype, axis), x.narrow(axis.heads, start, end - start), axis)

        arrived = self.written(write, range(layout.ranks), barrier=True)
        start, end = layout.head_chunk(rank % layout.ulysses, chunk, chunks)

        def arrive() -> tuple:
            arrived()
            return tuple(
                taken(memory.peers[rank][place.offset :], x.dtype, place.shape)
                if place
                else x.narrow(axis.heads, start, end - start)
                for x, axis, place in zip(operands, axes, laid[rank][chunk])
            )

        return arrive

    def rooms_of(self, which: tuple, layout: Layout, forms: tuple, axes: list[Axes], chunks: int) -> dict:
        """Where this rank's tokens of some operands belong: for each a list of [B, h, ...], all heads in their order.

        which   the operands;  forms   (shape, dtype) of every operand.  For one row of ranks
        """
        memory, laid = self.laid(layout, forms, axes, chunks)
        parts = [(other, chunk) for other in range(layout.ranks) for chunk in range(chunks)]
        return {
            i: [self.room(memory, other, laid[other][chunk][i], forms[i][1], axes[i]) for other, chunk in parts]
            for i in which
        }

    def laid(self, layout: Layout, forms, axes: list[Axes], chunks: int) -> tuple:
        """(the memory that holds every rank's operands, the places of each rank in it, chunk by chunk)"""
        sizes = tuple((tuple(shape), dtype.itemsize) for shape, dtype in forms)
        found = [places(layout, sizes, tuple(axes), rank, chunks) for rank in range(layout.ranks)]
        return self.memory("operands", max(end for _, end in found)), [of_rank for of_rank, _ in found]

    def room(self, memory, other: int, place, dtype: torch.dtype, axis: Axes) -> torch.Tensor:
        """Where this rank's tokens of an operand belong in the memory of `other`."""
        rank, whole = self.wire.rank, taken(memory.peers[other][place.offset :], dtype, place.shape)
        return whole.narrow(axis.tokens, sum(place.counts[:rank]), place.counts[rank])

    def give_back(self, layout: Layout, o: torch.Tensor, chunk: int, chunks: int, there: bool = False) -> Callable:
        """Start to write a chunk's output [B, S of the row, h, D] to the ranks of its tokens; returns a function that
        waits for all of theirs, in `whole`. The last chunk's barrier is for the operands' memory too.

        there   a kernel has written it into `rooms`
        """
        peers, parts = layout.peers(self.wire.rank), {}
        if not there:
            rooms = self.rooms(layout, chunk, chunks, o.shape[0], o.shape[3], o.dtype)
            parts = dict(zip(peers, zip(rooms, o.split([room.shape[1] for room in rooms], 1))))

        def write(other: int) -> None:
            if other in parts and parts[other][1].numel():
                put(*parts[other], OUTPUT)

        arrived = self.written(write, peers, barrier=chunk + 1 == chunks)
        return lambda whole, kept=o: arrived()  # what is read beside the main stream stays until that was waited for

    def rooms(self, layout: Layout, chunk: int, chunks: int, B: int, D: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Where a chunk's output belongs: [B, s, h, D] of each rank of the row, in the order of their tokens."""
        start, end = layout.head_chunk(self.wire.rank % layout.ulysses, chunk, chunks)
        outputs = self.outputs(layout, B, D, dtype)
        return [outputs[peer][:, :, start:end] for peer in layout.peers(self.wire.rank)]

    def whole(self, layout: Layout, o: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of all heads, [B, s, H, D], where the others have written them."""
        return self.outputs(layout, o.shape[0], o.shape[3], o.dtype)[self.wire.rank]

    def outputs(self, layout: Layout, B: int, D: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Every rank's `whole`."""
        shapes = [(B, tokens, layout.heads, D) for tokens in layout.token_sizes]
        memory = self.memory("output", max(map(prod, shapes)) * dtype.itemsize)
        return [taken(peer, dtype, shape) for peer, shape in zip(memory.peers, shapes)]

    def written(self, write: Callable, ranks, barrier: bool) -> Callable:
        """write(rank) for every rank, then perhaps a barrier; returns a function that has the main stream wait.

        A rank's own part is written on the main stream, where it was read last: what travels runs beside it.
        """
        rank, barred = self.wire.rank, self.held["operands"].barrier
        if self.wire.tick is not None:
            self.wire.tick()
        with torch.no_grad(), self.beside():
            for other in sorted(ranks, key=lambda other: (other - rank) % self.wire.ranks):  # not all to one at a time
                if other != rank:
                    write(other)
            if barrier:
                barred()
        with torch.no_grad():
            write(rank)
        if self.stream is None:
            return lambda: None
        done = self.stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)

    @contextmanager
    def beside(self):
        """Inside, work goes to the window's stream, after what the main stream was given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def memory(self, name: str, size: int):
        """At least so many bytes of every rank. Collective when they must grow, and all ranks ask for the same."""
        if name not in self.held or self.held[name].size < size:
            self.held.pop(name, None)  # first give back, then take
            self.held[name] = memory_of(self.wire, size, self.device)
        return self.held[name]

    def close(self) -> None:
        """Give the memory back."""
        self.held.clear()


def opened(wire, device: str) -> tuple[Window | None, str | None]:
    """(the window of a wire's ranks or None, why there is none). Collective: all ranks come to the same answer."""
    why = problem(wire, device) or tried(wire, device)
    return (None, why) if why else (Window(wire, device), None)


@dataclass(frozen=True)
class Place:
    """Where a rank has an operand: offset in bytes, shape, and the entries along the tokens that each rank writes."""

    offset: int
    shape: tuple[int, ...]
    counts: tuple[int, ...]


@lru_cache(maxsize=1024)  # asked on every layer, by the host that must stay ahead of its GPU
def places(layout: Layout, forms: tuple, axes: tuple[Axes, ...], rank: int, chunks: int) -> tuple[list, int]:
    """For each chunk, the Place of each operand, None for what every rank has; and where they end.

    forms   (shape, bytes of an element) of each operand before the exchange
    """
    found, offset = [], 0
    for chunk in range(chunks):
        start, end = layout.head_chunk(rank % layout.ulysses, chunk, chunks)
        found.append([])
        for (shape, size), axis in zip(forms, axes):
            if not axis.travels(layout):
                found[-1].append(None)
                continue
            counts, shape = axis.entries(layout, rank), list(shape)
            shape[axis.heads], shape[axis.tokens] = end - start, sum(counts)
            found[-1].append(Place(offset, tuple(shape), counts))
            offset = whole_rooms(offset + prod(shape) * size, ALIGN)
    return found, offset


def put(into: torch.Tensor, part: torch.Tensor, axis: Axes) -> None:
    """Copy bit by bit, in one go: words that the GPU's processors write through the link at its full rate."""
    into, part = words(into, axis), words(part, axis)
    word = min(into.dtype, part.dtype, key=lambda dtype: dtype.itemsize)
    into.view(word).copy_(part.view(word))
