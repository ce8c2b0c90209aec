"""Runs the clips of a comparison: one model, loaded once, arranged and put back for every plan.

Text is encoded once per prompt. Clips run one at a time: a batch of four costs the same per clip on a CPU and more
memory on a GPU, and its sums come in another order (3e-7 on the tiny model), so batching would buy nothing.
"""

import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dax.bench import quality
from dax.bench.compare_cells import Cells, key_of
from dax.bench.compare_record import Cell
from dax.bench.compare_variants import Arrangement
from dax.errors import DaxError
from dax.generate import run, stages
from dax.generate.request import Request


@dataclass
class Meter:
    """Seconds and peak memory (GiB) per stage. On a CPU memory is the process's, None where that cannot be reset."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float | None] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str):
        can_tell = reset_peak(self.device)
        start = time.perf_counter()
        yield
        stages.synchronize()
        self.seconds[name] = round(time.perf_counter() - start, 4)
        self.peak_gib[name] = round(peak_gib(self.device), 3) if can_tell else None


def reset_peak(device: str) -> bool:
    """Start a new peak; False where the system does not let us."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_gib(device: str) -> float:
    if device == "cuda":
        return stages.peak_memory_gib(device)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


class Runner:
    """One model on one device. It is loaded when the first clip is asked for."""

    def __init__(self, checked, device: str, dtype, strict: bool = False, log=lambda text: None):
        self.checked, self.device, self.dtype, self.strict, self.log = checked, device, dtype, strict, log
        self.loaded = None
        self.texts: dict[tuple, tuple] = {}

    def pipe(self, flow_shift: float):
        if self.loaded is None:
            self.log(f"loading {self.checked.facts.name}")
            self.loaded = stages.load(self.checked, self.device, self.dtype)
            self.checked.unchanged()
            stages.set_flow_shift(self.loaded, flow_shift)
        return self.loaded

    def text(self, request: Request):
        """((prompt's embeddings, the negative one's), seconds, GiB), encoded once."""
        key = (request.prompt, request.negative_prompt, request.guidance_scale > 1)
        if key not in self.texts:
            pipe, meter = self.pipe(request.flow_shift), Meter(self.device)
            with meter.stage("text"):
                remarks: list[str] = []
                embeds = stages.encode(pipe, request, remarks)
            for text in remarks:
                self.log(f"warning: {text}")
            self.texts[key] = embeds, meter.seconds["text"], meter.peak_gib["text"]
        return self.texts[key]

    def warm_up(self, request: Request) -> None:
        """One step and a decode, thrown away, so that no plan pays for the first use of anything."""
        pipe, (embeds, _, _) = self.pipe(request.flow_shift), self.text(request)
        stages.decode(pipe, stages.denoise(pipe, replace(request, steps=1), *embeds))

    @contextmanager
    def arranged(self, arrangement: Arrangement, request: Request):
        """The pipeline as the arrangement has it; put back as it was at the end."""
        from dax.optimize import optimize

        pipe = self.pipe(request.flow_shift)
        with stages.out_of_memory(request), optimize(pipe, arrangement.asked, strict=self.strict) as engine:
            if engine.plan != arrangement.plan:
                said = "; ".join(engine.fallbacks) or "it resolves otherwise than without the weights"
                raise DaxError("check_failed", f"plan {arrangement.name} on the loaded model: {said}")
            with rounded_attention(pipe) if arrangement.rounded else nullcontext():
                yield pipe

    def run_missing(self, store: Cells, each: Arrangement, requests: list, keys: list[str], exact: list[str]) -> None:
        """Run and keep the clips of an arrangement that the store lacks; `exact` are the keys of the reference's."""
        todo = [index for index, key in enumerate(keys) if store.read(key, key == exact[index]) is None]
        if not todo:
            return
        with self.arranged(each, requests[0]) as pipe:
            for index in todo:
                own, reference = keys[index] == exact[index], None
                if not own:
                    reference = store.frames(exact[index]), store.array(exact[index], "trajectory")
                cell, frames, trajectory = self.clip(pipe, index, requests[index], reference)
                store.write(keys[index], cell, frames=frames, **({"trajectory": trajectory} if own else {}))
                self.log(
                    f"{each.name}: prompt {index + 1} of {len(requests)}, {cell.seconds['denoise']:.1f} s, "
                    f"{cell.psnr_db:.1f} dB"
                )

    def clip(self, pipe, index: int, request: Request, reference=None):
        """(Cell, frames [T, H, W, 3] uint8, trajectory [steps, 16, F, h, w] fp32) of one prompt.

        reference   (frames, trajectory) of the reference's clip; None if this is the reference
        """
        import numpy as np

        embeds, text_s, text_gib = self.text(request)
        meter = Meter(self.device, {"text": text_s}, {"text": text_gib})
        trajectory = []

        def keep(step, latents):
            trajectory.append(latents[0].float().cpu().clone())

        with stages.out_of_memory(request), stages.Forwards(pipe.transformer) as forwards:
            with meter.stage("denoise"):
                latents = stages.denoise(pipe, request, *embeds, on_step=keep)
            with meter.stage("decode"):
                frames = stages.decode(pipe, latents)
        trajectory = np.stack([latents.numpy() for latents in trajectory])
        cell = Cell(
            prompt=index,
            computed=dict(forwards.computed),
            seconds=meter.seconds,
            peak_gib=meter.peak_gib,
            **distances(*(reference or (frames, trajectory)), frames, trajectory),
        )
        return cell, frames, trajectory


def distances(frames, trajectory, other_frames, other_trajectory) -> dict:
    """The figures of a Cell: how far a clip and its latents lie from the reference's."""
    return {
        "psnr_db": quality.capped(quality.psnr(frames, other_frames)),
        "frame_psnr_db": quality.frame_psnr(frames, other_frames),
        "ssim": float(sum(similar := quality.frame_ssim(frames, other_frames)) / len(similar)),
        "frame_ssim": similar,
        "latent_error": [quality.relative_l2(a, b) for a, b in zip(trajectory, other_trajectory)],
        "cosine": quality.cosine(trajectory[-1], other_trajectory[-1]),
    }


def keys_of(each: Arrangement, exact: Arrangement, requests: list, common: dict) -> list[str]:
    """The key of an arrangement's cell for every request: all it depends on, so also the reference it is held against.

    common   of model, device, dtype and versions
    """
    own = each.plan == exact.plan and not each.rounded
    artifacts = [found.digest() for found in (each.resolved.calibration, each.resolved.scales) if found]
    references = [None] * len(requests) if own else keys_of(exact, exact, requests, common)
    return [
        key_of(
            plan=each.plan.model_dump(mode="json"),
            rounded=each.rounded,
            artifacts=artifacts,
            request=asdict(request),
            reference=reference,
            **common,
        )
        for request, reference in zip(requests, references)
    ]


@contextmanager
def rounded_attention(pipe):
    """Every attention of an optimized pipeline computes on q, k and v rounded to bf16."""
    import torch

    from dax.attention import apply_attention, backend_of
    from dax.edits import Edits
    from dax.models.wan import WanProcessor, target_of

    sdpa = backend_of("sdpa")

    def rounded(operands, num_keys, scale=None):
        return sdpa.attend([x.to(torch.bfloat16) for x in operands], num_keys, scale).to(operands[0].dtype)

    processor = WanProcessor(replace(sdpa, name="sdpa in bf16", attend=rounded))
    target, edits = target_of(pipe), Edits()
    try:
        for cross in (False, True):
            apply_attention(target.attentions(cross), processor, edits)
        yield
    finally:
        edits.undo()


def versions(machine) -> dict[str, str]:
    """Of everything that a clip depends on."""
    return {**machine.packages, "dax-engine": run.version(), "python": sys.version.split()[0]}
