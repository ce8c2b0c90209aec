"""Operands and outputs as messages: one all-to-all with static split sizes, packed here and laid out where it arrives.

The other way for them to travel, between GPUs that see each other's memory, is `window.py`; both have the same verbs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch.compiler import is_compiling

from dax.parallel.topology import Layout
from dax.parallel.wire import as_bytes

WORDS = (torch.complex128, torch.int64, torch.int32)  # 16, 8 and 4 bytes that a copy moves at once, whatever they hold
ROOM = 16  # bytes: what travels with others begins at a multiple, a boundary of every word


@dataclass(frozen=True)
class Axes:
    """Where a tensor keeps tokens and heads. `per` tokens lie behind one index (a quantisation block has many).

    tokens is None for what all tokens share, such as the range of V: every rank has it, and only takes its heads.
    query: indexed by queries, which stay within a row of ranks; else by keys, which every row needs.
    """

    tokens: int | None
    heads: int
    per: int = 1
    query: bool = False

    @property
    def last(self) -> int:
        """The later of the two dimensions."""
        return max(self.heads, self.tokens or 0)

    def travels(self, layout: Layout) -> bool:
        """Whether a rank lacks anything of it for its heads."""
        return self.tokens is not None and not (self.query and layout.ulysses == 1)

    def entries(self, layout: Layout, rank: int) -> tuple[int, ...]:
        """How many entries along the tokens come from each rank to `rank`."""
        row = layout.peers(rank)
        sizes = enumerate(layout.token_sizes)
        return tuple(-(-size // self.per) if not self.query or source in row else 0 for source, size in sizes)


class Messages:
    """The exchange of an attention as all-to-alls over a wire."""

    def __init__(self, wire):
        self.wire = wire

    def bring(self, layout: Layout, operands: tuple, axes: list[Axes], chunk: int, chunks: int) -> Callable:
        """Start the exchange of a head chunk of every operand; returns a function that waits and gives them.

        operands  this rank's share of the tokens, all heads; not to be written until then
        Operands with tokens first go each alone, since they arrive in place; the others go together, once.
        """
        start, end = layout.head_chunk(self.wire.rank % layout.ulysses, chunk, chunks)
        found, groups = {}, {}
        for i, (x, axis) in enumerate(zip(operands, axes)):
            if axis.travels(layout):
                groups.setdefault(i if axis.tokens < axis.heads else -1, []).append(i)
            else:
                found[i] = x.narrow(axis.heads, start, end - start)
        waits = []
        for members in groups.values():
            chosen = [operands[i] for i in members], [axes[i] for i in members]
            waits.append((members, to_heads(self.wire, layout, *chosen, chunk, chunks)))

        def arrive() -> tuple:
            for members, wait in waits:
                found.update(zip(members, wait()))
            return tuple(found[i] for i in range(len(operands)))

        return arrive

    def give_back(self, layout: Layout, o: torch.Tensor, chunk: int, chunks: int, there: bool = False) -> Callable:
        """Start to exchange a chunk's output; returns a function that waits and writes it into `whole`."""
        return to_tokens(self.wire, layout, o, chunk, chunks)

    def whole(self, layout: Layout, o: torch.Tensor) -> torch.Tensor:
        """Room for this rank's tokens of all heads, [B, s, H, D]."""
        return o.new_empty(o.shape[0], layout.token_sizes[self.wire.rank], layout.heads, o.shape[3])


def to_heads(wire, layout: Layout, operands: list, axes: list[Axes], chunk: int = 0, chunks: int = 1) -> Callable:
    """Start to exchange this rank's tokens of all heads for all tokens of its column's heads, in one all-to-all.

    operands  tensors with this rank's share of the tokens and all heads
    returns   a function that waits and gives them with the tokens of the row (queries) or all tokens (keys), and the
              heads of chunk `chunk`
    One copy to pack. What arrives alone is a view; what arrives with others is copied once more, into its own order;
    this rank's own part is then copied but once.
    """
    rank, columns = wire.rank, layout.ulysses
    dtypes = [x.dtype for x in operands]
    operands = [words(x, axis) for x, axis in zip(operands, axes)]
    pieces: list[list] = [[] for _ in range(layout.ranks)]  # for each rank, a piece of every operand
    rows = list(zip(*(axis.entries(layout, rank) for axis in axes)))  # from each rank, entries along the tokens
    for x, axis in zip(operands, axes):
        first = x.movedim(axis.tokens, 0)
        heads = axis.heads + (axis.heads < axis.tokens)  # where movedim left them
        for other in range(layout.ranks):
            start, end = layout.head_chunk(other % columns, chunk, chunks)
            meets = other in layout.peers(rank) or not axis.query
            pieces[other].append(first.narrow(heads, start, end - start if meets else 0))
    mine = pieces[rank]
    widths = [prod(piece.shape[1:]) * piece.element_size() for piece in mine]
    room = ROOM if len(mine) > 1 else 1
    sizes = [[whole_rooms(piece.numel() * piece.element_size(), room) for piece in each] for each in pieces]
    coming = [[whole_rooms(count * width, room) for count, width in zip(each, widths)] for each in rows]
    if len(mine) > 1:  # what is joined on arrival needs no way through the wire to itself
        pieces[rank], sizes[rank], coming[rank] = [], [], []
    send = pack([piece for each in pieces for piece in each], [size for each in sizes for size in each])
    handle = wire.issue(send, [sum(each) for each in sizes], [sum(each) for each in coming])

    def arrive() -> list[torch.Tensor]:
        received = wire.wait(handle)
        if len(mine) == 1:
            entries = sum(each[0] for each in rows)
            whole = received.view(mine[0].dtype).view(entries, *mine[0].shape[1:])
            return [whole.movedim(0, axes[0].tokens).view(dtypes[0])]
        parts = iter(received.split([size for each in coming for size in each]))
        arrived: list[list] = [[] for _ in mine]
        for source in range(layout.ranks):
            for i, part in enumerate(mine):
                if source != rank:
                    part = taken(next(parts), part.dtype, (rows[source][i], *part.shape[1:]))
                arrived[i].append(part.movedim(0, axes[i].tokens))
        return [torch.cat(found, axis.tokens).view(dtype) for found, axis, dtype in zip(arrived, axes, dtypes)]

    return arrive


def to_tokens(wire, layout: Layout, o: torch.Tensor, chunk: int = 0, chunks: int = 1) -> Callable:
    """Start to exchange the row's tokens of this column's heads back for this rank's tokens of all heads.

    o        [B, S of the row, h, D]
    returns  a function that waits and writes the chunk's heads into a tensor [B, s, H, D]
    At batch 1 nothing is packed: the rows of each rank lie together already.
    """
    rank, columns = wire.rank, layout.ulysses
    if columns == 1:
        start, end = layout.head_chunk(0, chunk, chunks)
        return lambda into: into[:, :, start:end].copy_(o)
    peers, tokens = layout.peers(rank), layout.token_sizes
    B, _, h, D = o.shape
    width = B * D * o.element_size()
    counts = [end - start for start, end in (layout.head_chunk(column, chunk, chunks) for column in range(columns))]
    send_sizes = [tokens[other] * h * width if other in peers else 0 for other in range(layout.ranks)]
    receive_sizes = [
        tokens[rank] * counts[source % columns] * width if source in peers else 0 for source in range(layout.ranks)
    ]
    handle = wire.issue(as_bytes(o.transpose(0, 1).contiguous()), send_sizes, receive_sizes)

    def arrive(into: torch.Tensor) -> None:
        into = words(into, Axes(1, 2))
        row = tokens[rank] * B * into.shape[-1]
        received = wire.wait(handle).view(into.dtype).split([row * count for count in counts])
        for column, part in enumerate(received):
            start, end = layout.head_chunk(column, chunk, chunks)
            into[:, :, start:end] = part.view(tokens[rank], B, end - start, into.shape[-1]).transpose(0, 1)

    return arrive


def words(x: torch.Tensor, axis: Axes) -> torch.Tensor:
    """The tensor as one that is copied faster, no copy: a strided copy costs a GPU by the element, not by the byte.

    In the widest of WORDS whose boundaries all rows lie on, where the last dimension is neither tokens nor heads; else
    8 bits as bytes, all else as it is. A compiler makes copies of its own.
    """
    if axis.last < x.ndim - 1 and x.stride(-1) == 1 and not is_compiling():
        places = *x.stride()[:-1], x.storage_offset(), x.shape[-1]
        for word in WORDS:
            if all(place * x.element_size() % word.itemsize == 0 for place in places):
                return x.view(word)
    return x.view(torch.uint8) if x.element_size() == 1 else x


def pack(parts: list[torch.Tensor], rooms: list[int]) -> torch.Tensor:
    """The parts one after the other as flat uint8, each copied once to the start of its room (bytes)."""
    buffer = torch.empty(sum(rooms), dtype=torch.uint8, device=parts[0].device)
    for part, room in zip(parts, buffer.split(rooms)):
        taken(room, part.dtype, part.shape).copy_(part)
    return buffer


def whole_rooms(size: int, room: int) -> int:
    """Bytes rounded up to whole rooms."""
    return -(-size // room) * room


def taken(room: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor at the start of a room of bytes; a view."""
    return room[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
