"""`dax bench block`: the transformer blocks alone, one after the other, on seeded Gaussian inputs of the real size.

Of VACE the control blocks run before, and their hints are added, as in the vendor's forward.
"""

from dax.bench import roofline
from dax.bench.size import Size
from dax.facts import Facts


def calls_of(facts: Facts, model, size: Size, device: str):
    """(calls, origin): `calls(arranged)` runs all blocks of an arranged twin of `model` over the same inputs."""
    from dax.models.token_time import for_blocks

    inputs = block_inputs(facts, model, size, device)

    def calls(arranged):
        def call():
            hidden = inputs["hidden_states"]
            temb = for_blocks(arranged.blocks, inputs["temb"], hidden.shape[1])
            rest, control, hints = (temb, inputs["rotary_emb"]), inputs["control"], {}
            for layer, block in zip(facts.control_layers, getattr(arranged, "vace_blocks", ())):
                hints[layer], control = block(hidden, inputs["text"], control, *rest)
            for layer, block in enumerate(arranged.blocks):
                hidden = block(hidden, inputs["text"], *rest)
                if layer in hints:
                    hidden = hidden + hints.pop(layer) * inputs["scale"]
            return hidden

        return call

    return calls, inputs["hidden_states"]


def block_inputs(facts: Facts, model, size: Size, device: str) -> dict:
    """What a block is called with.

    hidden_states [1, S, C], text [1, I + T, C], temb [1, 6, C]   bf16, Gaussian, the same for the same device
    temb          a Modulation of rows [1, 2, 6, C] where tokens have their own times, as with an image
    rotary_emb    the model's own (cos, sin) table of that size
    control       [1, S, C]: the control tokens of VACE, and the scale of its hints; None without
    """
    import torch

    from dax.models.token_time import Modulation

    generator = torch.Generator(device).manual_seed(0)
    tokens = facts.tokens(size.height, size.width, size.num_frames)

    def gaussian(*shape, std=1.0):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) * std

    latents = facts.latent_shape(size.height, size.width, size.num_frames)
    with torch.no_grad():
        rotary_emb = model.rope(torch.empty(1, device=device).expand(1, *latents))
    hidden = gaussian(1, tokens, facts.width)
    text = gaussian(1, facts.image_tokens + facts.text_tokens, facts.width)
    if facts.token_time:
        temb = Modulation(gaussian(1, 2, 6, facts.width, std=0.5), facts.tokens(size.height, size.width, 1))
    else:
        temb = gaussian(1, 6, facts.width, std=0.5)
    return {
        "hidden_states": hidden,
        "text": text,
        "temb": temb,
        "rotary_emb": rotary_emb,
        "control": gaussian(1, tokens, facts.width) if facts.control_layers else None,
        "scale": hidden.new_ones(()),
    }


def operations_of(
    facts: Facts, size: Size, num_layers: int, gemm_dtype: str, attention_dtype: str
) -> list[roofline.Operation]:
    """What one call costs."""
    tokens = facts.tokens(size.height, size.width, size.num_frames)
    return roofline.block_operations(facts, tokens, gemm_dtype, attention_dtype, num_layers)
