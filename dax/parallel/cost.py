"""What a topology would cost, from a model's shape and a machine's rates. Arithmetic only.

One layer is its computation over u x r ranks, plus what of the exchange nothing hides, plus what hiding costs the
computation; `predict` says the time of each part. Rates and links are measured ones where they are known, and every
figure that comes out is a prediction.
"""

from dataclasses import dataclass, replace
from math import ceil

from dax.facts import Facts
from dax.hardware import ATTENTION_DTYPE, ATTENTION_REACHES, LINEAR_REACHES, TRAFFIC_REACHES, attention_reaches
from dax.parallel.topology import Topology, chunk_sizes

TILE = 128  # keys that share a scale: their means are what 8-bit attention must know of all tokens


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
    direct     the same GPUs through a window (window.py), or None: they do not see each other's memory
    tax        bytes/s that computation loses to an exchange beside it, which takes processors, memory and power
    """

    linear: float
    attention: float
    cross: float
    memory: float
    traffic: float
    node: int
    inside: Link
    between: Link
    direct: Link | None = None
    tax: float = 250e9  # of 2 and 4 GPUs: over NVLink, through a window and the host alike: docs/parallelism.md

    def window(self, topology: Topology) -> bool:
        """Whether the ranks that share tokens may exchange through a window."""
        return self.direct is not None and 1 < topology.sequence <= self.node


# All-to-all on 2 x H200 over NVLink: 25 MiB at 123 GB/s to 387 MiB at 260 GB/s; see docs/parallelism.md.
LINKS = {
    "nvlink": Link(120e-6, 282e9),
    "pcie": Link(60e-6, 14e9),
    "infiniband": Link(45e-6, 42e9),
}
DIRECT = Link(20e-6, 360e9)  # through a window, over NVLink's 18 links: 359 GB/s measured, a barrier 7 us
NVLINK = ("a100", "h20", "h100", "h200", "b200")
TRAFFIC = {"8bit": 20.5, "bf16": 18}  # of a fused block


def cluster_of(machine, kernel: str, linear: str, node: int = 8) -> Cluster | None:
    """The cluster of cards like `machine` (dax.hardware), `node` of them per node; None without a data sheet.

    kernel  of self-attention, as a resolved plan names it
    linear  "8bit" or "bf16": the arithmetic of the linear layers
    """
    if not machine.peak_tflops:
        return None
    peak = {"bf16": machine.peak_tflops["bf16"] * 1e12, "int8": machine.peak_tflops.get("int8", 0) * 1e12}
    name = machine.name.lower()
    joined = any(card in name for card in NVLINK) and "pcie" not in name
    multiplied = {"8bit": "int8", "bf16": "bf16"}[linear]
    return Cluster(
        linear=LINEAR_REACHES[multiplied] * peak[multiplied],
        attention=attention_reaches(kernel, machine) * peak[ATTENTION_DTYPE.get(kernel, "bf16")],
        cross=ATTENTION_REACHES["cudnn"] * peak["bf16"],
        memory=TRAFFIC_REACHES["fused"] * machine.bandwidth_tbs * 1e12,
        traffic=TRAFFIC[linear],
        node=node,
        inside=LINKS["nvlink" if joined else "pcie"],
        between=LINKS["infiniband"],
        direct=DIRECT if joined else None,
    )


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one layer of one branch, and what that makes of a step against one rank.

    compute   over the topology's ranks, copies around the exchange included
    exchange  all of it, hidden or not;  exposed  the part nothing hides;  tax  what hiding costs
    window    whether it goes through one, or by messages
    layer_ms  compute + exposed + tax
    """

    topology: Topology
    chunks: int
    compute_ms: float
    exchange_ms: float
    exposed_ms: float
    tax_ms: float
    speedup: float
    window: bool = False

    @property
    def layer_ms(self) -> float:
        return self.compute_ms + self.exposed_ms + self.tax_ms

    @property
    def efficiency_pct(self) -> float:
        return 100 * self.speedup / self.topology.num_ranks


def predict(
    facts: Facts,
    tokens: int,
    topology: Topology,
    cluster: Cluster,
    chunks: int = 1,
    wire_bytes: int = 2,
    branches: int = 2,
    window: bool = False,
) -> Prediction:
    """What one layer takes on a topology.

    chunks      head chunks that hide the exchange under attention; 0 hides nothing
    wire_bytes  per element of q, k and v on the wire; the output always has 2
    branches    forwards per step: 2 with guidance
    window      exchanges go through one
    """
    copies = copy_s(facts, tokens, topology, cluster, wire_bytes, window)
    compute = compute_s(facts, tokens, topology, cluster) + copies
    total, exposed = exchanges_s(facts, tokens, topology, cluster, chunks, wire_bytes, window)
    link = cluster.direct if window else cluster.inside if topology.sequence <= cluster.node else cluster.between
    tax = (total - exposed) * link.bytes_per_s / cluster.tax
    layer = compute + exposed + tax
    rounds = ceil(branches / topology.cfg)
    alone = compute_s(facts, tokens, Topology(), cluster)
    latents = exchange_s(4 * facts.out_channels * tokens * 4, 2, cluster) if topology.cfg > 1 else 0.0
    speedup = branches * facts.num_blocks * alone / (rounds * facts.num_blocks * layer + latents)
    return Prediction(topology, chunks, 1e3 * compute, 1e3 * total, 1e3 * exposed, 1e3 * tax, speedup, window)


def exchanges_s(
    facts: Facts, tokens: int, topology: Topology, cluster: Cluster, chunks: int, wire_bytes: int, window: bool = False
) -> tuple[float, float]:
    """(seconds of a layer's exchanges, seconds of them that nothing hides)."""
    u, r, sequence = topology.ulysses, topology.rows, topology.sequence
    if sequence == 1:
        return 0.0, 0.0
    share, heads = tokens * facts.width / sequence, ceil(facts.num_heads / u)  # elements of q, k, v or o on one rank
    q, kv = share * (1 - 1 / u), share * (r - 1 / u)

    carrier = replace(cluster, inside=cluster.direct) if window else cluster

    def seconds(elements: float, ranks: int, size: int, part: float) -> float:
        return exchange_s(elements * size * part, ranks, carrier)

    def inputs(part: float) -> float:  # 8 bits in one message; a window has one barrier for all
        if wire_bytes == 1 or window:
            return seconds(q + 2 * kv, sequence, wire_bytes, part)
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


def copy_s(
    facts: Facts, tokens: int, topology: Topology, cluster: Cluster, wire_bytes: int, window: bool = False
) -> float:
    """Seconds to pack operands for the exchange and to lay out what arrives; 8-bit operands keep heads first.

    Through a window only what a rank keeps is copied, to where it is attended.
    """
    u, r, sequence = topology.ulysses, topology.rows, topology.sequence
    if sequence == 1:
        return 0.0
    share = tokens * facts.width / sequence
    if window:
        return 2 * (wire_bytes * ((u > 1) + 2) + 2) * share / u / cluster.memory
    whole = (u > 1) * share + 2 * share * r  # q goes to one row, k and v to all
    packed, laid_out = whole, 0.0
    if wire_bytes == 1:  # joined on arrival, where this rank's own part waits
        packed, laid_out = whole - (u > 1) * share / u - 2 * share / u, whole
    return 2 * (wire_bytes * (packed + laid_out) + 2 * share) / cluster.memory


def window_bytes(facts: Facts, tokens: int, topology: Topology, wire_bytes: int) -> int:
    """What a window keeps on each rank: the operands of its heads and the output of its tokens, in 16 bits."""
    u, whole = topology.ulysses, tokens * facts.width
    if topology.sequence == 1:
        return 0
    operands = wire_bytes * ((u > 1) / topology.rows + 2) * ceil(facts.num_heads / u) / facts.num_heads
    return int(whole * (operands + 2 / topology.sequence))


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
