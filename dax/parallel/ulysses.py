"""Attention over all tokens, when each rank holds a share of them: tokens -> heads, attend, heads -> tokens.

Heads go in chunks, so that the attention of one chunk hides the exchange of its neighbours. What travels is what the
attention backend's record says, and how it travels is `messages.py` or `window.py`; nothing here knows a kernel.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.compiler import is_compiling

from dax.parallel.messages import Axes, Messages
from dax.parallel.topology import Layout
from dax.parallel.wire import start_gather


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
        window, layout = None if is_compiling() else sequence.window, sequence.layout
        carrier, there = window or Messages(wire), {}
        if window and travel.written and layout.rows == 1:  # a head goes to one rank: it is made where it goes
            forms = travel.forms(q.shape[0], q.shape[1], heads, q.shape[2] // heads)
            there = {"rooms": window.rooms_of(travel.written, layout, forms, axes, chunks)}
        operands = travel.prepare(q, k, v, heads, turn, stats, scale, **there)
        return Exchange(carrier, sequence.layout, operands, axes, chunks, done=type(turn)())

    def attend(exchange, num_keys, scale=None):
        def run(operands):
            if travel is not backend:
                operands = prepared_here(backend, operands, exchange.done, scale)
            return backend.attend(operands, exchange.layout.tokens, scale)

        def into(operands, rooms):
            return backend.attend_into(operands, exchange.layout.tokens, rooms, scale)

        straight = backend.attend_into and travel is backend and exchange.carrier is sequence.window
        return exchange.attend(run, into if straight else None)

    return replace(backend, stats=stats, prepare=prepare, attend=attend, attend_into=None, written=())


def prepared_here(backend, operands, turn, scale):
    """What arrived as q, k, v [B, S, h, D], normed and turned already, as the backend wants it."""
    heads = operands[0].shape[2]
    q, k, v = (x.flatten(2).contiguous() for x in operands)
    return backend.prepare(q, k, v, heads, turn, backend.stats(k, v, heads, turn), scale)


class Exchange:
    """One attention's operands on their way: the first head chunk is issued at once, each other one attention ahead.

    carrier   Messages or a Window: how they travel
    done      a Turn that leaves queries and keys as they are: these have been normed and turned
    """

    def __init__(self, carrier, layout: Layout, operands: tuple, axes: list[Axes], chunks: int, done=None):
        self.carrier, self.layout, self.operands, self.axes, self.chunks = carrier, layout, operands, axes, chunks
        self.done = done
        self.arriving = self.bring(0)

    def bring(self, chunk: int) -> Callable:
        return self.carrier.bring(self.layout, self.operands, self.axes, chunk, self.chunks)

    def attend(self, run: Callable, into: Callable | None = None) -> torch.Tensor:
        """run(operands) of every chunk: this rank's tokens of all heads, [B, s, H, D].

        into   through a window, (operands, rooms): the same, which writes each token to its rank itself
        Of a window it is the window's own memory, which the next attention of these ranks writes over.
        """
        layout, leaving, o = self.layout, [], None
        column = self.carrier.wire.rank % layout.ulysses
        for chunk in range(self.chunks):
            arriving, last = self.arriving, chunk + 1 == self.chunks
            self.arriving = None if last else self.bring(chunk + 1)
            operands = arriving()
            start, end = layout.head_chunk(column, chunk, self.chunks)
            if end == start:  # a column with few heads has none in its last chunks
                o = o[:, :, :0]
            elif into is None:
                o = run(operands)
            else:
                o = into(operands, partial(self.carrier.rooms, layout, chunk, self.chunks))
            leaving.append(self.carrier.give_back(layout, o, chunk, self.chunks, there=into is not None))
        whole = self.carrier.whole(layout, o)
        for arrive in leaving:
            arrive(whole)
        return whole
