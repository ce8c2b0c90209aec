"""Attention over all tokens, when each rank holds a share of them: tokens -> heads, attend, heads -> tokens.

Operands go in all-to-alls with static split sizes. Heads go in chunks, so that the attention of one chunk hides
the exchange of its neighbours. What travels is what the attention backend's record says; nothing here knows a kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch.compiler import is_compiling

from dax.parallel.topology import Layout
from dax.parallel.wire import as_bytes, start_gather

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


def to_heads(wire, layout: Layout, operands: list, axes: list[Axes], chunk: int = 0, chunks: int = 1) -> Callable:
    """Start to exchange this rank's tokens of all heads for all tokens of its column's heads, in one all-to-all.

    operands  tensors with this rank's share of the tokens and all heads
    returns   a function that waits and gives them with the tokens of the row (queries) or all tokens (keys), and the
              heads of chunk `chunk`
    One copy to pack. What arrives alone is a view; what arrives with others is copied once more, into its own order;
    this rank's own part is then copied but once.
    """
    rank, columns, peers = wire.rank, layout.ulysses, layout.peers(wire.rank)
    dtypes = [x.dtype for x in operands]
    operands = [words(x, axis) for x, axis in zip(operands, axes)]
    pieces: list[list] = [[] for _ in range(layout.ranks)]  # for each rank, a piece of every operand
    rows: list[list[int]] = [[] for _ in range(layout.ranks)]  # from each rank, entries along the tokens
    for x, axis in zip(operands, axes):
        first = x.movedim(axis.tokens, 0)
        heads = axis.heads + (axis.heads < axis.tokens)  # where movedim left them
        for other in range(layout.ranks):
            start, end = layout.head_chunk(other % columns, chunk, chunks)
            meets = other in peers or not axis.query
            pieces[other].append(first.narrow(heads, start, end - start if meets else 0))
            rows[other].append(-(-layout.token_sizes[other] // axis.per) if meets else 0)
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


def shared(backend, sequence, chunks: int = 0, travel=None):
    """An attention backend whose tokens lie on several ranks: called like `backend`, with this rank's tokens.

    backend   the record of an attention (dax.attention.Backend), which then sees all tokens of some heads
    chunks    head chunks, so that the attention of one hides the exchange of the next; 0 and 1 exchange all at once
    travel    the backend whose operands travel; the same one by default. With 8-bit operands half the bytes do, and
              what is attended is bit for bit what one process would attend: the range of V and the shift of K come
              from all tokens, tile by tile in their order
    """
    travel = travel or backend
    axes = [
        Axes(tokens, heads, per, query=index < travel.num_query_operands)
        for index, (heads, tokens, per) in enumerate(travel.layout)
    ]
    wire, chunks = sequence.wire, max(chunks, 1)

    def stats(k, v, heads, turn):
        found = travel.stats(k, v, heads, turn)
        if found is None:
            return None
        per_tile, widest = found
        tiles = [-(-size // travel.token_align) for size in sequence.layout.token_sizes]
        sizes = tuple(count + 1 for count in tiles)  # a rank's tiles, then its range
        arrive = start_gather(wire, torch.cat([per_tile, widest.unsqueeze(1)], 1), sizes, 1)

        def joined():
            parts = arrive().split(sizes, 1)
            widest = torch.stack([part[:, -1] for part in parts]).amax(0)
            return torch.cat([part[:, :-1] for part in parts], 1), widest

        return joined

    def prepare(q, k, v, heads, turn, stats, scale=None):
        operands = travel.prepare(q, k, v, heads, turn, stats, scale)
        return Exchange(wire, sequence.layout, operands, axes, chunks, done=type(turn)())

    def attend(exchange, num_keys, scale=None):
        def run(operands):
            if travel is not backend:
                operands = prepared_here(backend, operands, exchange.done, scale)
            return backend.attend(operands, exchange.layout.tokens, scale)

        return exchange.attend(run)

    return replace(backend, stats=stats, prepare=prepare, attend=attend)


def prepared_here(backend, operands, turn, scale):
    """What arrived as q, k, v [B, S, h, D], normed and turned already, as the backend wants it."""
    heads = operands[0].shape[2]
    q, k, v = (x.flatten(2).contiguous() for x in operands)
    return backend.prepare(q, k, v, heads, turn, backend.stats(k, v, heads, turn), scale)


class Exchange:
    """One attention's operands on their way: the first head chunk is issued at once, each other one attention ahead.

    done   a Turn that leaves queries and keys as they are: these have been normed and turned
    """

    def __init__(self, wire, layout: Layout, operands: tuple, axes: list[Axes], chunks: int, done=None):
        self.wire, self.layout, self.operands, self.axes, self.chunks = wire, layout, operands, axes, chunks
        self.done = done
        self.arriving = self.issue(0)

    def issue(self, chunk: int) -> Callable:
        """Start the exchange of a head chunk of every operand; returns a function that waits for all.

        Operands with tokens first go each alone, since they arrive in place; the others go together, once.
        """
        layout, column = self.layout, self.wire.rank % self.layout.ulysses
        start, end = layout.head_chunk(column, chunk, self.chunks)
        here, groups = {}, {}
        for i, (x, axis) in enumerate(zip(self.operands, self.axes)):
            if axis.tokens is None or (axis.query and layout.ulysses == 1):  # all of it is here already
                here[i] = x.narrow(axis.heads, start, end - start)
            else:
                groups.setdefault(i if axis.tokens < axis.heads else -1, []).append(i)
        waits = []
        for members in groups.values():
            chosen = [self.operands[i] for i in members], [self.axes[i] for i in members]
            waits.append((members, to_heads(self.wire, layout, *chosen, chunk, self.chunks)))

        def arrive() -> tuple:
            found = dict(here)
            for members, wait in waits:
                found |= dict(zip(members, wait()))
            return tuple(found[i] for i in range(len(self.operands)))

        return arrive

    def attend(self, run: Callable) -> torch.Tensor:
        """run(operands) of every chunk: this rank's tokens of all heads, [B, s, H, D]."""
        wire, layout, leaving, o = self.wire, self.layout, [], None
        for chunk in range(self.chunks):
            arriving, last = self.arriving, chunk + 1 == self.chunks
            self.arriving = None if last else self.issue(chunk + 1)
            operands = arriving()
            start, end = layout.head_chunk(wire.rank % layout.ulysses, chunk, self.chunks)
            o = run(operands) if end > start else o[:, :, :0]  # a column with few heads has none in its last chunks
            leaving.append(to_tokens(wire, layout, o, chunk, self.chunks))
        whole = o.new_empty(o.shape[0], layout.token_sizes[wire.rank], layout.heads, o.shape[3])
        for arrive in leaving:
            arrive(whole)
        return whole
