"""Stage 4: what the tiny Wan can do, measured on combinations it never saw.

    python -m training.tiny_wan.evaluate --model dax/models/tiny_wan --out benchmarks/tiny_wan.json

Reports the PSNR of the VAE on held-out clips, how the judge reads 200 generated single-object clips and 100 of two
objects, the accuracy of the judge itself on drawn clips, and how far the velocity moves without each block or
self-attention. Minutes on a GPU, about an hour on two cores.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import WanPipeline

from . import scenes
from .judge import score
from .vae import psnr
from .whole_clip import encode

SIGMAS = (0.9, 0.6, 0.3)


def to_uint8(frames) -> "np.ndarray":  # noqa: F821
    """[B, F, H, W, 3] float in [0, 1] -> uint8."""
    return (torch.as_tensor(frames).clamp(0, 1) * 255).round().byte().numpy()


def generate(pipe, prompts, steps, guidance, seed, batch, on_step=None):
    """Clips of the prompts, [N, 17, 128, 128, 3] uint8; clip i starts from the noise of CPU seed `seed + i`.

    on_step   the pipeline's callback after every step, or None
    """
    clips = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        frames = pipe(
            part,
            height=scenes.HEIGHT,
            width=scenes.WIDTH,
            num_frames=scenes.NUM_FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            callback_on_step_end=on_step,
        ).frames
        clips.extend(to_uint8(frames))
    return clips


def judged(clips, things) -> dict:
    """Per cent of clips in which the judge reads each part, and all parts, as the scene says."""
    scores = [score(clip, scene) for clip, scene in zip(clips, things, strict=True)]
    return {part: round(100 * sum(s[part] for s in scores) / len(scores), 1) for part in scores[0]}


@torch.no_grad()
def aliveness(pipe, num_captions: int = 16, seed: int = 5) -> dict:
    """How far the velocity moves without each block and each self-attention.

    Relative L2 against the whole model, mean over sigma .9, .6, .3 and `num_captions` captions, on noised latents of
    drawn clips: {"block 0": .., "attn1 0": .., ...}.
    """
    device, model, vae = pipe._execution_device, pipe.transformer, pipe.vae
    _, captions, clips = scenes.batch(num_captions, seed, two_objects=0.0)
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(device)
    std = torch.tensor(vae.config.latents_std).view(shape).to(device)
    latents, _ = encode(vae, clips.to(device, vae.dtype) * 2 - 1)
    x0 = (latents.float() - mean) / std
    text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512, device=device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def velocities():
        out = []
        for sigma in SIGMAS:
            x = ((1 - sigma) * x0 + sigma * noise).to(model.dtype)
            t = torch.full((num_captions,), 1000 * sigma, device=device)
            out.append(model(x, t, text.to(model.dtype), return_dict=False)[0].float())
        return out

    def moved(changed):
        rows = [(c - w).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1) for c, w in zip(changed, whole)]
        return round(torch.stack(rows).mean().item(), 4)

    whole, result = velocities(), {}
    for i, block in enumerate(model.blocks):
        for name, module, skip in (
            (f"block {i}", block, lambda _, args, out: args[0]),
            (f"attn1 {i}", block.attn1, lambda _, args, out: torch.zeros_like(out)),
        ):
            hook = module.register_forward_hook(skip)
            result[name] = moved(velocities())
            hook.remove()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("dax/models/tiny_wan"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tiny_wan.json"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument("--vae-clips", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=Path, help="also save some clips here as .npz")
    a = parser.parse_args()
    pipe = WanPipeline.from_pretrained(a.model, torch_dtype=torch.float32).to(a.device)
    pipe.set_progress_bar_config(disable=True)
    batch = 50 if a.device == "cuda" else 4

    result = dict(steps=a.steps, captions=a.captions, device=a.device)
    drawn, _, truth = scenes.batch(300, 31, combinations=scenes.COMBINATIONS, two_objects=0.0)
    result["judge_on_drawn_clips"] = judged(to_uint8(truth.permute(0, 2, 3, 4, 1)), drawn)
    result["aliveness"] = aliveness(pipe)
    print(json.dumps(result), flush=True)
    rng = random.Random(77)
    one = [scenes.draw_scene(rng, scenes.HELD_OUT, 0.0) for _ in range(a.captions)]
    two = [scenes.draw_scene(rng, scenes.HELD_OUT, 1.0) for _ in range(a.captions // 2)]
    for guidance in a.guidance:
        for name, things in (("one_object", one), ("two_objects", two)):
            prompts = [scenes.caption(s, rng) for s in things]
            clips = generate(pipe, prompts, a.steps, guidance, 1000, batch)
            result[f"{name} guidance {guidance:g}"] = judged(clips, things)
            print(name, guidance, result[f"{name} guidance {guidance:g}"], flush=True)
            if a.clips and name == "one_object":
                import numpy as np

                np.savez_compressed(a.clips, clips=np.stack(clips[:40]), prompts=prompts[:40])
    result["vae_psnr_db"] = round(psnr(pipe.vae, a.vae_clips, a.device), 2)
    result["weights_mb"] = round(sum(f.stat().st_size for f in a.model.rglob("*.safetensors")) / 1e6, 2)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
