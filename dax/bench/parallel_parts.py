"""What `dax bench parallel` measures besides the transformer: the link, the VAE's decode, and a whole clip's fidelity.

A part has up to two halves: what a rank does before there are other ranks, and what all do together.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

from dax.facts import FACTS, Facts
from dax.parallel.topology import topologies

LINK_MIB = (4, 16, 64, 128, 256)
WARM_FRAMES = 3  # latent frames after which the VAE has met every shape of a longer clip
CLIP_PROMPTS, CLIP_STEPS = 4, 20
RESIDUAL_VAE = {  # that of Wan2.2 TI2V-5B
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What every rank is told. pixels: height, width, num_frames.  layers: blocks that are built.  log: rank 0's."""

    facts: Facts
    pixels: dict
    layers: int
    plan: object
    gpus: int
    device: str
    warm_up_s: float
    timed_s: float
    chunks: int
    log: Callable


@dataclass(frozen=True)
class Part:
    """together(job, clock, what `alone` returned) gives rows; alone(job) runs before there are other ranks."""

    together: Callable
    alone: Callable = lambda job: None


def link_rows(job: Job, clock, before) -> list[dict]:
    """All-to-all over all ranks at several sizes: what the planner's link should be."""
    import torch
    import torch.distributed as dist

    found = []
    for mib in LINK_MIB if job.device == "cuda" else LINK_MIB[:2]:
        send = torch.empty(mib * job.gpus * 2**20, dtype=torch.uint8, device=job.device)
        receive = torch.empty_like(send)
        ms, _ = clock.sustained_ms(partial(dist.all_to_all_single, receive, send), share=0.1)
        leaving = mib * 2**20 * (job.gpus - 1)
        found.append({"leaving_mb": leaving / 1e6, "ms": ms, "gb_per_s": leaving / ms / 1e6})
        clock.tell(f"all-to-all, {leaving / 1e6:.0f} MB leave a GPU: {ms:.3f} ms, {leaving / ms / 1e6:.1f} GB/s")
    return found


def decode_rows(job: Job, clock, before) -> list[dict]:
    """The VAE's decode of one clip on one rank and split over all, in fp32, random weights."""
    import torch
    import torch.distributed as dist
    from diffusers import AutoencoderKLWan

    from dax.edits import Edits
    from dax.parallel.vae import apply_vae
    from dax.parallel.wire import Wire

    torch.manual_seed(0)
    config = RESIDUAL_VAE if job.facts.token_time else {}
    small = {"base_dim": 16, "decoder_base_dim": None, "num_res_blocks": 1} if job.device == "cpu" else {}
    vae = AutoencoderKLWan(**config | small).to(job.device).eval()
    shape = 1, job.facts.out_channels, *job.facts.latent_shape(**job.pixels)[1:]
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(job.device)
    rows, clips, edits = [], [], Edits()

    def decode():
        clips.append(vae.decode(z, return_dict=False)[0])

    for label in ("VAE decode, one GPU", "VAE decode, split"):
        if clips:
            apply_vae(vae, Wire(dist.group.WORLD), edits)
        vae.decode(z[:, :, :WARM_FRAMES], return_dict=False)
        seconds = clock.seconds(decode)
        clips[-1] = clips[-1].cpu()
        speedup, error = rows[0]["seconds"] / seconds if rows else 1.0, clock.together(relative(clips[-1], clips[0]))
        rows.append({"label": label, "seconds": seconds, "speedup": speedup, "error": error})
        clock.tell(f"{label}: {seconds:.2f} s, {speedup:.2f} times one, error {error:.1e}")
    edits.undo()
    return rows


def clip_alone(job: Job):
    """(the tiny model's pipeline, latents of a few clips by plan exact on one GPU, how far the noise floor is from
    them, what that is)"""
    import torch

    import dax
    from dax.bench.compare_run import rounded_attention
    from dax.bench.compare_variants import floor
    from dax.generate.stages import quiet
    from dax.hardware import machine
    from dax.models.tiny import load_tiny
    from dax.plan import Plan

    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    with quiet():
        pipe = load_tiny(job.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    with dax.optimize(pipe, "exact"):
        latents = clip(pipe)
    harmless = floor(Plan.load("exact"), machine(job.device), str(dtype).removeprefix("torch."), 128)
    with dax.optimize(pipe, harmless.asked), rounded_attention(pipe) if harmless.rounded else nullcontext():
        return pipe, latents, relative(clip(pipe), latents), harmless.description


def clip_rows(job: Job, clock, before) -> list[dict]:
    """How far the latents of clips on all ranks end from one rank's, beside the noise floor."""
    import dax

    pipe, alone, floor, described = before
    floor, rows = clock.together(floor), []
    for parallel in clip_ways(job.gpus):
        with dax.optimize(pipe, "exact", parallel=parallel) as engine:
            error = clock.together(relative(clip(pipe), alone))
            way = next(note for note in engine.notes if note.startswith("parallel:"))
        rows.append({"label": f"tiny clip, {way}", "error": error, "floor": floor, "floor_is": described})
        clock.tell(f"{rows[-1]['label']}: latents {error:.2e} off, noise floor {floor:.2e} ({described})")
    return rows


def clip_ways(gpus: int) -> list[dict]:
    """A plan's parallel part by sequence, and by guidance where that can be, each with the most columns of heads."""
    by_columns = sorted(topologies(gpus, FACTS["tiny"].num_heads), key=lambda topology: topology.ulysses)
    most = {topology.cfg: topology for topology in by_columns}
    return [asdict(most[cfg]) | {"overlap": min(most[cfg].ulysses, 2), "vae": "none"} for cfg in sorted(most)]


def clip(pipe):
    """Latents of the tiny model's first held-out captions, on the CPU in fp32; noise from a CPU generator."""
    import torch

    from dax.bench.prompts import default_prompts, read_prompts

    prompts = read_prompts(default_prompts("tiny", held_out=True))[:CLIP_PROMPTS]
    return (
        pipe(
            prompt=prompts,
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=CLIP_STEPS,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        .frames.float()
        .cpu()
    )


def relative(x, reference) -> float:
    """||x - reference|| / ||reference||."""
    return ((x - reference).norm() / reference.norm()).item()
