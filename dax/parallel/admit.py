"""Whether head chunks pay on this machine: both orders of one attention are timed, and the planner's word is checked.

Hiding costs launches, latency and processors; on a fast link it can lose. The choice changes when bytes travel, never
what is computed.
"""

import time
from statistics import median

import torch

from dax.parallel.ulysses import shared
from dax.parallel.wire import gather

ROUNDS = 3
MARGIN = 0.995  # what chunks must beat, so that noise decides nothing


def admitted(backend, sequence, tokens: int, chunks: int, head_dim: int, turn, device: str, travel=None):
    """(head chunks to use: `chunks` or 0, milliseconds of an attention without and with them). Collective.

    backend, travel   as in ulysses.shared;  turn  one that leaves queries and keys as they are
    Every rank comes to the same answer: the slowest rank's time counts. Takes eight attentions of `tokens` tokens.
    """
    sequence.begin(tokens)
    heads, own = sequence.heads, sequence.layout.token_sizes[sequence.wire.rank]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, own, heads * head_dim, generator=generator, device=device, dtype=dtype) for _ in range(3))

    def seconds(way) -> float:
        gather(sequence.wire, torch.zeros(1, device=device), (1,) * sequence.wire.ranks, 0)  # start together
        wait(device)
        start = time.perf_counter()
        operands = way.prepare(q, k, v, heads, turn, way.stats(k, v, heads, turn))
        way.attend(operands, own)
        wait(device)
        return time.perf_counter() - start

    ways = {count: shared(backend, sequence, count, travel) for count in (0, chunks)}
    taken = {count: [] for count in ways}
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            for count, way in ways.items():
                spent = seconds(way)
                if number > 0:  # the first round warms up
                    taken[count].append(spent)
    mine = torch.tensor([[median(each) for each in taken.values()]], device=device, dtype=torch.float64)
    without, with_chunks = gather(sequence.wire, mine, (1,) * sequence.wire.ranks, 0).amax(0).tolist()
    return (chunks if with_chunks < MARGIN * without else 0), 1e3 * without, 1e3 * with_chunks


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
