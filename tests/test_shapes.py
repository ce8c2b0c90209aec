"""The lists of expected tensors are those of the vendors' own classes, at real and at small sizes, on no memory."""

import json

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from dax.errors import DaxError
from dax.facts import FACTS
from dax.facts_config import facts_from_config
from dax.generate.shapes import text_encoder_shapes, transformer_shapes, vae_shapes
from dax.models.tiny import FOLDER

UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def of(cls, config) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a class built without memory."""
    with torch.device("meta"):
        model = cls(config) if isinstance(config, UMT5Config) else cls(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_transformers(name, cross_attn_norm):
    config = FACTS[name].transformer_config() | {"cross_attn_norm": cross_attn_norm}
    kind = FACTS[name].transformer_class
    facts = facts_from_config(None, {"_class_name": kind, **config, "patch_size": [1, 2, 2]})
    assert transformer_shapes(facts) == of(getattr(diffusers, kind), config)


@pytest.mark.parametrize(
    "config", [{}, UMT5_XXL, {"d_model": 32, "num_heads": 3, "d_kv": 16, "num_layers": 2, "feed_forward_proj": "relu"}]
)
def test_text_encoders(config):
    expected = of(UMT5EncoderModel, UMT5Config(**config))
    assert expected.pop("encoder.embed_tokens.weight") == expected["shared.weight"]
    assert text_encoder_shapes(config) == expected


@pytest.mark.parametrize(
    "config",
    [
        {},  # Wan2.1's own
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 3, 2], "num_res_blocks": 1},
        {"base_dim": 8, "temperal_downsample": [True, False, True]},
        {  # that of Wan2.2 TI2V-5B
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        {"base_dim": 8, "num_res_blocks": 1, "is_residual": True, "temperal_downsample": [True, False, True]},
        json.loads((FOLDER / "vae" / "config.json").read_text()),
    ],
)
def test_autoencoders(config):
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    assert vae_shapes(config) == of(AutoencoderKLWan, config)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("shapes", "change"),
    [
        (vae_shapes, {"base_dim": 0}),
        (vae_shapes, {"z_dim": "16"}),
        (vae_shapes, {"num_res_blocks": True}),
        (vae_shapes, {"dim_mult": [1, 2]}),
        (vae_shapes, {"temperal_downsample": [False, False, True]}),
        (text_encoder_shapes, {"num_layers": -1}),
        (text_encoder_shapes, {"num_heads": 2.0}),
        (text_encoder_shapes, {"vocab_size": 10**9}),
    ],
)
def test_row_30_impossible_numbers(shapes, change):
    with pytest.raises(DaxError, match=next(iter(change))) as caught:
        shapes(change)
    assert caught.value.exit_code == 3


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "change", [{"in_channels": 12}, {"out_channels": 12}, {"scale_factor_spatial": 16}, {"attn_scales": [1.0]}]
)
def test_row_34_an_autoencoder_between_wan_2_1_and_2_2(change):
    with pytest.raises(DaxError, match=next(iter(change))) as caught:
        vae_shapes(change)
    assert caught.value.exit_code == 3
