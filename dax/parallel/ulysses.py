"""Attention over all tokens, when each rank holds a share of them: tokens -> heads, attend, heads -> tokens.

Each tensor goes in one all-to-all with static split sizes. Heads go in chunks, so that the attention of one chunk hides
the exchange of its neighbours. What an attention needs of its operands is told by `Axes`; nothing here knows a kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from dax.parallel.topology import Layout
from dax.parallel.wire import as_bytes


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


QUERY, KEY = Axes(1, 2, query=True), Axes(1, 2)  # [B, S, H, D]


def to_heads(wire, layout: Layout, x: torch.Tensor, axes: Axes, chunk: int = 0, chunks: int = 1) -> Callable:
    """Start to exchange this rank's tokens of all heads for all tokens of its column's heads.

    x        a tensor with this rank's share of the tokens and all heads
    returns  a function that waits: the tokens of the row (queries) or all tokens (keys), heads of chunk `chunk`
    One copy to pack; what arrives is a view, and is contiguous when tokens come first.
    """
    rank, columns = wire.rank, layout.ulysses
    if axes.tokens is None:
        start, end = layout.head_chunk(rank % columns, chunk, chunks)
        share = x.narrow(axes.heads, start, end - start)
        return lambda: share
    x = x.movedim(axes.tokens, 0)
    heads = axes.heads + (axes.heads < axes.tokens)  # where movedim left them
    peers = layout.peers(rank)
    parts = []
    for other in range(layout.ranks):
        start, end = layout.head_chunk(other % columns, chunk, chunks)
        count = end - start if other in peers or not axes.query else 0
        parts.append(x.narrow(heads, start, count))
    mine = parts[rank]
    row = prod(mine.shape[1:]) * x.element_size()
    rows = [
        -(-size // axes.per) if source in peers or not axes.query else 0
        for source, size in enumerate(layout.token_sizes)
    ]
    sizes = [part.numel() * x.element_size() for part in parts]
    handle = wire.issue(pack(parts, sizes), sizes, [count * row for count in rows])

    def arrive():
        return wire.wait(handle).view(x.dtype).view(sum(rows), *mine.shape[1:]).movedim(0, axes.tokens)

    return arrive


def to_tokens(wire, layout: Layout, o: torch.Tensor, chunk: int = 0, chunks: int = 1) -> Callable:
    """Start to exchange the row's tokens of this column's heads back for this rank's tokens of all heads.

    o        [B, S of the row, h, D]
    returns  a function that waits and writes the chunk's heads into a tensor [B, s, H, D]
    At batch 1 nothing is packed: the rows of each rank lie together already.
    """
    rank, columns = wire.rank, layout.ulysses
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
        received = wire.wait(handle).view(o.dtype).split([tokens[rank] * B * count * D for count in counts])
        for column, part in enumerate(received):
            start, end = layout.head_chunk(column, chunk, chunks)
            into[:, :, start:end] = part.view(tokens[rank], B, end - start, D).transpose(0, 1)

    return arrive


def pack(parts: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """The parts one after the other as flat uint8, each copied once."""
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=parts[0].device)
    for part, room in zip(parts, buffer.split(sizes)):
        room.view(part.dtype).view(part.shape).copy_(part)
    return buffer


class SequenceAttention:
    """`attend` over all tokens, called like it: this rank's q, k, v [B, s, H, D] -> this rank's o [B, s, H, D].

    q, k and v may also be functions that compute them: they are called in the order V, K, Q, and each is on its way
    while the next is computed. `chunks` head chunks hide the exchange under attention; 1 hides nothing.
    """

    def __init__(self, attend: Callable, sequence, chunks: int = 1):
        self.attend, self.sequence, self.chunks = attend, sequence, chunks

    def __call__(self, q, k, v):
        wire, layout, chunks = self.sequence.wire, self.sequence.layout, self.chunks
        made, arriving = {}, {}

        def issue(name: str, chunk: int):
            return to_heads(wire, layout, made[name], QUERY if name == "q" else KEY, chunk, chunks)

        for name, x in (("v", v), ("k", k), ("q", q)):
            made[name] = x() if callable(x) else x
            arriving[name, 0] = issue(name, 0)
        leaving = []
        for chunk in range(chunks):
            if chunk + 1 < chunks:
                for name in made:
                    arriving[name, chunk + 1] = issue(name, chunk + 1)
            V, K, Q = (arriving.pop((name, chunk))() for name in made)
            o = self.attend(Q, K, V) if Q.shape[2] else Q  # a column with few heads has none in the last chunk
            leaving.append(to_tokens(wire, layout, o, chunk, chunks))
        o = torch.empty_like(made["q"])
        for arrive in leaving:
            arrive(o)
        return o
