"""The ways to share the transformer's work that `dax bench parallel` times, each checked before it is.

Every rank first times the whole model by itself: the baseline is the slower card. Then all ranks together time guidance
and sequence parallelism, hidden and not, with both wires, by messages and through a window. A row's layer is what a
block adds: the time with the blocks less the time without, over their number.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median

from dax.bench import costs, report, rivals
from dax.bench.forward import inputs
from dax.bench.model import build, pipeline
from dax.bench.parallel_parts import Job, relative
from dax.bench.ranks_clock import ROUNDS, RanksClock
from dax.errors import DaxError
from dax.parallel.topology import Topology, topologies

SAME = 0.03  # from what one GPU computes with the same kernels: bf16 of other shapes rounds otherwise
COLUMNS = {
    "gpus": "GPUs",
    "label": "way",
    "ms_per_layer": "ms/layer",
    "speedup": "times one",
    "predicted": "predicted",
    "lost_ms": "lost ms",
    "hidden_pct": "hidden %",
    "video_s": "denoise s",
    "error": "error",
    "sm_mhz": "SM MHz",
    "watts": "W",
}


@dataclass(frozen=True)
class Way:
    """One way to share the work: a label, the plan's parallel part, and forwards that one call answers for.

    window   whether exchanges go through one, or by messages; None leaves it to what optimize() finds
    """

    label: str
    parallel: dict
    branches: int = 1
    window: bool | None = None


ONE = Way("one GPU, the slower", {})


def ways(gpus: int, heads: int, chunks: int, eight_bits: bool, window: bool = False) -> list[Way]:
    """What is timed on so many GPUs. `chunks` head chunks where the exchange is hidden.

    window   whether the GPUs see each other's memory
    On two GPUs tokens are shared in every way: both wires, by messages and through a window, serial and in chunks. On
    more the planner's choice is timed beside what it chose from: Ulysses over all and over each branch's half, the half
    with rows as well, and rows alone. Each takes the narrowest wire and the window where there is one, serial and in
    chunks; those of Ulysses alone are also timed as serial messages.
    """
    wires, carriers = ("plain", "8bit")[: 1 + eight_bits], (False, True)[: 1 + window]
    every = list(product(wires, carriers, (0, chunks)))
    messages, best = every[-2 * len(carriers)], every[-2:]
    if gpus == 2:
        orders = {
            Topology(1, 2, 1): every,
            Topology(1, 1, 2): [(wires[-1], False, chunks)],
            Topology(2, 1, 1): best[:1],
        }
    else:
        columns, half = list(dict.fromkeys([messages, *best])), gpus // 2
        orders = {Topology(1, gpus, 1): columns, Topology(2, half, 1): columns}
        orders |= {Topology(1, half, 2): best, Topology(1, 1, gpus): best}
    usable = topologies(gpus, heads)
    return [way_of(topology, *order) for topology, each in orders.items() if topology in usable for order in each]


def way_of(topology: Topology, wire: str, window: bool, chunks: int) -> Way:
    """A topology with everything about its exchange decided. Two branches exchange once a step, in one way."""
    degrees = {"cfg": topology.cfg, "ulysses": topology.ulysses, "rows": topology.rows}
    label = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    parallel = degrees | {"vae": "none"}
    if topology.sequence == 1:
        return Way(label, parallel, topology.cfg)
    order = f"{chunks} head chunks" if chunks else "serial"
    label += f", {order}" + ", 8-bit wire" * (wire == "8bit") + ", window" * window
    return Way(label, parallel | {"overlap": chunks, "wire": wire}, topology.cfg, window)


def one_rank(job: Job):
    """(the model of random weights, a pipeline around a twin under the plan, the twin's engine)"""
    transformer = build(job.facts, None, job.device, job.layers)
    return transformer, *arranged(job, transformer, None)


def way_rows(job: Job, clock: RanksClock, before) -> list[dict]:
    """The rows of every way: first each result is checked, then all take turns. What is off is not timed."""
    import torch.distributed as dist
    from torch import nn

    from dax.parallel.window import opened
    from dax.parallel.wire import Wire

    transformer, alone, engine = before
    window, why = opened(Wire(dist.group.WORLD), job.device)
    if why:
        clock.tell(f"no window: {why}")
    eight_bits = engine.plan.attention.kernel == "int8"
    tried = [ONE, *ways(job.gpus, job.facts.num_heads, job.chunks, eight_bits, window is not None)]
    arrangements, windows = {str(ONE.parallel): (alone, engine)}, {}
    ready, errors, readings = {}, {}, {}
    for way in tried:
        key = str(way.parallel)  # ways that differ in the carrier alone share a model
        pipe, own = arrangements.get(key) or arrangements.setdefault(key, arranged(job, transformer, way.parallel))
        carriers = [(each, window_of(each.wire, windows, job.device) if way.window else None) for each in own.sequences]
        run = call_of(job.facts, job.pixels, pipe.transformer, job.device, way.branches, carriers)
        output = run().float()
        if way is ONE:
            reference = output
        errors[way.label] = clock.together(relative(output, reference))
        wrong = not errors[way.label] <= SAME
        clock.tell(f"{way.label}: error {errors[way.label]:.4f}" + f", limit {SAME}: not timed" * wrong)
        if not wrong:
            ready[way.label] = run, pipe.transformer, own.plan
    times = {label: [] for label in ready}
    for turn in range(ROUNDS):
        for label, (run, *_) in ready.items():
            ms, readings[label] = clock.sustained_ms(run)
            times[label].append(ms)
            clock.tell(f"round {turn + 1} of {ROUNDS}, {label}: {ms:.1f} ms a call")
    rows = []
    for way in tried:
        row = {"label": way.label, "parallel": way.parallel, "window": way.window, "error": errors[way.label]}
        if way.label in ready:
            run, model, plan = ready[way.label]
            blocks, model.blocks = model.blocks, nn.ModuleList()
            around_ms, _ = clock.sustained_ms(run, share=0.1)
            model.blocks = blocks
            row |= line(way, median(times[way.label]), around_ms, job.layers, job.facts)
            row |= asdict(readings[way.label]) | {"predicted": predicted(way, job, plan)}
        rows.append(row)
    beside_one(rows, job.gpus)
    for row in rows:
        told = {name: report.shown(row.get(key)) for key, name in COLUMNS.items() if key not in ("gpus", "label")}
        clock.tell(f"{row['label']}: {', '.join(f'{name} {cell}' for name, cell in told.items())}")
    return rows


def auto_rows(job: Job, clock: RanksClock, before) -> list[dict]:
    """What a plan that leaves sequence parallelism to `auto` comes to on these GPUs, measurements included."""
    _, engine = arranged(job, build(job.facts, None, job.device, 1), {"cfg": 1})
    rows = [{"label": note} for note in engine.notes if note.startswith("parallel")]
    for row in rows:
        clock.tell(row["label"])
    return rows


def arranged(job: Job, transformer, parallel: dict | None):
    """(a pipeline around a twin of the transformer under the plan, its engine), which exchanges by messages."""
    import dax

    pipe = pipeline([rivals.twin(transformer)], job.facts)
    pipe._guidance_scale = job.facts.defaults.guidance_scale  # of a run: guidance is on
    overrides = {"linear": {"keep_original": "none"}} | ({} if parallel is None else {"parallel": parallel})
    tokens = job.facts.tokens(**job.pixels)
    engine = dax.optimize(pipe, job.plan, tokens=tokens, **overrides)  # undone never: twins share their originals
    for sequence in engine.sequences:
        sequence.through(None)
    return pipe, engine


def window_of(wire, windows: dict, device: str):
    """The window of a wire's ranks, among `windows` by group; models that take turns share one. Collective.

    DaxError("unsupported") where these have none, although all ranks together do.
    """
    from dax.parallel.window import opened

    if wire.group_name not in windows:
        windows[wire.group_name], why = opened(wire, device)
        if why:
            raise DaxError("unsupported", f"bench parallel: {wire.ranks} ranks have no window: {why}")
    return windows[wire.group_name]


def call_of(facts, pixels: dict, model, device: str, branches: int, carriers: list[tuple]) -> Callable:
    """One forward, or with `branches` 2 one step's two, as the pipeline asks for them; returns the first's output.

    carriers   (a Sequence of the model's engine, the window it is to exchange through or None: by messages) each
    """
    given = inputs(facts, pixels, device)

    def call():
        outputs = []
        for sequence, window in carriers:
            sequence.window = window
        for name in ("cond", "uncond")[:branches]:
            with model.cache_context(name):
                outputs.append(model(**given, return_dict=False)[0])
        return outputs[0]

    return call


def line(way: Way, ms: float, around_ms: float, layers: int, facts) -> dict:
    """The times of a row. `ms_per_layer` of a step's two branches where one call answers for both, else of one."""
    layer_ms = (ms - around_ms) / layers
    each = layer_ms / way.branches
    return {
        "ms_per_layer": layer_ms,
        "layer_and_branch_ms": each,
        "around_ms": around_ms,
        "video_s": (each * facts.num_layers + around_ms / way.branches) * 2 * facts.defaults.steps / 1e3,
    }


def beside_one(rows: list[dict], gpus: int) -> None:
    """Add what the rows are beside the first, one GPU. Rows that were not timed get nothing.

    lost_ms      of a layer and branch, over an even share of one GPU's time
    hidden_pct   of what the serial row with the same wire, window or not, loses, the share that head chunks win back
    """
    timed = [row for row in rows if "ms_per_layer" in row]
    serial = {}
    for row in timed:
        one, each, way = timed[0]["layer_and_branch_ms"], row["layer_and_branch_ms"], row["parallel"]
        row["speedup"] = one / each
        if not way:
            continue
        row["lost_ms"] = each - one / gpus
        key = way["cfg"], way["ulysses"], way["rows"], way.get("wire"), row.get("window")
        if way.get("overlap") == 0:
            serial[key] = row["lost_ms"]
        elif key in serial:
            row["hidden_pct"] = 100 * (1 - row["lost_ms"] / serial[key])


def predicted(way: Way, job: Job, plan) -> float | None:
    """The planner's speed-up for a way, resolved as that plan; None without a data sheet, and for one GPU."""
    from dax.hardware import machine
    from dax.parallel.cost import predict

    cluster = costs.cluster(plan, machine(job.device))
    if cluster is None or way is ONE:
        return None
    parallel, tokens = way.parallel, job.facts.tokens(**job.pixels)
    topology = Topology(parallel["cfg"], parallel["ulysses"], parallel["rows"])
    chunks, window = parallel.get("overlap", 0), bool(way.window)
    return predict(job.facts, tokens, topology, cluster, chunks, plan.parallel.wire_bytes, window=window).speedup
