"""`dax bench parallel --gpus N`: one GPU against N, every way to share the work, each checked before it is timed.

Every rank first times the whole model by itself: the baseline is the slower card. Then all ranks together time guidance
and sequence parallelism, hidden and not, with both wires, and the VAE's decode. A row's layer is what a block adds: the
time with the blocks less the time without, over their number.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from statistics import median

from dax.bench import report, rivals
from dax.bench.forward import image_embeds, timesteps
from dax.bench.model import build, facts_of
from dax.bench.size import checked_size
from dax.errors import DaxError
from dax.parallel.board import mine
from dax.parallel.join import check_gpus, code_digest, joined, place
from dax.parallel.launch import run_ranks

ROUNDS = 2
SAME = 0.03  # from what one GPU computes with the same kernels: bf16 of other shapes rounds otherwise
RESIDUAL_VAE = {  # that of Wan2.2 TI2V-5B
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
COLUMNS = {
    "label": "way",
    "ms_per_layer": "ms/layer",
    "speedup": "times one",
    "predicted": "predicted",
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


def bench(model, size, layers, plan, gpus, warm_up_s, timed_s, device=None, log=print, chunks=5, vae=True) -> dict:
    """Start the ranks and return the record. DaxError for what cannot be, before they start."""
    import torch

    facts = facts_of(model or "tiny")
    pixels = checked_size(facts, size)
    if facts.control_layers:
        raise DaxError("bad_request", f"bench parallel: {facts.name} takes a control video: dax bench forward knows it")
    if gpus < 2:
        raise DaxError("bad_request", "bench parallel: --gpus 2 or more")
    check_gpus(gpus, device, torch.cuda.device_count())
    device = device or "cuda"
    layers = min(layers or 4, facts.num_layers)
    log(f"{facts.name}: {layers} of {facts.num_layers} blocks, plan {plan}, on {gpus} x {device}")
    args = (facts, asdict(pixels), layers, plan, gpus, warm_up_s, timed_s, device, chunks, vae)
    figures = run_ranks(measure, args, gpus)
    for name in ("rows", "vae"):
        for row in figures[name]:
            log(f"{row['label']}: {report.shown(row.get('ms_per_layer') or row.get('seconds'))}")
    return report.record("parallel", device, model=facts.name, num_blocks=layers, plan=plan, gpus=gpus, **figures)


def measure(facts, pixels: dict, layers: int, plan, gpus, warm_up_s, timed_s, device, chunks, vae) -> dict:
    """What every rank does; rank 0's figures are the record's."""
    import torch
    from torch import nn

    here = place()
    if device == "cuda":
        torch.cuda.set_device(here.local_rank)
    transformer = build(facts, None, device, layers)
    alone, engine = arranged(facts, transformer, plan, None)
    eight_bits = engine.plan.attention.kernel == "int8"
    tokens = facts.tokens(**pixels)
    with torch.no_grad(), joined(here, device, {"code": code_digest()}):
        clock = Clock(device, warm_up_s, timed_s)
        ready, rows = {}, []
        one = Way("one GPU, the slower", {})
        for way in (one, *ways(gpus, chunks, eight_bits)):
            pipe, engine = (alone, engine) if way is one else arranged(facts, transformer, plan, way.parallel)
            run = call_of(facts, pixels, pipe.transformer, device, way.branches)
            output = run().float()
            if way is one:
                reference = output
            error = relative(output, reference)
            if not error <= SAME:
                raise DaxError("check_failed", f"{way.label}: result lies {error:.4f} from one GPU's, limit {SAME}")
            ready[way.label] = way, run, pipe.transformer, error
            mine() and mine().enter(f"bench {way.label}")
        times = {label: [] for label in ready}
        for _ in range(ROUNDS):
            for label, (_, run, _, _) in ready.items():
                times[label].append(clock.ms(run))
        for label, (way, run, model, error) in ready.items():
            blocks, model.blocks = model.blocks, nn.ModuleList()
            around_ms = clock.ms(run, short=True)
            model.blocks = blocks
            rows.append(line(way, median(times[label]), around_ms, layers, facts, error, clock))
        for row in rows:
            row["speedup"] = rows[0]["layer_and_branch_ms"] / row["layer_and_branch_ms"]
            row["predicted"] = predicted(row, facts, tokens, device, eight_bits, engine.plan)
        decodes = decode_rows(pixels, facts, device, clock) if vae else []
        link = links(device, gpus) if device == "cuda" else []
    return {**pixels, "tokens": tokens, "rows": rows, "vae": decodes, "links": link}


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


def call_of(facts, pixels: dict, model, device: str, branches: int):
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


class Clock:
    """Milliseconds of a call that all ranks make together: the same number of times on each, and the slowest counts."""

    def __init__(self, device: str, warm_up_s: float, timed_s: float):
        from dax.bench.timing import sensor

        self.device, self.warm_up_s, self.timed_s = device, warm_up_s, timed_s
        self.read = sensor(device) if device == "cuda" else None
        self.sm_mhz = self.watts = None

    def ms(self, call, short: bool = False) -> float:
        """Of one call, back to back after a warm-up; a tenth of the time when `short`."""
        from dax.bench.timing import Sensors, summarise

        share = 0.1 if short else 1.0
        first = self.together(self.several(call, 1))
        self.several(call, ceil(share * self.warm_up_s / first))
        count = ceil(share * self.timed_s / ROUNDS / first)
        with Sensors(self.read) as sensors:
            seconds = self.together(self.several(call, count))
        if not short:
            reading = summarise(sensors.rows)
            self.sm_mhz, self.watts = reading.sm_mhz, reading.watts
        return 1e3 * seconds / count

    def several(self, call, count: int) -> float:
        """Seconds of so many calls on this rank."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        import torch
        import torch.distributed as dist

        if self.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def together(self, seconds: float) -> float:
        """The longest of all ranks."""
        import torch
        import torch.distributed as dist

        longest = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return longest.item()


def line(way: Way, ms: float, around_ms: float, layers: int, facts, error: float, clock: Clock) -> dict:
    """One row. `ms_per_layer` of a step's two branches where one call answers for both, else of one."""
    layer_ms = (ms - around_ms) / layers
    each = layer_ms / way.branches
    return {
        "label": way.label,
        "parallel": way.parallel,
        "ms_per_layer": layer_ms,
        "layer_and_branch_ms": each,
        "around_ms": around_ms,
        "video_s": (each * facts.num_layers + around_ms / way.branches) * 2 * facts.defaults.steps / 1e3,
        "error": error,
        "sm_mhz": clock.sm_mhz,
        "watts": clock.watts,
    }


def predicted(row: dict, facts, tokens: int, device: str, eight_bits: bool, plan) -> float | None:
    """The planner's speed-up for the row; None without a data sheet."""
    from dax.hardware import machine
    from dax.parallel.planner import cluster_of, predict
    from dax.parallel.topology import Topology

    way = row["parallel"]
    attention = "bf16" if plan.attention.kernel not in ("int8", "sage") else "8bit"
    cluster = cluster_of(machine(device), attention, "8bit" if plan.linear.active else "bf16")
    if cluster is None or not way:
        return None
    topology = Topology(way["cfg"], way["ulysses"], way["rows"])
    wire_bytes = 1 if eight_bits and way.get("wire") != "plain" else 2
    return predict(facts, tokens, topology, cluster, way.get("overlap", 0), wire_bytes).speedup


def decode_rows(pixels: dict, facts, device: str, clock: Clock) -> list[dict]:
    """The VAE's decode of one clip on one rank and split over all, in fp32, random weights."""
    import torch
    import torch.distributed as dist
    from diffusers import AutoencoderKLWan

    from dax.edits import Edits
    from dax.parallel.vae import apply_vae
    from dax.parallel.wire import Wire

    torch.manual_seed(0)
    small = {"base_dim": 16, "decoder_base_dim": None, "num_res_blocks": 1} if device == "cpu" else {}
    config = RESIDUAL_VAE if facts.token_time else {}
    vae = AutoencoderKLWan(**config | small).to(device).eval()
    _, frames, height, width = facts.latent_shape(**pixels)
    z = torch.randn(1, facts.out_channels, frames, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    rows, clips, edits = [], [], Edits()
    for label in ("VAE decode, one GPU", "VAE decode, split"):
        if clips:
            apply_vae(vae, Wire(dist.group.WORLD), edits)
        clips.append(vae.decode(z, return_dict=False)[0].cpu())
        seconds = clock.together(clock.several(lambda: vae.decode(z, return_dict=False), 1))
        rows.append({"label": label, "seconds": seconds, "speedup": rows[0]["seconds"] / seconds if rows else 1.0})
    edits.undo()
    rows[1]["error"] = relative(clips[1], clips[0])
    return rows


def links(device: str, gpus: int) -> list[dict]:
    """All-to-all over all ranks at several sizes: what the planner's link should be."""
    import torch
    import torch.distributed as dist

    clock, found = Clock(device, 0.2, 0.4), []
    for mib in (4, 16, 64, 128, 256):
        send = torch.empty(mib * gpus * 2**20, dtype=torch.uint8, device=device)
        receive = torch.empty_like(send)
        ms = clock.ms(partial(dist.all_to_all_single, receive, send))
        leaving = mib * 2**20 * (gpus - 1)
        found.append({"leaving_mb": leaving / 1e6, "ms": ms, "gb_per_s": leaving / ms / 1e6})
    return found


def relative(x, reference) -> float:
    return ((x - reference).norm() / reference.norm()).item()
