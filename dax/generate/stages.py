"""The stages of a job, one function each: load, encode, denoise, decode; their clock and their count of forwards.

The denoising loop is the pipeline's own. Nothing here knows of plans, files or the command line.
"""

import gc
import resource
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dax.edits import Edits
from dax.errors import DaxError
from dax.facts import Facts
from dax.generate.preflight import Checked
from dax.imports import importing


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


def import_vendor(facts: Facts, device: str) -> None:
    """diffusers' classes of a model, most of the time before a first step; where they are new, a GPU begins beside."""
    with importing():
        if device == "cuda" and "diffusers" not in sys.modules:
            from dax.kernels.start import begin

            begin()
        import diffusers

        for name in (facts.transformer_class, facts.pipeline_class):
            getattr(diffusers, name)


def load(checked: Checked, device: str, dtype, text: bool = True, second_device: str | None = None):
    """The pipeline, from safetensors only and nothing but local files.

    VAE and image encoder stay in fp32, as their authors run them.
    Weights go to the device tensor by tensor, so that several ranks do not hold a copy each in the host's memory.
    text   whether to load the text encoder, the largest part after the transformer
    second_device   where the second of two experts goes instead: the host, where optimize() is to bring it over
    """
    import_vendor(checked.facts, device)
    import diffusers
    import torch

    local = {"use_safetensors": True, "local_files_only": True}
    without = {} if text else {"text_encoder": None, "tokenizer": None}
    try:
        with quiet():
            places = {"transformer": device, "transformer_2": second_device or device}
            experts = {
                name: load_transformer(checked.facts, checked.folder, name, place, dtype, bool(checked.stored))
                for name, place in list(places.items())[: checked.facts.num_experts]
            }
            pipe = getattr(diffusers, checked.facts.pipeline_class).from_pretrained(
                checked.folder,
                **experts,
                dtype={"default": dtype, "vae": torch.float32, "image_encoder": torch.float32},
                **without,
                **local,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DaxError("bad_model", f"{checked.folder}: diffusers cannot load it: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in experts:
            part.to(device)
    return pipe


def load_transformer(facts: Facts, folder: Path, name: str, device: str, dtype, stored: bool):
    """One transformer of a pipeline's folder, each tensor from the mapped file to the device; codes stay codes."""
    import diffusers

    if stored:
        from dax.quant import register

        register()
    return getattr(diffusers, facts.transformer_class).from_pretrained(
        folder, subfolder=name, dtype=dtype, device_map={"": device}, use_safetensors=True, local_files_only=True
    )


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
    pipe,
    request,
    prompt_embeds,
    negative_embeds,
    on_step=lambda step, latents: None,
    quietly: bool = False,
    pictures: tuple = (),
):
    """The pipeline's own loop, noise from a CPU generator so that a seed means the same everywhere.

    on_step   called after every step with its number from 0 and the latents, which it must not change
    pictures  of image-to-video: the first frame and, where the model takes it, the last (PIL, RGB)
    Returns latents [1, C, F, h, w] fp32. DaxError("check_failed") if one is not finite.
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
            guidance_scale_2=request.guidance_scale_2,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            callback_on_step_end=step_done,
            callback_on_step_end_tensor_inputs=["latents"],
            **dict(zip(("image", "last_image"), pictures)),
        ).frames
    if not torch.isfinite(latents).all():
        raise DaxError("check_failed", f"the latents are not finite after {request.steps} steps: no clip was written")
    return latents


def release(pipe, *names: str) -> None:
    """Give back the memory of those of the pipeline's models that are there, with all that lived through them."""
    pipe.register_modules(**{name: None for name in names if getattr(pipe, name, None) is not None})
    collect()


def collect() -> None:
    """Give back the memory of models that nobody holds."""
    import torch

    gc.collect()  # a model under hooks is a circle
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
    """Counts the forwards that really run the blocks, by the branch the pipeline announces: `each` transformer's, and
    `computed`, all of them.
    """

    def __init__(self, *transformers):
        self.transformers, self.branch, self.edits = transformers, "cond", Edits()
        self.each = [{"cond": 0, "uncond": 0} for _ in transformers]

    @property
    def computed(self) -> dict[str, int]:
        return total(self.each)

    def __enter__(self):
        self.handles = []
        for transformer, counts in zip(self.transformers, self.each):
            self.handles.append(transformer.blocks[0].register_forward_pre_hook(partial(self.add, counts)))
            context = partial(self.cache_context, transformer.cache_context)
            self.edits.set_attribute(transformer, "cache_context", context)
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self.edits.undo()

    @contextmanager
    def cache_context(self, vendors, name: str, **announced):
        self.branch = name
        with vendors(name, **announced):
            yield

    def add(self, counts: dict[str, int], *_) -> None:
        counts[self.branch] += 1


def total(each: list[dict[str, int]]) -> dict[str, int]:
    """The forwards of all transformers, by branch."""
    return {branch: sum(counts[branch] for counts in each) for branch in ("cond", "uncond")}


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
