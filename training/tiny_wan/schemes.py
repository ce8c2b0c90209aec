"""What every 8-bit scheme and step plan does to the tiny Wan: latents, pixels and the judge against stock, beside the
noise floor.

    python -m training.tiny_wan.schemes --out benchmarks/schemes.json [--match static]

Held-out captions, 50 steps with guidance, bf16 transformer; the text encoder and the VAE stay fp32. The reference is
stock diffusers eager; the noise floor is the preset `exact`, which rounds elsewhere and no more. Static scales are
calibrated on captions of the training world, step plans are those that ship. Rows are added to those the file has
already. Minutes on a GPU.
"""

import argparse
import json
import random
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import WanPipeline

import dax
from dax.bench import quality, report

from . import scenes
from .evaluate import generate

BLOCKS_ONLY = {"*": "int8", "condition_embedder": "none", "proj_out": "none"}


def variants(scales: str) -> dict[str, dict]:
    """{name: plan keys over `exact`}; static ones read the file `scales`."""
    found: dict[str, dict] = {"exact (noise floor)": {}}
    for scheme in ("int8", "fp8", "fp8_e5m2"):
        for granularity in ("token-channel", "tensor-channel", "tensor"):
            for activation in ("dynamic", "static")[: 1 if granularity == "token-channel" else 2]:
                linear = {"scheme": scheme, "granularity": granularity, "activation": activation}
                linear |= {"scales": scales} if activation == "static" else {}
                found[f"{scheme} {granularity} {activation}"] = {"linear": linear}
    found["int8_weight_only"] = {"linear": {"scheme": "int8_weight_only"}}
    found["attention int8"] = {"attention": {"kernel": "int8"}}
    found["balanced"] = {"attention": {"kernel": "int8"}, "linear": {"scheme": "int8"}}
    for name, kernels in (("exact", {}), ("balanced", found["balanced"])):
        for share in (0.5, 0.4, 0.33):
            found[f"{name} at {share:.0%}"] = kernels | {"cache": {"policy": "calibrated", "budget": share}}
    return found


def render(pipe, prompts: list[str], steps: int, seed: int, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(latents, clips [N, 17, 128, 128, 3] uint8), `batch` at a time; clip i starts from noise `seed + i`."""
    last, latents, clips = {}, [], []

    def keep(_, step, timestep, tensors):
        last.update(tensors)
        return {}

    for start in range(0, len(prompts), batch):
        clips += generate(pipe, prompts[start : start + batch], steps, 4.0, seed + start, batch, keep)
        latents.append(last["latents"].float().cpu().numpy())
    return np.concatenate(latents), np.stack(clips)


def judged(clip, scene) -> bool:
    from .judge import score

    return score(clip, scene)["all"]


def pixels(reference, clip) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of a clip."""
    return quality.capped(quality.psnr(reference, clip)), float(np.mean(quality.frame_ssim(reference, clip)))


def compared(reference, latents) -> dict:
    """Latent cosine, mean squared error and SNR, means over the clips."""
    pairs = list(zip(reference, latents))
    return {
        "latent_cosine": float(np.mean([quality.cosine(a, b) for a, b in pairs])),
        "latent_mse": float(np.mean(np.square(latents - reference))),
        "latent_snr_db": float(np.mean([quality.snr_db(quality.relative_l2(a, b)) for a, b in pairs])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("dax/models/tiny_wan"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/schemes.json"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32, help="clips at a time")
    parser.add_argument("--match", default="", help="only variants whose name this regular expression finds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    pipe = WanPipeline.from_pretrained(a.model, torch_dtype={"transformer": torch.bfloat16, "default": torch.float32})
    pipe.to(a.device).set_progress_bar_config(disable=True)
    rng = random.Random(1234)
    things = [scenes.draw_scene(rng, scenes.HELD_OUT, 0.0) for _ in range(a.prompts)]
    prompts = [scenes.caption(scene, rng) for scene in things]
    seen = [scenes.caption(scenes.draw_scene(rng, scenes.TRAINED, 0.0), rng) for _ in range(8)]
    old = json.loads(a.out.read_text())["rows"] if a.out.exists() else []
    rows = {row["name"]: row for row in old}

    with TemporaryDirectory() as folder, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        scales = Path(folder) / "scales.json"
        chosen = {name: keys for name, keys in variants(str(scales)).items() if re.search(a.match, name)}
        if any(name.endswith("static") for name in chosen):
            dax.quant.calibrate(pipe.transformer, BLOCKS_ONLY, lambda: render(pipe, seen, 10, 9000)).save(scales)
        reference, clips = render(pipe, prompts, a.steps, 100, a.batch)

        def add(name: str, row: dict, frames) -> None:
            """A finished row is in the file at once, so that a run that is cut off keeps what it has."""
            if row:
                psnr, ssim = zip(*pool.map(pixels, clips, frames))
                row |= {"psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}
            rows[name] = {
                "name": name,
                **row,
                "judge_pct": 100 * float(np.mean(list(pool.map(judged, frames, things)))),
            }
            result = report.record("schemes", a.device, prompts=a.prompts, steps=a.steps, rows=list(rows.values()))
            result["command"] = "python -m training.tiny_wan.schemes"
            a.out.write_text(json.dumps(result, indent=1))
            print(rows[name], flush=True)

        add("stock", {}, clips)
        for name, keys in chosen.items():
            with dax.optimize(pipe, "exact", strict=True, **keys):
                latents, frames = render(pipe, prompts, a.steps, 100, a.batch)
            add(name, compared(reference, latents), frames)
    print(report.table(list(rows.values()), {key: key for key in ("name", *next(reversed(rows.values())))}))


if __name__ == "__main__":
    main()
