"""Runs of the pipeline's own loop on given clips: exact and recorded, or under a step plan, and how far apart they end.

What is kept of a recorded run is small: inner products of its velocities, and the two figures per step that TeaCache
and MagCache are calibrated on. The pipeline is used as it is, with whatever kernels it carries.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from dax.cache.gate import Gate, apply_cache
from dax.cache.step_plan import StepPlan
from dax.edits import Edits

CAP_DB = 100.0
COLUMNS = 1_000_000  # of velocities, turned to fp64 at a time


@dataclass(frozen=True)
class Clips:
    """What some clips are made of.

    text, negative  [B, T, text_dim]          embedded prompts
    noise           [B, C, F, h, w]  fp32     where the loop starts
    """

    text: torch.Tensor
    negative: torch.Tensor
    noise: torch.Tensor
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, part: slice) -> "Clips":
        return replace(self, text=self.text[part], negative=self.negative[part], noise=self.noise[part])

    def batches(self, size: int) -> "Iterator[Clips]":
        return (self[start : start + size] for start in range(0, len(self), size))


def make_clips(pipe, prompts: list[str], size: tuple[int, int, int], steps: int, guidance_scale: float, seed: int):
    """Clips of the prompts; clip i starts from the noise of CPU seed `seed + i`. size is height, width, frames."""
    device, config = pipe._execution_device, pipe.transformer.config
    text, negative = pipe.encode_prompt(prompts, "", True, max_sequence_length=512, device=device)
    height, width, num_frames = size
    cells = (
        (num_frames - 1) // pipe.vae_scale_factor_temporal + 1,
        height // pipe.vae_scale_factor_spatial,
        width // pipe.vae_scale_factor_spatial,
    )
    noise = [
        torch.randn(1, config.in_channels, *cells, generator=torch.Generator().manual_seed(seed + i))
        for i in range(len(prompts))
    ]
    return Clips(text, negative, torch.cat(noise).to(device), *size, steps, guidance_scale)


def run(pipe, clips: Clips, batch: int) -> torch.Tensor:
    """The latents of the clips, [B, C, F, h, w] fp32, `batch` of them at a time."""
    found = [
        pipe(
            prompt_embeds=part.text,
            negative_prompt_embeds=part.negative,
            height=part.height,
            width=part.width,
            num_frames=part.num_frames,
            num_inference_steps=part.steps,
            guidance_scale=part.guidance_scale,
            latents=part.noise,
            output_type="latent",
        ).frames
        for part in clips.batches(batch)
    ]
    return torch.cat(found)


@contextmanager
def told(pipe, what: str, clips: Clips, batch: int, log: Callable, bar: bool, times: int = 1) -> Iterator[None]:
    """Meanwhile runs of the clips are seen: as one bar of steps on stderr, or as a line of `log` after each.

    times   how often all clips are run, at the most: a bar that ends sooner ends full
    """
    from tqdm import tqdm

    runs, edits, done = times * -(-len(clips) // batch), Edits(), 0

    @contextmanager
    def loop(total):
        nonlocal done
        start = time.perf_counter()
        yield shown
        done += 1
        if not bar:
            log(f"{what}: run {done} of {runs}, {time.perf_counter() - start:.1f} s")

    try:
        with tqdm(total=runs * clips.steps, desc=what, unit="step", disable=not bar, file=sys.stderr) as shown:
            edits.set_attribute(pipe, "progress_bar", lambda iterable=None, total=None: loop(total))
            yield
            shown.total = shown.n
    finally:
        edits.undo()


@contextmanager
def gated(pipe, plan: StepPlan) -> "Iterator[Gate]":
    """Meanwhile the pipeline runs under that plan, whatever setting it was made for."""
    edits = Edits()
    made = replace(plan, setting=type(plan.setting)(), sigmas=None)
    residual = plan.reuse == "residual"
    try:
        yield apply_cache(
            [pipe.transformer], pipe, lambda *_: made, edits, residual=residual, checkpoint=None, kernels="exact"
        )
    finally:
        edits.undo()


def fidelity(pipe, plan: StepPlan, clips: Clips, reference: torch.Tensor, batch: int) -> np.ndarray:
    """Latent PSNR in dB of each clip under the plan, against the exact latents `reference`."""
    with gated(pipe, plan):
        return latent_psnr(run(pipe, clips, batch), reference)


def latent_psnr(latents: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """[B] dB: 10 log10(range^2 / MSE), range being that of the reference clip; at most CAP_DB."""
    reference, latents = reference.flatten(1).double(), latents.flatten(1).double()
    peak = reference.amax(1) - reference.amin(1)
    error = (latents - reference).square().mean(1).clamp_min(1e-30)
    return (10 * (peak.square() / error).log10()).clamp_max(CAP_DB).cpu().numpy()


@dataclass(frozen=True)
class Recording:
    """What exact runs of some clips showed; means over clips.

    sigmas   [n]        gram    [n, n]  of the guided velocities g: mean over cells of g_i g_j
    changes  [n - 1]    relative L1 change of cond's velocity from step to step
    ratios   {branch: [n]}  mean over tokens of how long what the blocks add is, against the step before; first is 1
    latents  [B, ...]   where the runs ended
    """

    sigmas: np.ndarray
    gram: np.ndarray
    changes: np.ndarray
    ratios: dict[str, np.ndarray]
    latents: torch.Tensor

    @classmethod
    def mean(cls, parts: "list[Recording]", counts: list[int]) -> "Recording":
        share = np.array(counts) / sum(counts)
        average = lambda values: sum(s * v for s, v in zip(share, values))
        return cls(
            parts[0].sigmas,
            average([p.gram for p in parts]),
            average([p.changes for p in parts]),
            {branch: average([p.ratios[branch] for p in parts]) for branch in parts[0].ratios},
            torch.cat([p.latents for p in parts]),
        )


def record(pipe, clips: Clips, batch: int) -> Recording:
    """Run the clips exactly and watch. Keeps one batch's velocities on the device: 19 MB a step at 14B 720p."""
    parts, counts = [], []
    for part in clips.batches(batch):
        with Watch(pipe.transformer, part.guidance_scale) as watch:
            latents = run(pipe, part, batch)
        sigmas = pipe.scheduler.sigmas[: part.steps].cpu().double().numpy()
        changes = torch.stack(watch.changes).cpu().double().numpy()
        ratios = {b: np.array([1.0, *torch.stack(found).cpu().tolist()]) for b, found in watch.ratios.items()}
        parts.append(Recording(sigmas, gram_of(watch.guided), changes, ratios, latents))
        counts.append(len(part))
    return Recording.mean(parts, counts)


def gram_of(velocities: list[torch.Tensor]) -> np.ndarray:
    """Mean over all elements of v_i v_j, [n, n], summed in fp64: differences of neighbours are small."""
    flat = torch.stack([v.flatten() for v in velocities])
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in flat.split(COLUMNS, dim=1):
        part = part.double()
        total += part @ part.T
    return (total / flat.shape[1]).cpu().numpy()


class Watch:
    """Meanwhile every forward of the transformer is watched: guided velocities, and each branch's figures a step."""

    def __init__(self, transformer, guidance_scale: float):
        self.transformer, self.scale, self.edits = transformer, guidance_scale, Edits()
        self.branch = "cond"
        self.guided: list[torch.Tensor] = []
        self.changes: list[torch.Tensor] = []
        self.ratios: dict[str, list] = {"cond": [], "uncond": []}
        self.cond: torch.Tensor | None = None
        self.lengths: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "Watch":
        first, last = self.transformer.blocks[0], self.transformer.blocks[-1]
        self.hooks = [first.register_forward_pre_hook(self.enter_blocks), last.register_forward_hook(self.leave_blocks)]
        self.hooks.append(self.transformer.register_forward_hook(self.leave))
        self.context = self.edits.set_attribute(self.transformer, "cache_context", self.cache_context)
        return self

    def __exit__(self, *_) -> None:
        self.edits.undo()
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def cache_context(self, name: str, **announced):
        self.branch = name
        with self.context(name, **announced):
            yield

    def enter_blocks(self, block, args):
        self.entered = args[0].clone()

    def leave_blocks(self, block, args, output):
        length = (output - self.entered).float().norm(dim=-1)  # [B, S]
        if self.branch in self.lengths:
            self.ratios[self.branch].append((length / self.lengths[self.branch]).mean())
        self.lengths[self.branch] = length

    def leave(self, transformer, args, output):
        velocity = output[0].float()
        if self.branch == "cond":
            if self.cond is not None:
                self.changes.append((velocity - self.cond).abs().mean() / self.cond.abs().mean())
            self.cond = velocity
            self.guided.append(velocity)
        else:
            self.guided[-1] = velocity + self.scale * (self.cond - velocity)
