"""The job, from a prompt to a file, in one direction: check everything, load, optimize, text, denoise, decode, write.

Whatever can be refused is refused before a weight is read. The loop is the pipeline's own; here are only the stages
around it, their clocks, and the record of what was done.
"""

import resource
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dax.cache.policy import maker
from dax.cache.step_plan import Setting, flow_sigmas
from dax.edits import Edits
from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate import video
from dax.generate.preflight import Checked, locate, preflight, verify
from dax.generate.ranks import count_of, parallel_plan, team
from dax.generate.request import check_memory, make_request, request_fields
from dax.models.tiny import FOLDER
from dax.parallel.join import place
from dax.parallel.launch import run_ranks
from dax.plan import DEFAULT_PRESET, Plan, parse_set, plan_layer
from dax.provenance import check_min_psnr, computes, read_measured


@dataclass(frozen=True)
class Job:
    """What `dax generate` was asked for. `given` holds the request's fields that were stated.

    `from_clip` is an earlier clip whose request, model and plan stand where nothing else is stated.
    """

    given: dict
    output: str | None = None
    model: str | None = None
    plan: str | None = None
    sets: tuple[str, ...] = ()
    device: str | None = None
    overwrite: bool = False
    round: bool = False
    verify: bool = False
    strict: bool = False
    allow_empty_prompt: bool = False
    keep_frames_on_error: str | None = None
    from_clip: str | None = None
    gpus: int = 1
    min_psnr: float | None = None


@dataclass
class Clock:
    """Seconds per stage. `enter` is told each stage's name as it begins."""

    enter: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str):
        self.enter(name)
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[name] = round(time.perf_counter() - start, 3)


def generate(job: Job, log=lambda text: None) -> dict | None:
    """Run the job and return its record, the JSON object of `dax generate --json`.

    With `gpus` above 1 it starts that many ranks of itself; on a rank other than 0 it returns None.

    DaxError before anything is loaded for a bad request, plan, model or output; "check_failed" for a clip that is not
    finite; "cannot_write" when the file cannot be written. Costs the model's bytes and its run time.
    """
    start = time.perf_counter()
    at, count = count_of(job.gpus, job.device)
    job, earlier = with_earlier(job)
    checked = check_model(job.model)
    facts = checked.facts
    request, remarks = make_request(facts, job.given, job.round, job.allow_empty_prompt)
    asked, _ = Plan.from_layers(plan_layers(job, earlier))
    if earlier.get("model_digest", checked.digest) != checked.digest:
        remarks.append(f"the model is not the one of {job.from_clip}: its digest differs")

    import torch

    from dax.hardware import machine
    from dax.optimize import resolve

    here = machine(job.device)
    dtype = torch.bfloat16 if here.device == "cuda" else torch.float32
    check_memory(facts, request, checked.parameters * dtype.itemsize, dtype.itemsize, here.memory_gib)
    checkpoint = None if asked.cache.policy == "none" else checkpoint_of(checked)
    dtype_name = str(dtype).removeprefix("torch.")
    asked, shares = parallel_plan(asked, request, facts, count, job.strict, remarks)
    resolved = resolve(asked, facts, here, job.strict, dtype_name, checkpoint, shares)  # before loading
    asked = asked.model_copy(update={"parallel": resolved.plan.parallel})
    check_steps(resolved, facts, request, checkpoint)
    measured = read_measured(job.plan) if job.plan else None
    elsewhere = measured.differences(checked.digest, here.name, resolved.plan, asdict(request)) if measured else []
    if elsewhere and job.strict:
        raise DaxError("unsupported", f"--strict: plan {job.plan} was measured elsewhere: {'; '.join(elsewhere)}")
    remarks += [f"the plan's fidelity was measured elsewhere: {text}" for text in elsewhere]
    if job.min_psnr is not None:
        exact = computes(resolved.plan) == computes(resolve(Plan(), facts, here, dtype=dtype_name).plan)
        check_min_psnr(job.min_psnr, measured, elsewhere, exact)
    path = Path(job.output or video.default_name(request.prompt, request.seed, resolved.plan.hash()))
    if at.first:
        check_outputs(job, path)
    if count > at.count:
        return run_ranks(generate_here, (replace(job, output=str(path)),), count)
    if job.verify and at.first:
        remarks += verify(checked)

    agreed = {"request": repr(request), "plan": resolved.plan.hash(), "model": checked.digest, "device": here.name}
    with team(at, here.device, agreed) as ranks, out_of_memory(request):
        clock = Clock(ranks.enter)
        with clock.stage("load"):
            pipe = load(checked, here.device, dtype, ranks.first)
            checked.unchanged()
            set_flow_shift(pipe, request.flow_shift)
        from dax.optimize import optimize

        with optimize(pipe, asked, strict=job.strict) as engine, Forwards(pipe.transformer) as forwards:
            remarks += engine.fallbacks
            log(engine.summary())
            with clock.stage("text"):
                shape, guided = (1, facts.text_tokens, facts.text_dim), request.guidance_scale > 1
                embeds = ranks.share_text(
                    lambda: encode(pipe, request, remarks), shape, guided, pipe.transformer.dtype, pipe.device
                )
            with clock.stage("denoise"), warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                ranks.step(0, request.steps)
                latents = denoise(
                    pipe, request, *embeds, lambda step, _: ranks.step(step + 1, request.steps), not ranks.first
                )
            remarks += dict.fromkeys(str(w.message) for w in found if str(w.message).startswith("step cache:"))
            computed = ranks.most(forwards.computed)
            with clock.stage("decode"):
                frames = decode(pipe, latents) if ranks.first or engine.plan.parallel.vae == "split" else None
    if not ranks.first:
        return None
    record = {
        "path": str(path),
        "model": job.model or "tiny",
        "model_digest": checked.digest,
        **asdict(request),
        "plan": engine.plan.model_dump(),
        "plan_hash": engine.plan.hash(),
        "computed": computed,
        "ranks": ranks.count,
        "peak_memory_gib": round(peak_memory_gib(here.device), 2),
        "device": here.name,
        "versions": {**here.packages, "dax-engine": version(), "python": sys.version.split()[0]},
        "warnings": remarks,
    }
    rescue = Path(job.keep_frames_on_error) if job.keep_frames_on_error else None
    try:
        with clock.stage("write"):
            # the record in the file cannot know how long writing it takes
            video.write(path, frames, request.fps, {**record, "seconds": dict(clock.seconds)}, job.overwrite)
    except DaxError as error:
        if rescue is None:
            raise
        video.write(rescue, frames, request.fps, record)
        raise DaxError(error.code, f"{error}; the frames are in {rescue}") from None
    total = round(time.perf_counter() - start, 3)
    return {**record, "seconds": {**clock.seconds, "total": total}}


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


def with_earlier(job: Job) -> tuple[Job, dict]:
    """The job with what an earlier clip tells filled in, and that clip's record ({} without one)."""
    if job.from_clip is None:
        return job, {}
    record = video.read_record(Path(job.from_clip))
    stated = {name: value for name, value in job.given.items() if value is not None}
    model = job.model or record.get("model")
    if not isinstance(model, str | None):
        raise DaxError("bad_request", f"{job.from_clip}: its record names no model")
    return replace(job, given={**request_fields(record), **stated}, model=model), record


def plan_layers(job: Job, earlier: dict) -> list[tuple[str, dict]]:
    """Lowest first: --plan, else the plan of an earlier clip, else the default preset; then each --set."""
    if job.plan is None and "plan" in earlier:
        # how ranks shared the work then does not matter now
        plan = {key: value for key, value in earlier["plan"].items() if key != "parallel"}
        base = (f"clip {job.from_clip}", plan)
    else:
        base = plan_layer(job.plan or DEFAULT_PRESET)
    return [base, *((f"--set {text}", parse_set(text)) for text in job.sets)]


def check_model(model: str | None) -> Checked:
    """The preflight of the folder, the hub's model or the embedded one."""
    if model in (None, "tiny"):
        return preflight(FOLDER)
    if model in FACTS:
        raise DaxError("bad_model", f"--model {model}: only its shapes are known; give a diffusers folder or a hub id")
    return preflight(locate(model))


def load(checked: Checked, device: str, dtype, text: bool = True):
    """The pipeline, from safetensors only and nothing but local files. The VAE stays in fp32, as its authors run it.

    Weights go to the device tensor by tensor, so that several ranks do not hold a copy each in the host's memory.
    text   whether to load the text encoder, the largest part after the transformer
    """
    import torch
    from diffusers import WanPipeline, WanTransformer3DModel

    local = {"use_safetensors": True, "local_files_only": True}
    without = {} if text else {"text_encoder": None, "tokenizer": None}
    try:
        with quiet():
            transformer = WanTransformer3DModel.from_pretrained(
                checked.folder, subfolder="transformer", dtype=dtype, device_map={"": device}, **local
            )
            pipe = WanPipeline.from_pretrained(
                checked.folder,
                transformer=transformer,
                dtype={"default": dtype, "vae": torch.float32},
                **without,
                **local,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DaxError("bad_model", f"{checked.folder}: diffusers cannot load it: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def quiet():
    """Libraries keep their own progress bars and advice to themselves meanwhile."""
    import diffusers.utils.logging as diffusers
    import transformers.utils.logging as transformers

    libraries = (diffusers, transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, (verbosity, bars) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()


def set_flow_shift(pipe, flow_shift: float) -> None:
    """Give the pipeline a scheduler of the same kind with that shift of its noise levels."""
    name = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    if pipe.scheduler.config.get(name) != flow_shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{name: flow_shift})


def encode(pipe, request, remarks: list[str]):
    """Embeddings of the prompt and of the negative one (None without guidance), each [1, 512, text_dim]."""
    import torch

    length = len(pipe.tokenizer(pipe_clean(request.prompt)).input_ids)
    limit = 512
    if length > limit:
        remarks.append(f"the prompt has {length} tokens: the last {length - limit} are not used")
    with torch.no_grad():
        return pipe.encode_prompt(
            request.prompt,
            request.negative_prompt,
            do_classifier_free_guidance=request.guidance_scale > 1,
            max_sequence_length=limit,
            device=pipe._execution_device,
        )


def pipe_clean(text: str) -> str:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(text)


def denoise(
    pipe, request, prompt_embeds, negative_embeds, on_step=lambda step, latents: None, quietly: bool = False
):
    """The pipeline's own loop, noise from a CPU generator so that a seed means the same everywhere.

    on_step   called after every step with its number from 0 and the latents, which it must not change
    Returns latents [1, 16, F, H / 8, W / 8] fp32. DaxError("check_failed") if one is not finite.
    """
    import torch
    from tqdm import tqdm

    disable = quietly or None  # None: where there is no terminal
    with tqdm(total=request.steps, desc="denoise", unit="step", disable=disable, file=sys.stderr) as bar:

        def step_done(pipe, step, timestep, tensors):
            bar.update()
            on_step(step, tensors["latents"])
            return {}

        latents = pipe(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_embeds,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            callback_on_step_end=step_done,
            callback_on_step_end_tensor_inputs=["latents"],
        ).frames
    if not torch.isfinite(latents).all():
        raise DaxError("check_failed", f"the latents are not finite after {request.steps} steps: no clip was written")
    return latents


def decode(pipe, latents):
    """Latents to frames [T, H, W, 3] uint8 (numpy). DaxError("check_failed") if a pixel is not finite."""
    import torch

    vae = pipe.vae
    shape = (1, vae.config.z_dim, 1, 1, 1)
    latents = latents.to(vae.device, vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    with torch.no_grad():
        clip = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
    if not torch.isfinite(clip).all():
        raise DaxError("check_failed", "the decoded frames are not finite: no clip was written")
    frames = pipe.video_processor.postprocess_video(clip, output_type="np")[0]
    return (frames * 255).round().astype("uint8")


class Forwards:
    """Counts the forwards that really run the blocks, by the branch the pipeline announces; `computed` is the count."""

    def __init__(self, transformer):
        self.transformer, self.branch, self.edits = transformer, "cond", Edits()
        self.computed = {"cond": 0, "uncond": 0}

    def __enter__(self):
        self.handle = self.transformer.blocks[0].register_forward_pre_hook(self.add)
        self.vendor_context = self.edits.set_attribute(self.transformer, "cache_context", self.cache_context)
        return self

    def __exit__(self, *_):
        self.handle.remove()
        self.edits.undo()

    @contextmanager
    def cache_context(self, name: str, **announced):
        self.branch = name
        with self.vendor_context(name, **announced):
            yield

    def add(self, *_) -> None:
        self.computed[self.branch] += 1


def checkpoint_of(checked) -> str:
    """The digest a calibration of this checkpoint carries, from its folder."""
    from dax.cache.checkpoint import TENSOR, folder_digest
    from dax.generate.checkpoint import read_weights

    tensors = read_weights(checked.folder / "transformer", "diffusion_pytorch_model")[0]
    return folder_digest(tensors[TENSOR].file, checked.facts.num_layers)


def check_steps(resolved, facts, request, checkpoint: str | None):
    """The step plan of a resolved plan as far as it is known without weights, else None.

    DaxError("bad_request") if it cannot serve the request.
    """
    if resolved.plan.cache.policy == "none":
        return None
    setting = Setting(
        steps=request.steps,
        flow_shift=request.flow_shift,
        guidance_scale=request.guidance_scale,
        checkpoint=checkpoint,
    )
    make = maker(resolved.plan.cache, resolved.calibration, facts.name)
    return make(setting, flow_sigmas(request.steps, request.flow_shift))


@contextmanager
def out_of_memory(request):
    """Turn a failed allocation into one line with ways out."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if "allocate memory" not in str(error):
                raise
        raise DaxError(
            "out_of_memory",
            f"{request.height}x{request.width}x{request.num_frames} does not fit: fewer frames, a smaller size, or a "
            "device with more memory",
        ) from error


def synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_gib(device: str) -> float:
    """Of the device's allocator, or of the whole process on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def version() -> str:
    from dax import __version__

    return __version__


def last_line(record: dict) -> str:
    """What people quote: file, clip, time, forwards, device, plan."""
    seconds, computed = record["seconds"], record["computed"]
    return (
        f"{record['path']}: {record['num_frames']} frames {record['width']}x{record['height']} in "
        f"{seconds['total']:.1f} s (denoise {seconds['denoise']:.1f} s, {record['steps']} steps, "
        f"{computed['cond']} + {computed['uncond']} forwards), {record['peak_memory_gib']:.1f} GiB, on "
        f"{record['device']}, plan {record['plan_hash'][:8]}, seed {record['seed']}"
    )
