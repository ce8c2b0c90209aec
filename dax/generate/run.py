"""The job, from a prompt to a file, in one direction: check everything, load, optimize, text, denoise, decode, write.

Whatever can be refused is refused before a weight is read: settle.py. The stages themselves are in stages.py; here are
their order and the record of what was done.
"""

import sys
import time
import warnings
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from dax.errors import DaxError
from dax.generate import video
from dax.generate.preflight import verify
from dax.generate.ranks import team
from dax.generate.settle import Job, Settled, dtype_of, settle
from dax.generate.stages import (
    Clock,
    Forwards,
    decode,
    denoise,
    encode,
    import_vendor,
    load,
    out_of_memory,
    peak_memory_gib,
    release,
    set_flow_shift,
    total,
)
from dax.imports import importing
from dax.parallel.join import place
from dax.parallel.launch import run_ranks
from dax.quant.stored import counted


def generate(job: Job, log=lambda text: None) -> dict | None:
    """Run the job and return its record, the JSON object of `dax generate --json`.

    With `gpus` above 1 it starts that many ranks of itself; on a rank other than 0 it returns None.

    DaxError before anything is loaded for a bad request, plan, model or output; "check_failed" for a clip that is not
    finite; "cannot_write" when the file cannot be written. Costs the model's bytes and its run time.
    """
    start = time.perf_counter()
    with importing():
        settled = settle(job)
    if settled.place.first:
        check_outputs(settled.job, settled.path)
    if settled.count > settled.place.count:
        return run_ranks(generate_here, (replace(settled.job, output=str(settled.path)),), settled.count)
    if job.verify and settled.place.first:
        settled.remarks.extend(verify(settled.checked))
    made = make(settled, log)
    if made is None:
        return None
    frames, record, clock = made
    with clock.stage("write"):  # the record in the file cannot know how long writing it takes
        write(settled, frames, {**record, "seconds": dict(clock.seconds)})
    return {**record, "seconds": {**clock.seconds, "total": round(time.perf_counter() - start, 3)}}


def make(settled: Settled, log):
    """(frames, record, clock) of the clip, on the first rank; None on the others."""
    job, checked, request, here = settled.job, settled.checked, settled.request, settled.here
    agreed = {
        "request": repr(request),
        "plan": settled.resolved.plan.hash(),
        "model": checked.digest,
        "LoRAs": repr(settled.loras),
        "images": repr(settled.pictures),
        "device": here.name,
    }
    with team(settled.place, here.device, agreed) as ranks, out_of_memory(request):
        clock = Clock(ranks.enter)
        with clock.stage("load"):
            wanted = settled.resolved.plan
            # not first in load(): vendors keep errors, whose frames keep models
            import_vendor(checked.facts, here.device)
            waits = wanted.linear.active or wanted.offload == "experts"  # then optimize() brings the second expert over
            pipe = load(checked, here.device, dtype_of(here), ranks.first, "cpu" if waits else here.device)
            checked.unchanged()
            set_flow_shift(pipe, request.flow_shift)
            loras = [fused(pipe.transformer, *lora) for lora in settled.loras]
        latents, frames, plan, each = denoised(settled, pipe, ranks, clock, log)
        if plan.parallel.vae != "split":
            release(pipe, "transformer", "transformer_2", "image_encoder")
            with clock.stage("decode"):
                frames = decode(pipe, latents) if ranks.first else None
    if not ranks.first:
        return None
    record = {
        "path": str(settled.path),
        "model": job.model or "tiny",
        "model_digest": checked.digest,
        **({"stored_linear": counted(checked.stored)} if checked.stored else {}),
        "loras": loras,
        "images": [picture.record() for picture in settled.pictures],
        **asdict(request),
        "plan": plan.model_dump(),
        "plan_hash": plan.hash(),
        "computed": total(each),
        **({"computed_by_expert": each} if len(each) == 2 else {}),
        "ranks": ranks.count,
        "peak_memory_gib": round(peak_memory_gib(here.device), 2),
        "device": here.name,
        "versions": {**here.packages, "dax-engine": version(), "python": sys.version.split()[0]},
        "warnings": settled.remarks,
    }
    return frames, record, clock


def denoised(settled: Settled, pipe, ranks, clock, log):
    """(latents, frames where all ranks decode them together, the plan that was installed, forwards of each expert)."""
    from dax.optimize import optimize

    facts, request, remarks = settled.checked.facts, settled.request, settled.remarks
    experts = [pipe.transformer, *([pipe.transformer_2] if facts.num_experts == 2 else [])]
    tokens, frames = facts.tokens(request.height, request.width, request.num_frames), None
    with optimize(pipe, settled.asked, settled.job.strict, tokens) as engine, Forwards(*experts) as forwards:
        remarks.extend(engine.fallbacks)
        log(engine.summary())
        with clock.stage("text"):
            shape, guided = (1, facts.text_tokens, facts.text_dim), request.guidance_scale > 1
            embeds = ranks.share_text(
                lambda: encode(pipe, request, remarks), shape, guided, pipe.transformer.dtype, pipe.device
            )
            release(pipe, "text_encoder")
        with clock.stage("denoise"), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ranks.step(0, request.steps)
            latents = denoise(
                pipe,
                request,
                *embeds,
                lambda step, _: ranks.step(step + 1, request.steps),
                not ranks.first,
                [picture.pixels for picture in settled.pictures],
            )
        remarks.extend(dict.fromkeys(str(w.message) for w in found if str(w.message).startswith("step cache:")))
        each = [ranks.most(counts) for counts in forwards.each]
        if engine.plan.parallel.vae == "split":
            with clock.stage("decode"):
                frames = decode(pipe, latents)
        return latents, frames, engine.plan, each


def write(settled: Settled, frames, record: dict) -> None:
    """The clip at its path. If that fails, the frames are saved where --keep-frames-on-error says."""
    job, request = settled.job, settled.request
    try:
        video.write(settled.path, frames, request.fps, record, job.overwrite)
    except DaxError as error:
        if not job.keep_frames_on_error:
            raise
        video.write(Path(job.keep_frames_on_error), frames, request.fps, record)
        raise DaxError(error.code, f"{error}; the frames are in {job.keep_frames_on_error}") from None


def fused(transformer, path: Path, scale: float) -> dict:
    """Add a LoRA to the weights; what the record tells of it."""
    from dax.models.lora import fuse_lora

    layers = fuse_lora(transformer, path, scale)
    return {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest(), "scale": scale, "layers": layers}


def generate_here(job: Job) -> dict | None:
    """generate() as one of the ranks it has started."""
    return generate(job, lambda text: print(text, file=sys.stderr, flush=True) if place().first else None)


def check_outputs(job: Job, path: Path) -> None:
    """DaxError("cannot_write") if the clip, or what is to be saved of it on an error, could not be written."""
    video.check_target(path, job.overwrite)
    if job.keep_frames_on_error:
        rescue = Path(job.keep_frames_on_error)
        if rescue.suffix != ".npz" or rescue == path:
            raise DaxError("cannot_write", f"--keep-frames-on-error {rescue}: must be another file, ending in .npz")
        video.check_target(rescue, overwrite=False)


def version() -> str:
    from dax import __version__

    return __version__


def last_line(record: dict) -> str:
    """What people quote: file, clip, time, forwards, device, plan."""
    seconds, computed = record["seconds"], record["computed"]
    return (
        f"{record['path']}: {count(record['num_frames'], 'frame')} {record['width']}x{record['height']} in "
        f"{seconds['total']:.1f} s (denoise {seconds['denoise']:.1f} s, {count(record['steps'], 'step')}, "
        f"{computed['cond']} + {computed['uncond']} forwards), {record['peak_memory_gib']:.1f} GiB, on "
        f"{record['device']}, plan {record['plan_hash'][:8]}, seed {record['seed']}"
    )


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
