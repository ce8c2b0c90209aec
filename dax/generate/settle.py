"""A job with everything decided that can be, and everything refused that must be, before a weight is read."""

from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path

from dax.errors import DaxError
from dax.facts import FACTS
from dax.facts_config import named
from dax.generate import video
from dax.generate.checkpoint import check_dtypes, read_header
from dax.generate.image import Picture, read_images, stretched
from dax.generate.preflight import Checked, locate, preflight
from dax.generate.ranks import count_of, parallel_plan
from dax.generate.request import Released, Request, check_memory, experts_bytes, make_request, request_fields
from dax.generate.stages import import_vendor
from dax.generate.steps import checkpoint_of, schedule
from dax.hardware import Machine, machine
from dax.models.tiny import FOLDER
from dax.parallel.cost import window_bytes
from dax.parallel.join import Place
from dax.parallel.topology import Topology
from dax.plan import DEFAULT_PRESET, Plan, parse_set, plan_layer
from dax.provenance import check_min_psnr, computes, read_measured
from dax.resolve import Resolved, resolve


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
    loras: tuple[str, ...] = ()
    image: str | None = None
    last_image: str | None = None


@dataclass(frozen=True)
class Settled:
    """A job with everything decided that can be before a weight is read. `remarks` grows into the record's warnings."""

    job: Job
    checked: Checked
    request: Request
    asked: Plan
    resolved: Resolved
    loras: tuple[tuple[Path, float], ...]
    pictures: tuple[Picture, ...]
    path: Path
    here: Machine
    place: Place
    count: int
    remarks: list[str]


def settle(job: Job) -> Settled:
    """Decide all that can be decided, and refuse all that can be refused, without a weight."""
    at, count = count_of(job.gpus, job.device)
    job, earlier = with_earlier(job)
    checked = check_model(job.model, family=True)
    request, remarks = make_request(checked.facts, job.given, job.round, job.allow_empty_prompt)
    facts = named(checked.facts, request.flow_shift)  # the one that optimize() will see
    pictures = read_images(facts, job.image, job.last_image)
    if len(pictures) > request.num_frames:
        raise DaxError("bad_request", f"num_frames {request.num_frames}: a first and a last frame are two")
    remarks += stretched(pictures, request.height, request.width)
    loras = tuple(map(parse_lora, job.loras))
    if loras and facts.num_experts == 2:
        raise DaxError(
            "bad_request",
            f"--lora: {facts.name} has two experts and a file is for one of them: in Python, give each its own with "
            "dax.models.lora.fuse_lora before dax.optimize",
        )
    if loras and checked.stored:
        raise DaxError(
            "bad_request",
            f"--lora: the linear layers of {checked.folder} were saved in 8 bits: fuse it into the original weights",
        )
    asked, given = Plan.from_layers(plan_layers(job, earlier))
    if asked.linear.active and given["linear.keep_original"] == "default":  # nothing is undone before the job ends
        asked = asked.model_copy(update={"linear": asked.linear.model_copy(update={"keep_original": "none"})})
    if earlier.get("model_digest", checked.digest) != checked.digest:
        remarks.append(f"the model is not the one of {job.from_clip}: its digest differs")
    if earlier.get("loras") and not loras:
        remarks.append(f"{job.from_clip} was made with LoRAs: pass them again with --lora")

    here = machine(job.device)
    if here.device == "cuda" and count == at.count:  # this process will load the model; resolve() may try kernels
        import_vendor(facts, here.device)
    dtype = dtype_of(here)
    checkpoint = None if asked.cache.policy == "none" else checkpoint_of(checked.folder, facts)
    name = str(dtype).removeprefix("torch.")
    asked, shares = parallel_plan(asked, request, facts, count, job.strict, remarks)
    resolved = resolve(asked, facts, here, job.strict, name, checkpoint, shares, checked.stored)
    untimed = {"overlap": asked.parallel.overlap}  # optimize() measures where that is `auto`
    asked = asked.model_copy(update={"parallel": resolved.plan.parallel.model_copy(update=untimed)})
    others = checked.parameters - facts.num_experts * facts.num_parameters
    experts = experts_bytes(facts, resolved.plan, dtype.itemsize, bool(checked.stored))
    kept, text = others * dtype.itemsize + experts, checked.text_parameters * dtype.itemsize
    together = resolved.plan.parallel.vae == "split"
    released = Released(text, 0, count) if together else Released(text, experts)
    if here.device == "cuda" and resolved.plan.compile == "none":
        part = resolved.plan.parallel
        topology = Topology(part.cfg, part.ulysses, part.rows)
        kept += window_bytes(facts, shares.tokens, topology, part.wire_bytes)
    check_memory(facts, request, kept, dtype.itemsize, here.memory_gib, released)
    schedule(resolved.plan.cache, resolved.calibration, facts, request, checkpoint)
    measured = read_measured(job.plan) if job.plan else None
    elsewhere = measured.differences(checked.digest, here.name, resolved.plan, asdict(request)) if measured else []
    if measured and loras:
        elsewhere.append("other weights (a LoRA is added, measured without)")
    if resolved.calibration and loras:
        remarks.append("the step cache was calibrated without a LoRA")
    if elsewhere and job.strict:
        raise DaxError("unsupported", f"--strict: plan {job.plan} was measured elsewhere: {'; '.join(elsewhere)}")
    remarks += [f"the plan's fidelity was measured elsewhere: {text}" for text in elsewhere]
    if job.min_psnr is not None:
        exact = computes(resolved.plan) == computes(resolve(Plan(), facts, here, dtype=name).plan)
        check_min_psnr(job.min_psnr, measured, elsewhere, exact)
    path = Path(job.output or video.default_name(request.prompt, request.seed, resolved.plan.hash()))
    return Settled(job, checked, request, asked, resolved, loras, pictures, path, here, at, count, remarks)


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


def check_model(model: str | None, family: bool = False) -> Checked:
    """The preflight of the folder, the hub's model or the embedded one.

    family   whether any member of the family will do; else one that starts from an image, has two experts or comes in
             8 bits is refused
    """
    if model in (None, "tiny"):
        return preflight(FOLDER)
    if model in FACTS:
        raise DaxError("bad_model", f"--model {model}: only its shapes are known; give a diffusers folder or a hub id")
    checked = preflight(locate(model))
    if checked.facts.control_layers:
        raise DaxError(
            "bad_model",
            f"{model}: {checked.facts.name} takes a control video, which the command line does not: load it as "
            "diffusers' WanVACEPipeline and call dax.optimize on that",
        )
    if checked.stored and not family:
        raise DaxError(
            "bad_model",
            f"{model}: its linear layers were saved in 8 bits: dax generate takes it, comparing, tuning and "
            "calibrating start from the original weights",
        )
    if not (checked.facts.plain or family):
        why = "starts from an image" if checked.facts.num_images else "has two experts"
        raise DaxError(
            "bad_model",
            f"{model}: {checked.facts.name} {why}: dax generate takes it, comparing, tuning and calibrating know "
            "text-to-video by one transformer only so far",
        )
    return checked


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:scale. DaxError("bad_model") for a file that is missing or no safetensors."""
    name, colon, scale = text.rpartition(":")
    try:
        path, factor = (Path(name), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:
        path, factor = Path(text), 1.0
    if not isfinite(factor):
        raise DaxError("bad_request", f"--lora {text}: the scale must be a finite number")
    check_dtypes(read_header(path))
    return path, factor


def dtype_of(machine: Machine):
    """What the transformer is loaded in."""
    import torch

    return torch.bfloat16 if machine.device == "cuda" else torch.float32
