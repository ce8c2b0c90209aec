"""Stage 1: the video autoencoder, diffusers' own `AutoencoderKLWan` at 4 x 8 x 8 compression, trained from nothing.

    python -m training.tiny_wan.vae --out build/vae --seconds 300

Loss: L1 + 4 MSE + 1e-6 KL per value. The held-out figure is the PSNR over 256 clips of never-trained combinations.
Needs a GPU; about 2 GB of its memory per 8 clips of a batch.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from . import scenes

CONFIG = dict(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 6], num_res_blocks=1, temperal_downsample=[False, True, True])


def decode(vae, z):
    """As `vae.decode`, without the final clamp, whose gradient would be zero outside [-1, 1]."""
    vae.clear_cache()
    x = vae.post_quant_conv(z)
    chunks = []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, 2)


@torch.no_grad()
def psnr(vae, num_clips: int, device) -> float:
    """Mean PSNR in dB, frames in [0, 1] rounded to 8 bits, over clips of held-out combinations."""
    values = []
    for seed in range(0, num_clips, 16):
        _, _, x = scenes.batch(16, 10_000_000 + seed, device, scenes.HELD_OUT)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample
        y = ((y.float().clamp(-1, 1) + 1) * 127.5).round() / 255
        values += (-10 * (y - x).square().flatten(1).mean(1).log10()).tolist()
    return sum(values) / len(values)


@torch.no_grad()
def latent_statistics(vae, device):
    """Mean and standard deviation of each of the 16 latent channels over 1024 training clips."""
    z = []
    for seed in range(0, 1024, 32):
        _, _, x = scenes.batch(32, 20_000_000 + seed, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z.append(vae.encode(x * 2 - 1).latent_dist.mode().float())
    z = torch.cat(z).transpose(0, 1).flatten(1)
    return z.mean(1).tolist(), z.std(1).tolist()


def train(out: Path, seconds: float, batch: int, lr: float, device: str = "cuda") -> dict:
    """Train for `seconds` of wall time, save to `out`, return the figures."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    vae = AutoencoderKLWan(**CONFIG).to(device)
    parameters = list(vae.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda")
    start, step, log = time.monotonic(), 0, []
    while (progress := (time.monotonic() - start) / seconds) < 1:
        rate = lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # short clips teach the space faster; the last third sees whole ones
        frames = 9 if progress < 0.65 else 17
        _, _, x = scenes.batch(batch if frames == 17 else 2 * batch, step, device)
        offset = 4 * (step % 3) if frames == 9 else 0
        x = x[:, :, offset : offset + frames].mul(2).sub(1)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            posterior = vae.encode(x).latent_dist
            y = decode(vae, posterior.sample())
        error = y.float() - x
        loss = error.abs().mean() + 4 * error.square().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 1e-4 * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        if step % 100 == 0 or step < 3:
            mse = error.square().mean().item() / 4
            log.append(
                dict(
                    step=step,
                    t=round(time.monotonic() - start, 1),
                    psnr_db=round(-10 * math.log10(mse), 2),
                    kl=kl.item(),
                    norm=float(norm),
                )
            )
            print(json.dumps(log[-1]), flush=True)
        step += 1
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    vae.requires_grad_(False).eval()
    mean, std = latent_statistics(vae, device)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    figures = dict(
        steps=step,
        seconds=seconds,
        held_out_psnr_db=psnr(vae, 256, device),
        parameters=sum(p.numel() for p in vae.parameters()),
    )
    vae.to(torch.bfloat16)
    figures["held_out_psnr_db_bf16_weights"] = psnr(vae.to(torch.float32), 256, device)
    vae.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    (out / "training.json").write_text(json.dumps(dict(figures=figures, log=log), indent=1))
    print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/vae"))
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    train(a.out, a.seconds, a.batch, a.lr, a.device)
