"""Who does what: how ranks divide the guidance branches, the tokens and the heads of one clip. Numbers only, no torch.

`cfg` branches x `rows` query groups x `ulysses` head groups. Outside attention a rank holds a share of the tokens;
inside, it holds the queries of its row for the heads of its column, and all keys of those heads. Every split is a
function of the whole and of the topology, so that no rank ever asks another for a size, and nothing is padded.
"""

from dataclasses import dataclass
from itertools import accumulate

from dax.errors import DaxError


def split_sizes(total: int, parts: int, align: int = 1) -> tuple[int, ...]:
    """`total` in `parts` shares that differ by at most one block of `align`; every inner boundary is a multiple of it.

    The last share that is not empty takes what is left of the last block. 75 600 in 8 by 128: 7 x 9472 and 9296.
    """
    blocks, extra = divmod(-(-total // align), parts)
    ends = accumulate((blocks + (part < extra)) * align for part in range(parts))
    bounds = [0, *(min(end, total) for end in ends)]
    return tuple(end - start for start, end in zip(bounds, bounds[1:]))


def ranges(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, end) of each share."""
    ends = tuple(accumulate(sizes))
    return tuple(zip((0, *ends[:-1]), ends))


def chunk_sizes(heads: int, chunks: int) -> tuple[int, ...]:
    """Heads of each head chunk: 20 in 5 are 3 5 6 5 1. A chunk has at least one while there are any.

    What is seen of the exchange is the first chunk's operands and the last one's output: the last chunk is one head,
    the first has a third of what those between have, no less, so that its attention hides the exchange of the second.
    """
    sure = min(heads, chunks)
    weights = [1, *[3] * (chunks - 1)]
    if chunks > 2:
        weights[-1] = 0
    ends = [0, *(round_half_up((heads - sure) * end, sum(weights)) for end in accumulate(weights))]
    return tuple((chunk < sure) + ends[chunk + 1] - ends[chunk] for chunk in range(chunks))


def round_half_up(count: int, over: int) -> int:
    """count / over, to the nearest whole number."""
    return (2 * count + over) // (2 * over)


@dataclass(frozen=True)
class Topology:
    """cfg x rows x ulysses ranks, numbered with ulysses innermost, so that the busiest exchange stays inside a node."""

    cfg: int = 1
    ulysses: int = 1
    rows: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one branch."""
        return self.ulysses * self.rows

    @property
    def num_ranks(self) -> int:
        return self.cfg * self.sequence

    def branch(self, rank: int) -> int:
        """Which guidance branch the rank computes: 0 with the prompt, 1 without."""
        return rank // self.sequence

    def __str__(self):
        return f"cfg {self.cfg} x ulysses {self.ulysses} x rows {self.rows}"


@dataclass(frozen=True)
class Layout:
    """The splits of one sequence over `ulysses` x `rows` ranks; `rank` counts inside that group.

    tokens   S, of one clip;  heads  H;  align  tokens of a quantisation block, which no split cuts
    """

    tokens: int
    heads: int
    ulysses: int = 1
    rows: int = 1
    align: int = 1

    @property
    def ranks(self) -> int:
        return self.ulysses * self.rows

    @property
    def token_sizes(self) -> tuple[int, ...]:
        """s of every rank."""
        return split_sizes(self.tokens, self.ranks, self.align)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """h of every column."""
        return split_sizes(self.heads, self.ulysses)

    def token_range(self, rank: int) -> tuple[int, int]:
        """The tokens a rank holds outside attention."""
        return ranges(self.token_sizes)[rank]

    def peers(self, rank: int) -> range:
        """The ranks of the same row, whose tokens are the queries this rank attends for."""
        first = rank // self.ulysses * self.ulysses
        return range(first, first + self.ulysses)

    def head_chunk(self, column: int, chunk: int, chunks: int) -> tuple[int, int]:
        """The heads of a column that chunk number `chunk` of `chunks` carries; empty when there are too few."""
        start, end = ranges(self.head_sizes)[column]
        first, last = ranges(chunk_sizes(end - start, chunks))[chunk]
        return start + first, start + last

    def check(self) -> "Layout":
        """DaxError("bad_request") if a rank would have no tokens or no heads; names the degrees that would do."""
        if 0 in self.head_sizes:
            most = min(self.heads, self.ulysses)
            raise DaxError(
                "bad_request",
                f"parallel.ulysses = {self.ulysses}: the model has {self.heads} heads; use 1 to {most}, and rows",
            )
        if 0 in self.token_sizes:
            usable = [n for n in range(1, self.ranks) if 0 not in split_sizes(self.tokens, n, self.align)]
            block = f" in blocks of {self.align}" if self.align > 1 else ""
            raise DaxError(
                "bad_request",
                f"parallel: {self.tokens} tokens{block} do not give each of {self.ranks} ranks a share; "
                f"ulysses x rows may be {', '.join(map(str, usable))}",
            )
        return self


def too_narrow(columns: int, ranks: int) -> str | None:
    """Why a clip of so many latent columns cannot be decoded in a strip per rank, or None if it can."""
    return f"parallel.vae = split: {columns} latent columns on {ranks} ranks; none instead" if columns < ranks else None


def topologies(num_ranks: int, heads: int, guided: bool = True) -> list[Topology]:
    """Every way to use exactly `num_ranks` ranks on a model of that many heads."""
    found = []
    for cfg in (1, 2) if guided else (1,):
        if num_ranks % cfg == 0:
            sequence = num_ranks // cfg
            found += [
                Topology(cfg, ulysses, sequence // ulysses)
                for ulysses in range(1, min(heads, sequence) + 1)
                if sequence % ulysses == 0
            ]
    return found


def complete(asked: dict[str, int | None], num_ranks: int, heads: int, guided: bool = True) -> list[Topology]:
    """The topologies that agree with the degrees asked for ({"cfg": 2, "ulysses": None, ...}; None leaves it open).

    DaxError("bad_request") lists the usable ones when none does.
    """
    possible = topologies(num_ranks, heads, guided)
    fitting = [t for t in possible if all(degree in (None, getattr(t, name)) for name, degree in asked.items())]
    if not fitting:
        stated = ", ".join(f"parallel.{name} = {degree}" for name, degree in asked.items() if degree is not None)
        without = "" if guided else " without guidance"
        raise DaxError(
            "bad_request",
            f"{stated}: not possible on {num_ranks} rank{'s' * (num_ranks > 1)} with {heads} heads{without}; usable: "
            + "; ".join(map(str, possible)),
        )
    return fitting
