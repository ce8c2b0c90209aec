"""What DAX believes about a model equals what diffusers builds; every other family is refused from its config."""

import copy

import diffusers
import pytest
import torch

from dax.errors import DaxError
from dax.facts import FACTS, facts_named
from dax.facts_config import facts_from_config

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
I2V_INDEX = INDEX | {
    "_class_name": "WanImageToVideoPipeline",
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
}
TI2V_INDEX = INDEX | {"expand_timesteps": True}
VACE_INDEX = {key: value for key, value in INDEX.items() if key != "expand_timesteps"} | {
    "_class_name": "WanVACEPipeline",
    "transformer": ["diffusers", "WanVACETransformer3DModel"],
}
SECOND = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
EXPERTS = INDEX | SECOND | {"boundary_ratio": 0.875}
INDICES = {
    "wan-t2v": INDEX,
    "wan-i2v": I2V_INDEX,
    "wan-ti2v": TI2V_INDEX,
    "wan-vace": VACE_INDEX,
    "wan2.2-t2v": EXPERTS,
    "wan2.2-i2v": EXPERTS | {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9},
}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 384}


def config_of(name: str) -> dict:
    return {"_class_name": FACTS[name].transformer_class} | FACTS[name].transformer_config()


@pytest.mark.parametrize("name", FACTS)
def test_counts_equal_the_vendors_modules(name):
    facts = FACTS[name]
    with torch.device("meta"):
        model = getattr(diffusers, facts.transformer_class)(**facts.transformer_config())
    assert sum(p.numel() for p in model.parameters()) == facts.num_parameters
    assert sum(p.numel() for p in model.blocks[0].parameters()) == facts.num_block_parameters
    assert len(model.blocks) == facts.num_layers
    assert (model.blocks[0].attn1.heads, model.blocks[0].attn1.inner_dim) == (facts.num_heads, facts.width)
    config = {"_class_name": facts.transformer_class} | dict(model.config)
    second = config if facts.num_experts == 2 else None
    assert facts_from_config(INDICES[facts.family], config, facts.defaults.flow_shift, second) == facts
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(facts.linear_layers()) == sorted(linears)


def test_sizes_in_words():
    assert round(FACTS["wan2.1-t2v-14b"].num_parameters / 1e9, 1) == 14.3
    assert round(FACTS["wan2.1-t2v-1.3b"].num_parameters / 1e9, 2) == 1.42
    assert FACTS["wan2.1-t2v-14b"].tokens(720, 1280, 81) == 75600
    assert FACTS["wan2.1-t2v-1.3b"].tokens(480, 832, 81) == 32760
    assert FACTS["tiny"].latent_shape(128, 128, 17) == (16, 5, 16, 16)
    assert FACTS["tiny"].size_multiple == 16
    assert round(FACTS["wan2.1-i2v-14b-480p"].num_parameters / 1e9, 1) == 16.4
    assert [FACTS[name].num_images for name in ("tiny", "wan2.1-i2v-14b-720p", "wan2.1-flf2v-14b-720p")] == [0, 1, 2]
    assert [FACTS[f"wan2.2-{name}-a14b"].num_images for name in ("t2v", "i2v")] == [0, 1]


def test_tokens_equal_the_vendors(random_pipe):
    from dax.models.wan import target_of

    facts, latents = target_of(random_pipe).facts, []
    random_pipe.transformer.patch_embedding.register_forward_hook(lambda _, __, out: latents.append(out))
    random_pipe("a", height=48, width=80, num_frames=9, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert latents[0].flatten(2).shape[2] == facts.tokens(48, 80, 9)


def test_a_config_of_other_sizes_is_wan_too():
    facts = facts_from_config(None, config_of("tiny") | {"num_layers": 3})
    assert (facts.num_layers, facts.name) == (3, "wan-t2v-3x384")


def test_the_two_sizes_of_image_to_video_are_told_apart_by_flow_shift():
    """They are one config."""
    config = config_of("wan2.1-i2v-14b-720p")
    for shift, size in ((3.0, "480p"), (5.0, "720p"), (None, "480p")):
        assert facts_from_config(I2V_INDEX, config, shift).name == f"wan2.1-i2v-14b-{size}"
    assert facts_from_config(None, config_of("tiny") | IMAGE).name == "wan-i2v-4x384"


@pytest.mark.parametrize("pipeline", ["WanPipeline", "WanImageToVideoPipeline"])
def test_ti2v_is_one_model_in_either_pipeline(pipeline):
    config = config_of("wan2.2-ti2v-5b")
    facts = facts_from_config(TI2V_INDEX | {"_class_name": pipeline, "image_encoder": [None, None]}, config, 5.0)
    assert (facts.name, facts.pipeline_class) == ("wan2.2-ti2v-5b", pipeline)
    assert facts.num_images == (pipeline == "WanImageToVideoPipeline") and facts.size_multiple == 32
    assert facts.tokens(704, 1280, 121) == 27280 and facts.tokens(704, 1280, 1) == 880
    assert facts_from_config(None, config) == FACTS["wan2.2-ti2v-5b"]
    small = facts_from_config(None, config_of("tiny") | {"in_channels": 48, "out_channels": 48})
    assert (small.name, small.token_time) == ("wan-ti2v-4x384", True)


def test_vace_in_words():
    facts = FACTS["wan2.1-vace-14b"]
    assert (facts.num_blocks, round(facts.num_parameters / 1e9, 1)) == (48, 17.3)
    assert facts.cut(6).control_layers == (0, 5) and facts.cut(6).num_blocks == 8
    config = config_of("tiny") | {"_class_name": "WanVACETransformer3DModel", "vace_layers": [0, 3]}
    assert facts_from_config(VACE_INDEX, config).name == "wan-vace-4x384"


@pytest.mark.parametrize("layers", [[], [1, 2], [0, 4], [0, 2, 2], [2, 0], [0, True], "0", [0, 1.0]])
def test_hints_that_have_no_block_are_refused(layers):
    config = config_of("tiny") | {"_class_name": "WanVACETransformer3DModel", "vace_layers": layers}
    with pytest.raises(DaxError, match="vace_layers = .* must be ascending block numbers from 0 to 3"):
        facts_from_config(VACE_INDEX, config)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(DaxError, match="did you mean 'wan2.1-t2v-14b'"):
        facts_named("wan2.1-t2v-14")


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", -2),
        ("num_attention_heads", "3"),
        ("num_attention_heads", True),
        ("num_layers", 0),
        ("num_layers", 10**9),
        ("num_layers", 4.0),
        ("attention_head_dim", 127),
        ("ffn_dim", None),
        ("eps", 0),
        ("eps", float("nan")),
        ("cross_attn_norm", "yes"),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(DaxError, match=f"config.json: {key} = ") as caught:
        facts_from_config(INDEX, config_of("tiny") | {key: value})
    assert caught.value.exit_code == 3


@pytest.mark.fault(30)
@pytest.mark.parametrize("config", [None, [], "WanTransformer3DModel", 3])
def test_a_config_that_is_no_object_is_refused(config):
    with pytest.raises(DaxError, match="expected a JSON object"):
        facts_from_config(INDEX, config)


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", ["pipeline", "WanPipeline"]),
        ("_class_name", None),
        ("vae", ["os", "system"]),
        ("vae", ["autoencoder", "AutoencoderKLWan"]),
        ("transformer", "WanTransformer3DModel"),
        ("transformer", 7),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("scheduler", ["diffusers", ["UniPCMultistepScheduler"]]),
        ("tokenizer", ["transformers", "T5Tokenizer", "x"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("extra", ["subprocess", "run"]),
    ],
)
def test_foreign_classes_are_refused(key, value):
    with pytest.raises(DaxError, match=f"model_index.json: {key} = ") as caught:
        facts_from_config(INDEX | {key: value}, config_of("tiny"))
    assert caught.value.exit_code == 3


@pytest.mark.fault(33)
def test_a_class_name_list_in_the_transformer_is_refused():
    with pytest.raises(DaxError, match="_class_name = "):
        facts_from_config(INDEX, config_of("tiny") | {"_class_name": ["x", "WanTransformer3DModel"]})


VACE = {"_class_name": "WanVACETransformer3DModel", "vace_layers": [0, 2]}
FOREIGN = {
    "flux": (INDEX | {"_class_name": "FluxPipeline"}, {"_class_name": "FluxTransformer2DModel"}),
    "flux bare": (None, {"_class_name": "FluxTransformer2DModel", "num_layers": 19}),
    "wan i2v pipeline, t2v inside": (INDEX | {"_class_name": "WanImageToVideoPipeline"}, {}),
    "wan t2v pipeline, i2v inside": (INDEX, IMAGE),
    "wan2.2 i2v": (INDEX | {"_class_name": "WanImageToVideoPipeline"}, {"in_channels": 36}),
    "wan2.2 i2v experts": (I2V_INDEX | {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, IMAGE),
    "wan i2v in 16 channels": (I2V_INDEX, IMAGE | {"in_channels": 16}),
    "wan i2v, image keys of another width": (I2V_INDEX, IMAGE | {"added_kv_proj_dim": 5120}),
    "wan i2v, three images": (I2V_INDEX, IMAGE | {"pos_embed_seq_len": 771}),
    "image keys without an image": (INDEX, {"added_kv_proj_dim": 384}),
    "wan i2v 36 channels": (INDEX, {"in_channels": 36}),
    "wan2.2 two experts": (INDEX | {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {}),
    "wan2.2 boundary": (INDEX | {"boundary_ratio": 0.875}, {}),
    "wan2.2 5b without its timesteps": (INDEX, {"in_channels": 48, "out_channels": 48}),
    "wan2.2 5b out of 16 channels": (TI2V_INDEX, {"in_channels": 48}),
    "timesteps of wan2.2 5b, t2v inside": (TI2V_INDEX, {}),
    "vace inside another pipeline": (INDEX, VACE),
    "vace outside, t2v inside": (VACE_INDEX, {}),
    "vace around another class": (VACE_INDEX | {"transformer": ["diffusers", "WanTransformer3DModel"]}, VACE),
    "vace of other channels": (VACE_INDEX, VACE | {"vace_in_channels": 64}),
    "vace with image tokens": (VACE_INDEX, VACE | {"image_dim": 1280}),
    "vace of 48 channels": (VACE_INDEX, VACE | {"in_channels": 48}),
    "wan2.2 t2v pipeline, i2v inside": (EXPERTS, {"in_channels": 36}),
    "two experts with image tokens": (I2V_INDEX | SECOND | {"boundary_ratio": 0.9}, IMAGE),
    "two experts of 48 channels": (EXPERTS | {"expand_timesteps": True}, {"in_channels": 48, "out_channels": 48}),
    "vace with two experts": (VACE_INDEX | SECOND | {"boundary_ratio": 0.9}, VACE),
    "other norm": (INDEX, {"qk_norm": "layer_norm"}),
    "other patch": (INDEX, {"patch_size": [1, 1, 1]}),
}


@pytest.mark.fault(34)
@pytest.mark.parametrize("case", FOREIGN)
def test_other_families_are_refused_from_config_alone(case):
    index, difference = copy.deepcopy(FOREIGN[case])
    with pytest.raises(DaxError, match="supported: Wan2.1 text-to-video") as caught:
        facts_from_config(index, config_of("tiny") | difference)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_experts_of_other_shapes_or_none_are_refused():
    config = config_of("tiny")
    assert facts_from_config(EXPERTS, config, None, config).name == "wan2.2-t2v-4x384"
    for second, says in (
        (None, "transformer_2/config.json: missing: one expert is not enough"),
        (config | {"num_layers": 3}, "transformer_2/config.json: not of the shapes of transformer/config.json"),
        (config | {"num_layers": 0}, "transformer_2/config.json: num_layers = 0"),
    ):
        with pytest.raises(DaxError, match=says):
            facts_from_config(EXPERTS, config, None, second)
    with pytest.raises(DaxError, match="model_index.json: transformer_2 = ..os', 'system'.: not supported"):
        facts_from_config(EXPERTS | {"transformer_2": ["os", "system"]}, config, None, config)
    for ratio in (True, -0.1, "0.9"):
        with pytest.raises(DaxError, match="boundary_ratio = .* must be a number from 0 to 1"):
            facts_from_config(EXPERTS | {"boundary_ratio": ratio}, config, None, config)


def test_the_experts_share_the_steps_as_the_pipeline_has_it():
    """t >= boundary_ratio * train_steps is the first expert's; noise levels are timesteps of one training step."""
    facts = FACTS["wan2.2-t2v-a14b"]
    assert facts.expert_steps([999.0, 875.0, 874.9, 3.0], 1000) == (2, 2)
    assert facts.expert_steps([874, 3], 1000) == (0, 2) and facts.expert_steps([999], 1000) == (1, 0)
    assert facts.expert_steps([499, 437], 500) == (1, 1) and facts.expert_steps([0.9, 0.875, 0.8], 1) == (2, 1)
    assert FACTS["wan2.1-t2v-14b"].expert_steps([999, 3], 1000) == (2,)
