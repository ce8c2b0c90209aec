"""`dax bench forward`: a whole forward of the transformer, embeddings and head included, on seeded Gaussian inputs."""

from dataclasses import asdict

from dax.bench import roofline
from dax.bench.size import Size
from dax.facts import CLIP_TOKENS, Facts


def calls_of(facts: Facts, model, size: Size, device: str):
    """(calls, origin): `calls(arranged)` runs one forward of one branch of an arranged twin of `model`."""
    given = inputs(facts, asdict(size), device)

    def calls(arranged):
        return lambda: arranged(**given, return_dict=False)[0]

    return calls, 0


def inputs(facts: Facts, pixels: dict, device: str) -> dict:
    """What a forward of one branch is called with: bf16, Gaussian, the same for the same device.

    hidden_states                 latent_shape of the facts, at batch 1
    timestep                      [1], or [1, S] where each token has its own: 0 for a first frame that is given
    encoder_hidden_states         [1, T, text_dim]
    encoder_hidden_states_image   [images, CLIP tokens, image_dim], or None
    control_hidden_states         of VACE alone: [1, control channels, frames, rows, columns]
    """
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    latents, timestep = facts.latent_shape(**pixels), torch.tensor([500], device=device)
    if facts.token_time:
        timestep = timestep.repeat(1, facts.tokens(**pixels))
        timestep[:, : facts.tokens(**pixels | {"num_frames": 1})] = 0
    given = {
        "hidden_states": gaussian(1, *latents),
        "timestep": timestep,
        "encoder_hidden_states": gaussian(1, facts.text_tokens, facts.text_dim),
        "encoder_hidden_states_image": None,
    }
    if facts.image_tokens:
        given["encoder_hidden_states_image"] = gaussian(facts.num_images, CLIP_TOKENS, facts.image_dim)
    if facts.control_layers:
        given["control_hidden_states"] = gaussian(1, facts.control_channels, *latents[1:])
    return given


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
