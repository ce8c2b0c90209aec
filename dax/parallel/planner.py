"""Which topology to take: all that fit are costed (`cost.py`), and each `auto` of a plan's parallel part is decided."""

from dataclasses import dataclass
from itertools import product

from dax.errors import DaxError
from dax.facts import Facts
from dax.parallel.cost import Cluster, Prediction, cluster_of, predict
from dax.parallel.topology import Layout, Topology, complete

DEGREES = ("cfg", "ulysses", "rows")
CHUNKS = (2, 3, 4, 5, 6)  # head chunks worth a thought: more gain little, and leave a wave of blocks half empty each


def predictions(
    facts: Facts,
    tokens: int,
    topologies: list[Topology],
    cluster: Cluster,
    chunks: int | None = None,
    wire_bytes: int = 2,
    branches: int = 2,
    eager: bool = True,
) -> list[Prediction]:
    """Of every topology with its best number of head chunks, or with `chunks`, by messages or through a window where
    GPUs have one and blocks are `eager`; the one to take comes first.

    Topologies within 1 % of the shortest step count as equal, since the model knows no better: among them, that with
    most branches comes first, then that with most head groups, which keep least in memory.
    """
    found = []
    for topology in topologies:
        alone = topology.ulysses == topology.sequence == 1
        most = max(1, facts.num_heads // topology.ulysses)
        tried = (chunks,) if chunks is not None else (0,) if alone else [n for n in (0, *CHUNKS) if n <= most]
        ways = product(tried, (False, True) if eager and cluster.window(topology) else (False,))
        each = [predict(facts, tokens, topology, cluster, count, wire_bytes, branches, way) for count, way in ways]
        found.append(max(each, key=lambda p: p.speedup))
    enough = 0.99 * max(p.speedup for p in found)

    def rank(p: Prediction) -> tuple:
        return (1, p.topology.cfg, p.topology.ulysses) if p.speedup >= enough else (0, p.speedup)

    return sorted(found, key=rank, reverse=True)


@dataclass(frozen=True)
class Ranks:
    """Who shares the work: ranks in all, ranks per node, whether there are two guidance branches to divide.

    tokens   of the clip, None when not known yet: then the model's own size is costed;  align  see topology.Layout
    """

    count: int = 1
    node: int | None = None
    guided: bool = True
    tokens: int | None = None
    align: int = 1


ALONE = Ranks()


def resolve_parallel(
    asked,
    facts: Facts,
    machine,
    ranks: Ranks,
    travels: bool = False,
    kernel: str = "cudnn",
    linear: str = "bf16",
    joint: bool = True,
    eager: bool = True,
) -> tuple:
    """(the plan's parallel part with every `auto` decided, notes). DaxError("bad_request") for degrees that do not fit.

    travels            whether the attention kernel has 8-bit operands that can travel as such
    kernel             of self-attention
    linear             "8bit" or "bf16": the arithmetic of the linear layers
    joint              whether both guidance branches compute the same steps
    eager              whether blocks run as they are, and not compiled
    """
    if asked.cfg == 2 and not joint:
        raise DaxError(
            "bad_request", "parallel.cfg = 2: the step cache computes the branches at different steps; use cfg = 1"
        )
    degrees = {name: None if (degree := getattr(asked, name)) == "auto" else degree for name in DEGREES}
    topologies = complete(degrees, ranks.count, facts.num_heads, ranks.guided and joint)
    if asked.wire == "8bit" and not travels:
        raise DaxError("bad_request", "parallel.wire = 8bit: this attention kernel has no 8-bit operands; use plain")
    if asked.wire == "auto":
        asked = asked.model_copy(update={"wire": "8bit" if travels else "plain"})
    if ranks.count == 1:
        return asked.model_copy(update=dict.fromkeys(DEGREES, 1) | {"overlap": 0, "wire": "plain", "vae": "none"}), []
    if ranks.tokens is not None:
        shares = [Layout(ranks.tokens, facts.num_heads, t.ulysses, t.rows, ranks.align) for t in topologies]
        topologies = [t for t, layout in zip(topologies, shares) if 0 not in layout.token_sizes]
        if not topologies:
            shares[0].check()
    size = facts.defaults
    tokens = ranks.tokens or facts.tokens(size.height, size.width, size.num_frames)
    cluster = cluster_of(machine, kernel, linear, ranks.node or ranks.count)
    chunks, told = None if asked.overlap == "auto" else asked.overlap, ""
    if cluster is None:  # no rates are known: all branches, as many head groups as divide the heads, no chunks
        whole = [t for t in topologies if facts.num_heads % t.ulysses == 0] or topologies
        topology, chunks = max(whole, key=lambda t: (t.cfg, t.ulysses)), chunks or 0
    else:
        found = predictions(facts, tokens, topologies, cluster, chunks, asked.wire_bytes, 1 + ranks.guided, eager)
        topology, chunks = found[0].topology, found[0].chunks
        told = f"; predicted {found[0].speedup:.2f} times one ({found[0].efficiency_pct:.0f} %)"
    vae = "split" if asked.vae == "auto" else asked.vae
    decided = {name: getattr(topology, name) for name in DEGREES} | {"overlap": chunks, "vae": vae}
    return asked.model_copy(update=decided), [
        f"parallel: {topology} on {ranks.count} ranks, {chunks} head chunks, {asked.wire} wire{told}"
    ]
