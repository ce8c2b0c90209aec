"""Facts of a diffusers folder, from its JSON alone: a family DAX does not know is refused before a weight is read."""

import re
from dataclasses import replace
from typing import Any

from dax.errors import DaxError
from dax.facts import CLIP_TOKENS, FACTS, WITHOUT_IMAGE_TOKENS, Facts, controlled

SUPPORTED = (
    "Wan2.1 text-to-video (WanPipeline with one 16-channel WanTransformer3DModel), image-to-video and "
    "first-last-frame (WanImageToVideoPipeline with 36 channels and image tokens), Wan2.2 TI2V-5B (either pipeline "
    "with 48 channels and expand_timesteps), text- and image-to-video of Wan2.2 A14B (two experts, a boundary_ratio, "
    "no image tokens), Wan2.1 VACE (WanVACEPipeline with one WanVACETransformer3DModel)"
)
CONFIG = "transformer/config.json"
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
COMPONENTS = {  # of a pipeline folder: library, classes
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5Tokenizer(Fast)?"),
    "scheduler": ("diffusers", "[A-Za-z]+Scheduler"),
}
OWN_COMPONENTS = {  # of a pipeline, beside those or instead
    "WanImageToVideoPipeline": {
        "image_encoder": ("transformers", "CLIPVisionModel"),
        "image_processor": ("transformers", "CLIPImageProcessor(Fast|Pil)?"),
    },
    "WanVACEPipeline": {"transformer": ("diffusers", "WanVACETransformer3DModel")},
}


def facts_from_config(
    model_index: dict | None,
    transformer_config: dict,
    flow_shift: float | None = None,
    second_config: dict | None = None,
) -> Facts:
    """Facts of a diffusers folder, from `model_index.json` (None for a bare transformer) and the transformer's config.

    A key the config leaves out has the vendor's default, as it has when diffusers loads it.
    flow_shift   of the scheduler, where known: Wan2.1 I2V 480P and 720P are one config, and this alone tells which of
                 them is meant; 480P unless it is that of 720P
    second_config   of transformer_2, where the index names one: it must be of the same shapes
    DaxError("bad_model") for another family, a variant DAX does not know, or an impossible value.
    """
    boundary = None if model_index is None else check_model_index(model_index)
    config = check_mapping(transformer_config, CONFIG)
    check_transformer(config)
    facts = Facts(
        name="",
        **kind_of(config, boundary),
        boundary_ratio=boundary,
        num_layers=whole(config, "num_layers", 40, 1000),
        num_heads=whole(config, "num_attention_heads", 40, 1000),
        head_dim=whole(config, "attention_head_dim", 128, 1024),
        ffn_dim=whole(config, "ffn_dim", 13824, 1_000_000),
        text_dim=whole(config, "text_dim", 4096, 100_000),
        freq_dim=whole(config, "freq_dim", 256, 100_000),
        eps=config.get("eps", 1e-6),
        cross_attn_norm=config.get("cross_attn_norm", True),
        rope_max_seq_len=whole(config, "rope_max_seq_len", 1024, 1_000_000),
        defaults=FACTS["wan2.1-t2v-1.3b"].defaults,
    )
    if model_index is not None:
        pipeline = model_index["_class_name"]
        if facts.token_time:
            facts = replace(facts, pipeline_class=pipeline)
        if pipeline != facts.pipeline_class:
            refuse(f"model_index.json: {pipeline} around a transformer for {facts.pipeline_class}")
        if bool(expanded := model_index.get("expand_timesteps")) != facts.token_time:
            refuse(f"model_index.json: expand_timesteps = {expanded!r} around {facts.in_channels} channels")
        check_experts(facts, second_config)
    return named(facts, flow_shift)


def check_transformer(config: dict) -> None:
    """Refuse a transformer that is no Wan, or whose values DAX does not know."""
    check_class(config, CONFIG, "WanTransformer3DModel", "WanVACETransformer3DModel")
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        refuse(f"{CONFIG}: qk_norm = {config['qk_norm']!r}")
    check_channels(config)
    patch = config.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list | tuple) or list(patch) != [1, 2, 2]:
        refuse(f"{CONFIG}: patch_size = {patch!r}")
    eps, cross_attn_norm = config.get("eps", 1e-6), config.get("cross_attn_norm", True)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise DaxError("bad_model", f"{CONFIG}: eps = {eps!r} must be a small positive number")
    if (head_dim := whole(config, "attention_head_dim", 128, 1024)) % 2:
        raise DaxError("bad_model", f"{CONFIG}: attention_head_dim = {head_dim} must be even")
    if type(cross_attn_norm) is not bool:
        raise DaxError("bad_model", f"{CONFIG}: cross_attn_norm = {cross_attn_norm!r} must be true or false")


def check_channels(config: dict) -> None:
    """Refuse channels that no known member of the family has."""
    image, control = config.get("image_dim") is not None, config["_class_name"] == "WanVACETransformer3DModel"
    wide = config.get("in_channels") == 48 and not (image or control)  # Wan2.2 TI2V-5B
    ins = (16,) if control else (36,) if image else (16, 36, 48)
    for key, known in (("in_channels", ins), ("out_channels", (48,) if wide else (16,))):
        channels = config.get(key, 16)
        if channels is None and key == "out_channels" and config.get("in_channels", 16) in known:
            continue  # the vendor takes in_channels
        if whole(config, key, 16, 4096) not in known:
            refuse(f"{CONFIG}: {key} = {channels}{' with image tokens' * image}")


def whole(config: dict, key: str, default: int, most: int) -> int:
    """A value of the transformer's config; DaxError("bad_model") unless it is a whole number from 1 to `most`."""
    value = config.get(key, default)
    if type(value) is not int or not 0 < value <= most:
        raise DaxError("bad_model", f"{CONFIG}: {key} = {value!r} must be a whole number from 1 to {most}")
    return value


def check_experts(facts: Facts, second_config: dict | None) -> None:
    """Refuse a pipeline that lacks an expert, or whose two are not of one kind."""
    if facts.boundary_ratio is None:
        if facts.in_channels == 36 and not facts.image_tokens:
            refuse("model_index.json: 36 channels without image tokens take two experts, and it has no boundary_ratio")
        return
    if facts.image_tokens or facts.token_time or facts.control_layers:
        refuse(f"model_index.json: boundary_ratio = {facts.boundary_ratio} around {facts.family}")
    if second_config is None:
        raise DaxError("bad_model", "transformer_2/config.json: missing: one expert is not enough")
    alone = replace(facts, boundary_ratio=None)
    try:
        second = facts_from_config(None, second_config)
    except DaxError as error:
        raise DaxError(error.code, str(error).replace("transformer/", "transformer_2/", 1)) from None
    if replace(alone, name="", family="", defaults=second.defaults) != replace(second, name="", family=""):
        raise DaxError("bad_model", "transformer_2/config.json: not of the shapes of transformer/config.json")


def flow_shift_of(scheduler_config: Any) -> float | None:
    """The shift of a scheduler's noise levels, by either name that schedulers have for it; None if it tells none."""
    config = scheduler_config if isinstance(scheduler_config, dict) else {}
    return config.get("flow_shift", config.get("shift"))


def named(facts: Facts, flow_shift: float | None) -> Facts:
    """The known model of those shapes that is meant at that flow_shift; else named after family and sizes."""
    free = {"rope_max_seq_len": facts.rope_max_seq_len, "pipeline_class": facts.pipeline_class}
    same = [
        known
        for known in FACTS.values()
        if replace(facts, name=known.name, defaults=known.defaults) == replace(known, **free)
    ]
    if same:
        found = next((known for known in same if known.defaults.flow_shift == flow_shift), same[0])
        return replace(found, **free)
    return replace(facts, name=f"{facts.family}-{facts.num_layers}x{facts.width}")


def kind_of(config: dict, boundary_ratio: float | None) -> dict[str, Any]:
    """What tells a member of the family from plain text-to-video, as facts."""
    if config["_class_name"] == "WanVACETransformer3DModel":
        return control_facts(config)
    return no_image(config, boundary_ratio) if config.get("image_dim") is None else image_facts(config)


def image_facts(config: dict) -> dict[str, Any]:
    """What image-to-video adds to the facts. The image's tokens are embedded as wide as the model."""
    width = whole(config, "num_attention_heads", 40, 1000) * whole(config, "attention_head_dim", 128, 1024)
    if config.get("added_kv_proj_dim") != width:
        refuse(f"{CONFIG}: added_kv_proj_dim = {config.get('added_kv_proj_dim')!r}, not {width}")
    positions = config.get("pos_embed_seq_len")
    if positions not in (None, 2 * CLIP_TOKENS):
        refuse(f"{CONFIG}: pos_embed_seq_len = {positions!r}, not {2 * CLIP_TOKENS}: two images")
    return {
        "in_channels": 36,
        "image_tokens": CLIP_TOKENS if positions is None else positions,
        "image_dim": whole(config, "image_dim", 1280, 100_000),
        "image_positions": positions is not None,
        "family": "wan-i2v",
        "pipeline_class": "WanImageToVideoPipeline",
    }


def no_image(config: dict, boundary_ratio: float | None) -> dict[str, Any]:
    """What no image tokens mean beside two experts or more channels; refuses a transformer that has parts for them."""
    for key in ("added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            refuse(f"{CONFIG}: {key} = {config[key]!r} without image_dim")
    channels = config.get("in_channels", 16)
    return WITHOUT_IMAGE_TOKENS[channels] if boundary_ratio is not None or channels in (36, 48) else {}


def control_facts(config: dict) -> dict[str, Any]:
    """What VACE adds to the facts."""
    if config.get("image_dim") is not None:
        refuse("transformer/config.json: image_dim in WanVACETransformer3DModel")
    if whole(config, "vace_in_channels", 96, 4096) != 96:
        refuse(f"{CONFIG}: vace_in_channels = {config['vace_in_channels']}")
    layers, depth = config.get("vace_layers", list(range(0, 40, 5))), whole(config, "num_layers", 40, 1000)
    numbers = isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)
    if not numbers or list(layers) != sorted(set(layers)) or 0 not in layers or layers[-1] >= depth:
        raise DaxError(
            "bad_model",
            f"{CONFIG}: vace_layers = {layers!r} must be ascending block numbers from 0 to {depth - 1}, 0 among them",
        )
    return controlled(layers)


def check_model_index(model_index: dict) -> float | None:
    """The boundary_ratio of an index. Refuses a pipeline DAX does not know, and foreign classes, by the index alone."""
    index = check_mapping(model_index, "model_index.json")
    check_class(index, "model_index.json", *PIPELINES)
    second, boundary = index.get("transformer_2") not in (None, [None, None]), index.get("boundary_ratio")
    if second != (boundary is not None):
        named_so = f"transformer_2 = {index.get('transformer_2')!r} and boundary_ratio = {boundary!r}"
        refuse(f"model_index.json: {named_so}: two experts need both")
    if boundary is not None and (type(boundary) not in (int, float) or not 0 <= boundary <= 1):
        raise DaxError("bad_model", f"model_index.json: boundary_ratio = {boundary!r} must be a number from 0 to 1")
    components = COMPONENTS | OWN_COMPONENTS.get(index["_class_name"], {})
    for key, value in index.items():
        if key.startswith("_"):
            continue
        if isinstance(value, list) and value != [None, None] or key in components and value is not None:
            check_component(key, value, *components.get(key, ("", "")))
    return boundary


def check_component(name: str, value: Any, library: str, classes: str) -> None:
    """Refuse a component that is not a class DAX knows for that place, so that nothing foreign is ever imported."""
    known = isinstance(value, list) and len(value) == 2 and value[0] == library
    if value != [None, None] and not (known and isinstance(value[1], str) and re.fullmatch(classes, value[1])):
        refuse(f"model_index.json: {name} = {value!r}")


def check_mapping(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise DaxError("bad_model", f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def check_class(config: dict, where: str, *wanted: str) -> None:
    name = config.get("_class_name")
    if name not in wanted:
        refuse(f"{where}: _class_name = {name!r}")


def refuse(what: str) -> None:
    raise DaxError("bad_model", f"{what}: not supported; supported: {SUPPORTED}")
