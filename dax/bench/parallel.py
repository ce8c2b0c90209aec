"""`dax bench parallel --gpus N`: one GPU against N, every way to share the work, each checked before it is timed.

Every rank first times the whole model by itself: the baseline is the slower card. Then all ranks together time guidance
and sequence parallelism, hidden and not, with both wires. A row's layer is what a block adds: the time with the blocks
less the time without, over their number. The rest of the run, the link and a whole clip are in parallel_parts.py.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

from dax.bench import report, rivals
from dax.bench.forward import image_embeds, timesteps
from dax.bench.model import build, facts_of
from dax.bench.parallel_parts import Job, Part, clip_alone, clip_rows, decode_rows, link_rows, relative
from dax.bench.ranks_clock import ROUNDS, RanksClock
from dax.bench.size import checked_size
from dax.errors import DaxError, nearest
from dax.parallel.board import mine
from dax.parallel.join import check_gpus, code_digest, joined, place
from dax.parallel.launch import run_ranks

SAME = 0.03  # from what one GPU computes with the same kernels: bf16 of other shapes rounds otherwise
DECODE_SAME = 5e-3  # the VAE's convolutions run in TF32, by whatever algorithm suits the strip
COLUMNS = {
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
    """One way to share the work: a label, the plan's parallel part, and forwards that one call answers for."""

    label: str
    parallel: dict
    branches: int = 1


ONE = Way("one GPU, the slower", {})


def ways(gpus: int, chunks: int, eight_bits: bool) -> list[Way]:
    """What is timed on so many GPUs. `chunks` head chunks where the exchange is hidden."""
    share = {"cfg": 1, "ulysses": gpus, "rows": 1, "vae": "none"}
    found = [
        Way(f"ulysses {gpus}, serial", share | {"overlap": 0, "wire": "plain"}),
        Way(f"ulysses {gpus}, {chunks} head chunks", share | {"overlap": chunks, "wire": "plain"}),
    ]
    if eight_bits:
        found.append(Way(f"ulysses {gpus}, serial, 8-bit wire", share | {"overlap": 0, "wire": "8bit"}))
        found.append(
            Way(f"ulysses {gpus}, {chunks} head chunks, 8-bit wire", share | {"overlap": chunks, "wire": "8bit"})
        )
    found.append(Way(f"rows {gpus}, {chunks} head chunks", share | {"ulysses": 1, "rows": gpus, "overlap": chunks}))
    if gpus % 2 == 0:
        half = {"cfg": 2, "ulysses": gpus // 2, "rows": 1, "vae": "none"}
        found.append(Way("cfg 2" + f" x ulysses {gpus // 2}" * (gpus > 2), half, branches=2))
    return found


def bench(
    model, size, layers, plan, gpus, warm_up_s, timed_s, device=None, log=print, parts: str | None = None, chunks=5
) -> dict:
    """Start the ranks and return the record. DaxError for what cannot be, before they start.

    parts   some of PARTS, with commas between; all by default
    log     hears each figure as it is known, so that a run that is cut short has told something
    """
    import torch

    facts = facts_of(model or "tiny")
    pixels = checked_size(facts, size)
    if facts.control_layers:
        raise DaxError("bad_request", f"bench parallel: {facts.name} takes a control video: dax bench forward knows it")
    if facts.num_experts > 1:
        raise DaxError(
            "bad_request", f"bench parallel: {facts.name} has two experts: wan2.1-t2v-14b is as large as one"
        )
    if gpus < 2:
        raise DaxError("bad_request", "bench parallel: --gpus 2 or more")
    chosen = list(PARTS) if parts is None else [name.strip() for name in parts.split(",") if name.strip()]
    for name in chosen:
        if name not in PARTS:
            raise DaxError("bad_request", f"--rows: parallel has no part {name!r}{nearest(name, PARTS)}")
    check_gpus(gpus, device, torch.cuda.device_count())
    device = device or "cuda"
    layers = min(layers or 4, facts.num_layers)
    log(f"{facts.name}: {layers} of {facts.num_layers} blocks, plan {plan}, on {gpus} x {device}")
    job = Job(facts, asdict(pixels), layers, plan, gpus, device, warm_up_s, timed_s, chunks, log)
    figures = run_ranks(measure, (job, chosen), gpus)
    found = {"failed": off(figures), "rows": figures.pop("ways", []), **figures}
    size = job.pixels | {"tokens": facts.tokens(**job.pixels)}
    return report.record("parallel", device, model=facts.name, num_blocks=layers, plan=plan, gpus=gpus, **size, **found)


def off(figures: dict) -> str | None:
    """What a check found wrong, in a line; None if all is well. A clip must lie inside the noise floor."""
    limits = {"ways": lambda row: SAME, "vae": lambda row: DECODE_SAME, "clip": lambda row: row["floor"]}
    wrong = [
        f"{row['label']}: error {row['error']:.2g}, limit {limits[part](row):.2g}"
        for part, rows in figures.items()
        for row in rows
        if part in limits and not row["error"] <= limits[part](row)
    ]
    return "; ".join(wrong) or None


def measure(job: Job, chosen: list[str]) -> dict:
    """What every rank does; rank 0's figures are the record's."""
    import torch

    here = place()
    if job.device == "cuda":
        torch.cuda.set_device(here.local_rank)
    with torch.no_grad():
        before = {name: PARTS[name].alone(job) for name in chosen}
        with joined(here, job.device, {"code": code_digest()}):
            clock, figures = RanksClock(job.device, job.warm_up_s, job.timed_s), {}
            for name in chosen:
                mine() and mine().enter(f"bench {name}")
                figures[name] = PARTS[name].together(job, clock, before.pop(name))
    return figures


def one_rank(job: Job):
    """(the model of random weights, a pipeline around a twin under the plan, the twin's engine)"""
    transformer = build(job.facts, None, job.device, job.layers)
    return transformer, *arranged(job.facts, transformer, job.plan, None)


def way_rows(job: Job, clock: RanksClock, before) -> list[dict]:
    """The rows of every way: first each result is checked, then all take turns. What is off is not timed."""
    from torch import nn

    transformer, alone, engine = before
    eight_bits, plan = engine.plan.attention.kernel == "int8", engine.plan
    tried = [ONE, *ways(job.gpus, job.chunks, eight_bits)]
    ready, errors, readings = {}, {}, {}
    for way in tried:
        pipe = alone if way is ONE else arranged(job.facts, transformer, job.plan, way.parallel)[0]
        run = call_of(job.facts, job.pixels, pipe.transformer, job.device, way.branches)
        output = run().float()
        if way is ONE:
            reference = output
        errors[way.label] = clock.together(relative(output, reference))
        off = not errors[way.label] <= SAME
        clock.tell(job, f"{way.label}: error {errors[way.label]:.4f}" + f", limit {SAME}: not timed" * off)
        if not off:
            ready[way.label] = run, pipe.transformer
    times = {label: [] for label in ready}
    for turn in range(ROUNDS):
        for label, (run, _) in ready.items():
            ms, readings[label] = clock.sustained_ms(run)
            times[label].append(ms)
            clock.tell(job, f"round {turn + 1} of {ROUNDS}, {label}: {ms:.1f} ms a call")
    rows = []
    for way in tried:
        row = {"label": way.label, "parallel": way.parallel, "error": errors[way.label]}
        if way.label in ready:
            run, model = ready[way.label]
            blocks, model.blocks = model.blocks, nn.ModuleList()
            around_ms, _ = clock.sustained_ms(run, share=0.1)
            model.blocks = blocks
            row |= line(way, median(times[way.label]), around_ms, job.layers, job.facts)
            row |= asdict(readings[way.label]) | {"predicted": predicted(way, job, eight_bits, plan)}
        rows.append(row)
    beside_one(rows, job.gpus)
    for row in rows:
        cells = (f"{name} {report.shown(row.get(key))}" for key, name in COLUMNS.items() if key != "label")
        clock.tell(job, f"{row['label']}: {', '.join(cells)}")
    return rows


def auto_rows(job: Job, clock: RanksClock, before) -> list[dict]:
    """What a plan that leaves sequence parallelism to `auto` comes to on these GPUs, measurements included."""
    _, engine = arranged(job.facts, build(job.facts, None, job.device, 1), job.plan, {"cfg": 1})
    rows = [{"label": note} for note in engine.notes if note.startswith("parallel")]
    for row in rows:
        clock.tell(job, row["label"])
    return rows


def arranged(facts, transformer, plan, parallel: dict | None):
    """(a pipeline around a twin of the transformer under the plan, its engine)."""
    import dax

    pipe = pipeline(rivals.twin(transformer), facts)
    overrides = {"linear": {"keep_original": "none"}} | ({} if parallel is None else {"parallel": parallel})
    return pipe, dax.optimize(pipe, plan, **overrides)  # nothing is undone, and the twins share their originals


def pipeline(transformer, facts, vae=None):
    """A pipeline that has only what a bench calls, with guidance on."""
    import diffusers
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler, "transformer": transformer}
    if facts.token_time:
        parts["expand_timesteps"] = True
    pipe = getattr(diffusers, facts.pipeline_class)(**parts)
    pipe._guidance_scale = 5.0
    return pipe


def call_of(facts, pixels: dict, model, device: str, branches: int) -> Callable:
    """One forward, or with `branches` 2 one step's two, as the pipeline asks for them; returns the first's output."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    latents, text = gaussian(1, *facts.latent_shape(**pixels)), gaussian(1, facts.text_tokens, facts.text_dim)
    images = image_embeds(facts, gaussian)
    timestep = timesteps(facts, pixels, device)

    def call():
        outputs = []
        for name in ("cond", "uncond")[:branches]:
            with model.cache_context(name):
                outputs.append(model(latents, timestep, text, images, return_dict=False)[0])
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
    hidden_pct   of what the serial row with the same wire loses, the share that head chunks win back
    """
    timed = [row for row in rows if "ms_per_layer" in row]
    serial = {}
    for row in timed:
        one, each, way = timed[0]["layer_and_branch_ms"], row["layer_and_branch_ms"], row["parallel"]
        row["speedup"] = one / each
        if not way:
            continue
        row["lost_ms"] = each - one / gpus
        key = way["ulysses"], way["rows"], way.get("wire")
        if way.get("overlap") == 0:
            serial[key] = row["lost_ms"]
        elif key in serial:
            row["hidden_pct"] = 100 * (1 - row["lost_ms"] / serial[key])


def predicted(way: Way, job: Job, eight_bits: bool, plan) -> float | None:
    """The planner's speed-up for a way; None without a data sheet."""
    from dax.hardware import machine
    from dax.parallel.cost import cluster_of, predict
    from dax.parallel.topology import Topology

    attention = "bf16" if plan.attention.kernel not in ("int8", "sage") else "8bit"
    cluster = cluster_of(machine(job.device), attention, "8bit" if plan.linear.active else "bf16")
    if cluster is None or way is ONE:
        return None
    parallel, tokens = way.parallel, job.facts.tokens(**job.pixels)
    topology = Topology(parallel["cfg"], parallel["ulysses"], parallel["rows"])
    wire_bytes = 1 if eight_bits and parallel.get("wire") != "plain" else 2
    return predict(job.facts, tokens, topology, cluster, parallel.get("overlap", 0), wire_bytes).speedup


PARTS = {
    "ways": Part(way_rows, one_rank),
    "auto": Part(auto_rows),
    "link": Part(link_rows),
    "vae": Part(decode_rows),
    "clip": Part(clip_rows, clip_alone),
}
