"""What a topology would cost, from a model's shape and a machine's rates, and which one to take. Arithmetic only.

One layer is its computation over u x r ranks, plus what of the exchange nothing hides, plus what hiding costs the
computation. `predict` says the time of each part, `predictions` compares topologies by it. Rates and links are
measured ones where they are known, and every figure that comes out is a prediction.
"""

from dataclasses import dataclass
from math import ceil

from dax.errors import DaxError
from dax.facts import Facts
from dax.hardware import ATTENTION_REACHES, LINEAR_REACHES, TRAFFIC_REACHES
from dax.parallel.topology import Layout, Topology, chunk_sizes, complete

TILE = 128  # keys that share a scale: their means are what 8-bit attention must know of all tokens
DEGREES = ("cfg", "ulysses", "rows")
CHUNKS = (2, 3, 4, 5, 6)  # head chunks worth a thought: more gain little, and leave a wave of blocks half empty each


@dataclass(frozen=True)
class Link:
    """One all-to-all: latency, then bytes that leave a rank at a rate."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """Rates that one rank reaches, and the links between ranks.

    linear, attention, cross  FLOP/s of the block's GEMMs, of self-attention with its quantisation, of cross-attention
    traffic    elementwise bytes of a block in units of one bf16 activation, 2 S C;  memory  bytes/s of device memory
    node       ranks of one node, joined by `inside`; nodes are joined by `between`
    tax        share of a hidden exchange that computation loses to it: the collective's own use of the processors
    """

    linear: float
    attention: float
    cross: float
    memory: float
    traffic: float
    node: int
    inside: Link
    between: Link
    tax: float = 0.12


# All-to-all on 2 x H200 over NVLink: 25 MiB at 123 GB/s to 387 MiB at 260 GB/s; see docs/parallelism.md.
LINKS = {
    "nvlink": Link(120e-6, 282e9),
    "pcie": Link(60e-6, 14e9),
    "infiniband": Link(45e-6, 42e9),
}
NVLINK = ("a100", "h20", "h100", "h200", "b200")
TRAFFIC = {"8bit": 20.5, "bf16": 23.4}  # of a fused block


def cluster_of(machine, attention: str, linear: str, node: int = 8) -> Cluster | None:
    """The cluster of cards like `machine` (dax.hardware), `node` of them per node; None without a data sheet.

    attention, linear   "8bit" or "bf16": their arithmetic
    """
    if not machine.peak_tflops:
        return None
    peak = {"bf16": machine.peak_tflops["bf16"] * 1e12, "8bit": machine.peak_tflops.get("int8", 0) * 1e12}
    name = machine.name.lower()
    inside = LINKS["nvlink" if any(card in name for card in NVLINK) and "pcie" not in name else "pcie"]
    eight = {"8bit": "int8", "bf16": "bf16"}[linear]
    return Cluster(
        linear=LINEAR_REACHES[eight] * peak[linear],
        attention=ATTENTION_REACHES["int8" if attention == "8bit" else "cudnn"] * peak[attention],
        cross=ATTENTION_REACHES["cudnn"] * peak["bf16"],
        memory=TRAFFIC_REACHES["fused"] * machine.bandwidth_tbs * 1e12,
        traffic=TRAFFIC[linear],
        node=node,
        inside=inside,
        between=LINKS["infiniband"],
    )


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one layer of one branch, and what that makes of a step against one rank.

    compute   over the topology's ranks, copies around the exchange included
    exchange  all of it, hidden or not;  exposed  the part nothing hides;  tax  what hiding costs
    layer_ms  compute + exposed + tax
    """

    topology: Topology
    chunks: int
    compute_ms: float
    exchange_ms: float
    exposed_ms: float
    tax_ms: float
    speedup: float

    @property
    def layer_ms(self) -> float:
        return self.compute_ms + self.exposed_ms + self.tax_ms

    @property
    def efficiency_pct(self) -> float:
        return 100 * self.speedup / self.topology.num_ranks


def predict(
    facts: Facts, tokens: int, topology: Topology, cluster: Cluster, chunks: int = 1, wire_bytes: int = 2, branches=2
) -> Prediction:
    """What one layer takes on a topology.

    chunks      head chunks that hide the exchange under attention; 0 hides nothing
    wire_bytes  per element of q, k and v on the wire; the output always has 2
    branches    forwards per step: 2 with guidance
    """
    compute = compute_s(facts, tokens, topology, cluster) + copy_s(facts, tokens, topology, cluster, wire_bytes)
    total, exposed = exchanges_s(facts, tokens, topology, cluster, chunks, wire_bytes)
    tax = cluster.tax * (total - exposed)
    layer = compute + exposed + tax
    rounds = ceil(branches / topology.cfg)
    alone = compute_s(facts, tokens, Topology(), cluster)
    latents = exchange_s(4 * facts.out_channels * tokens * 4, 2, cluster) if topology.cfg > 1 else 0.0
    speedup = branches * facts.num_blocks * alone / (rounds * facts.num_blocks * layer + latents)
    return Prediction(topology, chunks, 1e3 * compute, 1e3 * total, 1e3 * exposed, 1e3 * tax, speedup)


def exchanges_s(
    facts: Facts, tokens: int, topology: Topology, cluster: Cluster, chunks: int, wire_bytes: int
) -> tuple[float, float]:
    """(seconds of a layer's exchanges, seconds of them that nothing hides)."""
    u, r, sequence = topology.ulysses, topology.rows, topology.sequence
    if sequence == 1:
        return 0.0, 0.0
    share, heads = tokens * facts.width / sequence, ceil(facts.num_heads / u)  # elements of q, k, v or o on one rank
    q, kv = share * (1 - 1 / u), share * (r - 1 / u)

    def seconds(elements: float, ranks: int, size: int, part: float) -> float:
        return exchange_s(elements * size * part, ranks, cluster)

    def inputs(part: float) -> float:  # 8 bits in one message
        if wire_bytes == 1:
            return seconds(q + 2 * kv, sequence, 1, part)
        return seconds(q, u, 2, part) + 2 * seconds(kv, sequence, 2, part)

    stats, unseen = 0.0, 0.0
    if wire_bytes == 1:  # the tiles' means, while the queries are quantised
        stats = exchange_s(4 * share / TILE * (sequence - 1), sequence, cluster)
        unseen = min(stats, 3 * share / cluster.memory)  # bytes: read in 16 bits, written in 8
    parts = [size / heads for size in chunk_sizes(heads, max(chunks, 1)) if size]
    coming, leaving = [inputs(part) for part in parts], [seconds(q, u, 2, part) for part in parts]
    total = stats + sum(coming) + sum(leaving)
    attending = compute_s(facts, tokens, topology, cluster, only_attention=True)
    waited = waits_s(coming, [attending * part for part in parts], leaving)
    return total, stats - unseen + waited


def waits_s(coming: list[float], attending: list[float], leaving: list[float]) -> float:
    """Seconds in which nothing attends, from the first chunk's departure to the last one's return.

    As ulysses.Exchange has it: a chunk's operands leave before the chunk ahead attends, its output after; the link does
    one thing at a time.
    """
    now, link, waited, arrival = 0.0, coming[0], 0.0, coming[0]
    for chunk, attend in enumerate(attending):
        arrived = arrival
        if chunk + 1 < len(coming):
            arrival = link = max(link, now) + coming[chunk + 1]
        waited += max(0.0, arrived - now)
        now = max(now, arrived) + attend
        link = max(link, now) + leaving[chunk]
    return waited + link - now


def compute_s(facts: Facts, tokens: int, topology: Topology, cluster: Cluster, only_attention: bool = False) -> float:
    """Seconds of one rank's share of a layer. Heads that do not divide leave ranks waiting for the fullest column."""
    C, F, S = facts.width, facts.ffn_dim, tokens
    balance = topology.ulysses * ceil(facts.num_heads / topology.ulysses) / facts.num_heads
    attention = balance * 4 * S * S * C / cluster.attention
    if only_attention:
        return attention / topology.sequence
    linear = S * (12 * C * C + 4 * C * F) / cluster.linear
    cross = 4 * S * (facts.text_tokens + facts.image_tokens) * C / cluster.cross
    return (attention + linear + cross + cluster.traffic * 2 * S * C / cluster.memory) / topology.sequence


def copy_s(facts: Facts, tokens: int, topology: Topology, cluster: Cluster, wire_bytes: int) -> float:
    """Seconds to pack operands for the exchange and to lay out what arrives; 8-bit operands keep heads first."""
    u, r, sequence = topology.ulysses, topology.rows, topology.sequence
    if sequence == 1:
        return 0.0
    share = tokens * facts.width / sequence
    whole = (u > 1) * share + 2 * share * r  # q goes to one row, k and v to all
    packed, laid_out = whole, 0.0
    if wire_bytes == 1:  # joined on arrival, where this rank's own part waits
        packed, laid_out = whole - (u > 1) * share / u - 2 * share / u, whole
    return 2 * (wire_bytes * (packed + laid_out) + 2 * share) / cluster.memory


def exchange_s(leaving: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of one all-to-all in which `leaving` bytes leave each of `ranks` ranks, over one node or several."""
    if ranks == 1 or leaving == 0:
        return 0.0
    if ranks <= cluster.node:
        return cluster.inside.latency_s + leaving / cluster.inside.bytes_per_s
    outside = (ranks - cluster.node) / (ranks - 1)
    return cluster.between.latency_s + max(
        leaving * outside / cluster.between.bytes_per_s, leaving * (1 - outside) / cluster.inside.bytes_per_s
    )


def predictions(
    facts: Facts,
    tokens: int,
    topologies: list[Topology],
    cluster: Cluster,
    chunks: int | None = None,
    wire_bytes: int = 2,
    branches: int = 2,
) -> list[Prediction]:
    """Of every topology with its best number of head chunks, or with `chunks`; the one to take comes first.

    Topologies within 1 % of the shortest step count as equal, since the model knows no better: among them, that with
    most branches comes first, then that with most head groups, which keep least in memory.
    """
    found = []
    for topology in topologies:
        alone = topology.ulysses == topology.sequence == 1
        most = max(1, facts.num_heads // topology.ulysses)
        tried = (chunks,) if chunks is not None else (0,) if alone else [n for n in (0, *CHUNKS) if n <= most]
        each = [predict(facts, tokens, topology, cluster, count, wire_bytes, branches) for count in tried]
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
    attention: str = "bf16",
    linear: str = "bf16",
    joint: bool = True,
) -> tuple:
    """(the plan's parallel part with every `auto` decided, notes). DaxError("bad_request") for degrees that do not fit.

    travels            whether the attention kernel has 8-bit operands that can travel as such
    attention, linear  "8bit" or "bf16": their arithmetic
    joint              whether both guidance branches compute the same steps
    """
    if asked.cfg == 2 and not joint:
        raise DaxError(
            "bad_request", "parallel.cfg = 2: the step cache computes the branches at different steps; use cfg = 1"
        )
    degrees = {name: None if (degree := getattr(asked, name)) == "auto" else degree for name in DEGREES}
    topologies = complete(degrees, ranks.count, facts.num_heads, ranks.guided and joint)
    if asked.wire == "8bit" and not travels:
        raise DaxError("bad_request", "parallel.wire = 8bit: this attention kernel has no 8-bit operands; use plain")
    wire = ("8bit" if travels else "plain") if asked.wire == "auto" else asked.wire
    if ranks.count == 1:
        return asked.model_copy(update=dict.fromkeys(DEGREES, 1) | {"overlap": 0, "wire": "plain", "vae": "none"}), []
    if ranks.tokens is not None:
        shares = [Layout(ranks.tokens, facts.num_heads, t.ulysses, t.rows, ranks.align) for t in topologies]
        topologies = [t for t, layout in zip(topologies, shares) if 0 not in layout.token_sizes]
        if not topologies:
            shares[0].check()
    size = facts.defaults
    tokens = ranks.tokens or facts.tokens(size.height, size.width, size.num_frames)
    cluster = cluster_of(machine, attention, linear, ranks.node or ranks.count)
    chunks, told = None if asked.overlap == "auto" else asked.overlap, ""
    if cluster is None:  # no rates are known: all branches, as many head groups as divide the heads, no chunks
        whole = [t for t in topologies if facts.num_heads % t.ulysses == 0] or topologies
        topology, chunks = max(whole, key=lambda t: (t.cfg, t.ulysses)), chunks or 0
    else:
        found = predictions(facts, tokens, topologies, cluster, chunks, 1 if wire == "8bit" else 2, 1 + ranks.guided)
        topology, chunks = found[0].topology, found[0].chunks
        told = f"; predicted {found[0].speedup:.2f} times one ({found[0].efficiency_pct:.0f} %)"
    vae = "split" if asked.vae == "auto" else asked.vae
    decided = {name: getattr(topology, name) for name in DEGREES} | {"overlap": chunks, "wire": wire, "vae": vae}
    return asked.model_copy(update=decided), [
        f"parallel: {topology} on {ranks.count} ranks, {chunks} head chunks, {wire} wire{told}"
    ]
