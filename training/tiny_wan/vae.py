"""Stage 1: the video autoencoder, diffusers' own `AutoencoderKLWan` at 4 x 8 x 8 compression, trained from nothing.

    python -m training.tiny_wan.vae --out build/vae --seconds 360

Loss: L1 + 10 MSE + 3e-5 KL per value, over a bank of drawn clips, mirrored at random. The held-out figure is the PSNR
over 256 clips of never-trained combinations. Needs a GPU with about 40 GB.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from . import scenes, whole_clip

CONFIG = dict(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 6], num_res_blocks=1, temperal_downsample=[False, True, True])
KL_WEIGHT = 3e-5


@torch.no_grad()
def psnr(vae, num_clips: int, device) -> float:
    """Mean PSNR in dB of diffusers' own encode and decode over held-out combinations, frames rounded to 8 bits."""
    values = []
    for seed in range(0, num_clips, 16):
        _, _, x = scenes.batch(16, 10_000_000 + seed, device, scenes.HELD_OUT)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample
        y = ((y.float().clamp(-1, 1) + 1) * 127.5).round() / 255
        values += (-10 * (y - x).square().flatten(1).mean(1).log10()).tolist()
    return sum(values) / len(values)


@torch.no_grad()
def draw_bank(num_clips: int, device, size: int = 256) -> torch.Tensor:
    """Training clips as bytes: [N, 3, 17, 128, 128] uint8 on the device (836 KB each)."""
    draw = lambda seed: scenes.batch(size, seed, device)[2].mul(255).round().to(torch.uint8)
    return torch.cat([draw(seed) for seed in range(0, num_clips, size)])


@torch.no_grad()
def latent_statistics(vae, bank):
    """Mean and standard deviation of each of the 16 latent channels over 1024 training clips."""
    device = bank.device.type
    z = []
    for start in range(0, min(len(bank), 1024), 32):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z.append(whole_clip.encode(vae, bank[start : start + 32].float() / 127.5 - 1)[0].float())
    z = torch.cat(z).transpose(0, 1).flatten(1)
    return z.mean(1).tolist(), z.std(1).tolist()


def loss_of(vae, clip: torch.Tensor, noise: torch.Tensor):
    """(loss, mean square error, KL per value) of clips as bytes; `noise` [B, 16, 5, 16, 16] samples the posterior."""
    device = clip.device.type
    x = clip.float() / 127.5 - 1
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        mean, logvar = whole_clip.encode(vae, x)
        mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
        y = whole_clip.decode(vae, mean + (0.5 * logvar).exp() * noise)
    error = y.float() - x
    mse = error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 10 * mse + KL_WEIGHT * kl, mse.detach(), kl.detach()


def train(
    out: Path,
    seconds: float,
    num_clips: int,
    batch: int,
    lr: float,
    device: str = "cuda",
    compile: bool = True,
    resume: Path | None = None,
) -> dict:
    """Train for `seconds` of wall time, drawing and compiling included; save to `out`, return the figures.

    `resume` is a folder of an earlier call whose weights (not its optimizer) this one starts from.
    """
    start = time.monotonic()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    bank = draw_bank(num_clips, device)
    print(json.dumps(dict(bank=list(bank.shape), t=round(time.monotonic() - start, 1))), flush=True)
    vae = AutoencoderKLWan.from_pretrained(resume, torch_dtype=torch.float32) if resume else AutoencoderKLWan(**CONFIG)
    vae.to(device).train().requires_grad_(True)
    parameters = list(vae.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda")
    compute = torch.compile(loss_of) if compile else loss_of
    step, log = 0, []
    while (progress := (time.monotonic() - start) / seconds) < 1:
        rate = lr * min(1, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        clip = bank[torch.randint(len(bank), (batch,), device=device)]
        if step % 2:
            clip = clip.flip(-1)
        if step % 4 > 1:
            clip = clip.flip(-2)
        noise = torch.randn(batch, CONFIG["z_dim"], 5, 16, 16, device=device)
        loss, mse, kl = compute(vae, clip, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.9985, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        if step % 500 == 0 or step < 3:
            log.append(
                dict(
                    step=step,
                    t=round(time.monotonic() - start, 1),
                    psnr_db=round(-10 * math.log10(mse.item() / 4), 2),
                    kl=round(kl.item(), 3),
                    norm=round(float(norm), 3),
                )
            )
            print(json.dumps(log[-1]), flush=True)
        step += 1
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    vae.requires_grad_(False).eval()
    mean, std = latent_statistics(vae, bank)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.to(torch.bfloat16).to(torch.float32)  # as saved
    figures = dict(
        steps=step,
        seconds=seconds,
        parameters=sum(p.numel() for p in vae.parameters()),
        held_out_psnr_db=psnr(vae, 256, device),
    )
    vae.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    (out / "training.json").write_text(json.dumps(dict(figures=figures, log=log), indent=1))
    print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/vae"))
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--clips", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--resume", type=Path)
    a = parser.parse_args()
    train(a.out, a.seconds, a.clips, a.batch, a.lr, a.device, not a.no_compile, a.resume)
