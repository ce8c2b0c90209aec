"""Which way an exchange goes on this machine: every way there is carries one attention, and the fastest is taken.

Hiding costs launches, latency and processors; on a fast link it can lose. A way decides when and how bytes travel,
never what is computed.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch

from dax.parallel.ulysses import shared
from dax.parallel.wire import gather

ROUNDS = 3
MARGIN = 0.995  # what a way must beat those before it by, so that noise decides nothing


@dataclass(frozen=True)
class Way:
    """Head chunks, 0 for none, through a window or, where that is None, by messages."""

    chunks: int
    window: object = None

    def __str__(self):
        order = f"in {self.chunks} chunks" if self.chunks > 1 else "serial"
        return order + " through the window" * bool(self.window)


def ways_of(chunks: int, auto: bool, window) -> list[Way]:
    """What there is to choose from: chunks or none where that is `auto`, messages or the window where there is one."""
    counts = sorted({0, chunks}) if auto else [chunks]
    return [Way(count, through) for through in (None, window)[: 1 + bool(window)] for count in counts]


def admitted(
    backend, sequence, tokens: int, ways: list[Way], head_dim: int, turn, device: str, travel=None
) -> tuple[Way, list[float]]:
    """(the way to take, the milliseconds of an attention each way). Collective.

    backend, travel   as in ulysses.shared;  turn  one that leaves queries and keys as they are
    Every rank comes to the same answer: the slowest rank's time counts. Takes four attentions of `tokens` tokens a way.
    """
    sequence.begin(tokens)
    heads, own = sequence.heads, sequence.layout.token_sizes[sequence.wire.rank]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, own, heads * head_dim, generator=generator, device=device, dtype=dtype) for _ in range(3))

    def seconds(way: Way) -> float:
        sequence.window, attention = way.window, shared(backend, sequence, way.chunks, travel)
        gather(sequence.wire, torch.zeros(1, device=device), (1,) * sequence.wire.ranks, 0)  # start together
        wait(device)
        start = time.perf_counter()
        operands = attention.prepare(q, k, v, heads, turn, attention.stats(k, v, heads, turn))
        attention.attend(operands, own)
        wait(device)
        return time.perf_counter() - start

    taken = [[] for _ in ways]
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            for way, times in zip(ways, taken):
                spent = seconds(way)
                if number > 0:  # the first round warms up
                    times.append(spent)
    mine = torch.tensor([[median(times) for times in taken]], device=device, dtype=torch.float64)
    slowest = gather(sequence.wire, mine, (1,) * sequence.wire.ranks, 0).amax(0).tolist()
    best = 0
    for number, spent in enumerate(slowest):
        if spent < MARGIN * slowest[best]:
            best = number
    return ways[best], [1e3 * spent for spent in slowest]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
