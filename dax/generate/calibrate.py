"""`dax calibrate`: load a model with the kernels it will run with, and write what a step cache needs to know of it.

The search itself is `dax.cache.calibrate`; here are the model, the prompts and the file. The first half of the prompts
is recorded and searched on, the second half judges and chooses.
"""

from dataclasses import dataclass
from pathlib import Path

from dax.bench.prompts import HERE, MAX_PROMPTS, default_prompts, read_prompts
from dax.cache.artifact import Artifact
from dax.cache.calibrate import PROBES, Effort, calibrate
from dax.cache.record import make_clips
from dax.cache.step_plan import Setting
from dax.cache.teacache import changes
from dax.errors import DaxError
from dax.generate.request import check_whole, make_request
from dax.generate.settle import check_model
from dax.generate.stages import load, set_flow_shift
from dax.generate.steps import checkpoint_of
from dax.generate.video import check_target
from dax.plan import DEFAULT_PRESET, Plan, parse_set, plan_layer

MOST = 10_000  # tries, or clips at a time


@dataclass(frozen=True)
class Job:
    """What `dax calibrate` was asked for. `given` holds the request's fields that were stated, without the prompt."""

    given: dict
    output: str
    model: str | None = None
    plan: str | None = None
    sets: tuple[str, ...] = ()
    prompts: str | None = None
    num_prompts: int | None = None
    effort: Effort = Effort()
    device: str | None = None
    overwrite: bool = False


def run(job: Job, log=lambda text: None, bar: bool = False) -> Artifact:
    """Calibrate and write the artifact. Every bad argument is refused before weights load.

    bar   runs are shown as bars on stderr; else each is a line of `log`
    """
    checked = check_model(job.model)
    if job.num_prompts is not None:
        check_whole("num_prompts", job.num_prompts, 2, MAX_PROMPTS)
    prompts = prompts_of(job)
    request, _ = make_request(checked.facts, {**job.given, "prompt": prompts[0]})
    if request.guidance_scale <= 1:
        raise DaxError("bad_request", f"guidance_scale {request.guidance_scale:g}: calibrate with guidance, above 1")
    check_whole("probes", job.effort.probes, 0, len(PROBES))
    check_whole("climb", job.effort.climb, 0, MOST)
    check_whole("batch", job.effort.batch, 1, MOST)
    job.effort.computed(request.steps)
    check_target(Path(job.output), job.overwrite, (".json",))
    sets = [(f"--set {text}", parse_set(text)) for text in job.sets]
    asked, _ = Plan.from_layers([plan_layer(job.plan or DEFAULT_PRESET), *sets])
    asked = asked.model_copy(update={"cache": type(asked.cache)()})

    import torch

    from dax.hardware import machine
    from dax.models.wan_steps import time_embeddings
    from dax.optimize import optimize
    from dax.resolve import kernels_of

    here = machine(job.device)
    pipe = load(checked, here.device, torch.bfloat16 if here.device == "cuda" else torch.float32)
    set_flow_shift(pipe, request.flow_shift)
    with optimize(pipe, asked) as engine, torch.no_grad():
        log(engine.summary())
        setting = Setting(
            steps=request.steps,
            scheduler=type(pipe.scheduler).__name__,
            flow_shift=request.flow_shift,
            guidance_scale=request.guidance_scale,
            checkpoint=checkpoint_of(checked.folder, checked.facts),
            kernels=kernels_of(engine.plan),
        )
        pipe.scheduler.set_timesteps(request.steps)
        moved = changes(time_embeddings(pipe.transformer, pipe.scheduler.timesteps, projected=True))
        size = request.height, request.width, request.num_frames
        clips = make_clips(pipe, prompts, size, request.steps, request.guidance_scale, request.seed)
        half = (len(prompts) + 1) // 2
        found = calibrate(pipe, clips[:half], clips[half:], setting, job.model or "tiny", moved, job.effort, log, bar)
    found.save(Path(job.output))
    return found


def prompts_of(job: Job) -> list[str]:
    """Of --prompts, else those that ship with DAX. DaxError("bad_request") for a bad file, or fewer than two."""
    tiny = job.model in (None, "tiny")
    path = job.prompts or (HERE / "tiny_trained.txt" if tiny else default_prompts(job.model))
    found = read_prompts(path)[: job.num_prompts]
    if len(found) < 2:
        raise DaxError("bad_request", f"prompts file {path}: {len(found)} to use; at least 2, to record and to judge")
    return found
