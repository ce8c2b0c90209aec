"""Two lines on a diffusers pipeline, and the model back as it was."""

import torch

import dax

pipe = dax.load_tiny()  # or diffusers.WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", ...)
prompt = "a large red circle moves right over a black background"


def latents():
    noise = torch.Generator("cpu").manual_seed(0)
    return pipe(prompt, height=64, width=64, num_frames=9, num_inference_steps=4, generator=noise,
                output_type="latent").frames  # fmt: skip


stock = latents()
with dax.optimize(pipe, plan="exact") as engine:
    print(engine.summary())
    print(f"relative difference to stock diffusers: {float((latents() - stock).norm() / stock.norm()):.0e}")
assert torch.equal(latents(), stock)  # undone, bit for bit
