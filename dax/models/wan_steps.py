"""What a step cache must know about a live Wan transformer: its time embeddings, and which checkpoint it is."""

import torch
from torch import nn

from dax.cache.checkpoint import TENSOR, digest, joint_digest
from dax.quant.linear import QuantLinear


@torch.no_grad()
def time_embeddings(transformer, timesteps, projected: bool) -> torch.Tensor:
    """The embedding of each timestep, in fp32 as TeaCache's polynomials were fitted; on the transformer's device.

    timesteps  [n]
    projected  also through the projection to the six modulations of a block
    returns    [n, C], or [n, 6 C] if projected (which at 14B costs 0.6 GB of fp32 weights for a moment)
    """
    embedder = transformer.condition_embedder
    x = embedder.timesteps_proj(timesteps.to(transformer.device)).float()
    first, second = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    x = linear(second, nn.functional.silu(linear(first, x)))
    return linear(embedder.time_proj, nn.functional.silu(x)) if projected else x


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.dequantized() if isinstance(layer, QuantLinear) else layer.weight.float()
    return nn.functional.linear(x, weight, layer.bias.float())


def checkpoint_digest(*transformers) -> str:
    """The digest of `dax.cache.checkpoint`, from the live model: its transformer, or its experts."""
    tables = [getattr(x, TENSOR).detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy() for x in transformers]
    return joint_digest([digest(table.tobytes(), len(x.blocks)) for table, x in zip(tables, transformers)])
