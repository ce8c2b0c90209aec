"""`dax bench forward`: a whole forward of the transformer, embeddings and head included, on seeded Gaussian inputs."""

from dataclasses import asdict

from dax.bench import roofline
from dax.bench.size import Size
from dax.facts import CLIP_TOKENS, Facts


def calls_of(facts: Facts, model, size: Size, device: str):
    """(calls, origin): `calls(arranged)` runs one forward of one branch of an arranged twin of `model`."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    latents = gaussian(1, *facts.latent_shape(size.height, size.width, size.num_frames))
    text = gaussian(1, facts.text_tokens, facts.text_dim)
    images = image_embeds(facts, gaussian)
    timestep, control = timesteps(facts, asdict(size), device), {}
    if facts.control_layers:
        control["control_hidden_states"] = gaussian(1, facts.control_channels, *latents.shape[2:])

    def calls(arranged):
        return lambda: arranged(latents, timestep, text, images, **control, return_dict=False)[0]

    return calls, 0


def timesteps(facts: Facts, pixels: dict, device: str):
    """[1], or [1, S] where each token has its own: 0 for a first frame that is given."""
    import torch

    timestep = torch.tensor([500], device=device)
    if facts.token_time:
        timestep = timestep.repeat(1, facts.tokens(**pixels))
        timestep[:, : facts.tokens(**pixels | {"num_frames": 1})] = 0
    return timestep


def image_embeds(facts: Facts, gaussian):
    """[images, CLIP tokens, image_dim] as the image encoder gives them; None for text-to-video."""
    return gaussian(facts.num_images, CLIP_TOKENS, facts.image_dim) if facts.image_tokens else None


def operations_of(
    facts: Facts, size: Size, num_layers: int, gemm_dtype: str, attention_dtype: str
) -> list[roofline.Operation]:
    """What one call costs."""
    return roofline.forward_operations(
        facts,
        size.height,
        size.width,
        size.num_frames,
        gemm_dtype,
        attention_dtype,
        num_layers=num_layers,
    )
