"""What a model is: one family as data, enough to cost it, check it and build it, without torch.

`FACTS` holds the models DAX knows by name; `facts_from_config` reads the same facts from a diffusers folder's JSON and
refuses every family DAX does not know, before a weight is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from dax.errors import DaxError, nearest

SUPPORTED = (
    "Wan2.1 text-to-video (WanPipeline with one 16-channel WanTransformer3DModel), image-to-video and "
    "first-last-frame (WanImageToVideoPipeline with 36 channels and image tokens), Wan2.2 TI2V-5B (either pipeline "
    "with 48 channels and expand_timesteps), text- and image-to-video of Wan2.2 A14B (two experts, a boundary_ratio, "
    "no image tokens), Wan2.1 VACE (WanVACEPipeline with one WanVACETransformer3DModel)"
)
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
CLIP_TOKENS = 257  # of one image: CLIP ViT-H/14 at 224 x 224 and its class token


@dataclass(frozen=True)
class Defaults:
    """The request a model is meant for. Pixels, frames, frames per second."""

    height: int
    width: int
    num_frames: int
    steps: int = 50
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None  # of the second expert, where there are two
    flow_shift: float = 3.0
    fps: int = 16


@dataclass(frozen=True)
class Facts:
    """A video diffusion transformer and its surroundings. Names follow the diffusers config.

    `patch` is (time, height, width) in latent cells; `vae_temporal` and `vae_spatial` are pixels per latent cell.
    `image_tokens` go before the text's in cross-attention, 0 for text-to-video: CLIP_TOKENS of width `image_dim` for
    each image; `image_positions` tells whether they get a position embedding, as first-last-frame has. With
    `token_time` each token has a timestep, and a given first frame stands in the latents at timestep 0.
    `control_layers` of VACE are the blocks after which a hint is added, each hint from a control block of its own.
    With a `boundary_ratio` there are two experts of these shapes: one for the timesteps from that share of all on, one
    for those below; else None.
    """

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    defaults: Defaults
    text_dim: int = 4096
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_attn_norm: bool = True
    rope_max_seq_len: int = 1024
    vae_temporal: int = 4
    vae_spatial: int = 8
    text_tokens: int = 512
    image_tokens: int = 0
    image_dim: int | None = None
    image_positions: bool = False
    token_time: bool = False
    control_layers: tuple[int, ...] = ()
    control_channels: int = 0
    boundary_ratio: float | None = None
    full_precision: tuple[str, ...] = ("condition_embedder", "proj_out")  # linear layers that 8 bits leave alone
    family: str = "wan-t2v"
    pipeline_class: str = "WanPipeline"
    transformer_class: str = "WanTransformer3DModel"

    @property
    def width(self) -> int:
        """C = H * D."""
        return self.num_heads * self.head_dim

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.vae_spatial * max(self.patch[1:])

    @property
    def num_images(self) -> int:
        """Images a clip starts from: none, the first frame, or the first and the last."""
        if self.token_time:
            return int(self.pipeline_class == "WanImageToVideoPipeline")
        return max(self.image_tokens // CLIP_TOKENS, int(self.in_channels > self.out_channels))

    @property
    def num_experts(self) -> int:
        """Transformers that share the loop."""
        return 1 if self.boundary_ratio is None else 2

    def expert_steps(self, timesteps: Sequence[float], train_steps: int = 1000) -> tuple[int, ...]:
        """How many of a loop's steps each expert takes, by the timesteps of a scheduler trained on `train_steps`."""
        if self.boundary_ratio is None:
            return (len(timesteps),)
        first = sum(t >= self.boundary_ratio * train_steps for t in timesteps)  # they fall
        return first, len(timesteps) - first

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """(channels, frames, rows, columns) of what the transformer is given: the latent video, and its condition."""
        frames = (num_frames - 1) // self.vae_temporal + 1
        return self.in_channels, frames, height // self.vae_spatial, width // self.vae_spatial

    def tokens(self, height: int, width: int, num_frames: int) -> int:
        """S: tokens of one video of that size, one per patch of latent cells."""
        cells = self.latent_shape(height, width, num_frames)[1:]
        return prod(cell // step for cell, step in zip(cells, self.patch, strict=True))

    @property
    def num_blocks(self) -> int:
        """Transformer blocks, control blocks included."""
        return self.num_layers + len(self.control_layers)

    def cut(self, num_layers: int) -> "Facts":
        """The model with its first blocks only, and the control blocks that feed those."""
        control = tuple(layer for layer in self.control_layers if layer < num_layers)
        return replace(self, num_layers=num_layers, control_layers=control)

    @property
    def num_block_parameters(self) -> int:
        """Parameters of one block: attentions, the feed-forward, the norms and the modulation table."""
        C, F = self.width, self.ffn_dim
        attention = 4 * (C * C + C) + 2 * C  # q k v o with bias, RMS norms of q and k
        image = 2 * (C * C + C) + C if self.image_tokens else 0  # k and v, RMS norm of k
        return 2 * attention + image + (C * F + F) + (F * C + C) + 2 * C * self.cross_attn_norm + 6 * C

    @property
    def num_parameters(self) -> int:
        """Parameters of the transformer alone."""
        C, cells = self.width, prod(self.patch)
        patches = self.in_channels * cells * C + C
        time = (self.freq_dim * C + C) + (C * C + C) + (C * 6 * C + 6 * C)
        text = (self.text_dim * C + C) + (C * C + C)
        if width := self.image_dim:  # norm, two layers, norm, positions
            text += 2 * width + (width * width + width) + (width * C + C) + 2 * C
            text += self.image_tokens * width * self.image_positions
        head = C * self.out_channels * cells + self.out_channels * cells + 2 * C
        control = 0
        if hints := len(self.control_layers):  # a patch embedding, one layer in, one out of each block
            control = self.control_channels * cells * C + C + (1 + hints) * (C * C + C)
        return patches + time + text + head + control + self.num_blocks * self.num_block_parameters

    def linear_layers(self) -> list[str]:
        """The names of all linear layers, as the vendor has them."""
        embedders = ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"]
        embedders += ["text_embedder.linear_1", "text_embedder.linear_2"]
        projections = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
        if self.image_tokens:
            embedders += ["image_embedder.ff.net.0.proj", "image_embedder.ff.net.2"]
            projections += ["attn2.add_k_proj", "attn2.add_v_proj"]
        names = [f"condition_embedder.{name}" for name in embedders]
        control = [f"vace_blocks.{i}" for i in range(len(self.control_layers))]
        for block in (*(f"blocks.{i}" for i in range(self.num_layers)), *control):
            names += [f"{block}.{name}" for name in (*projections, "ffn.net.0.proj", "ffn.net.2")]
        names += [f"{block}.proj_out" for block in control] + [f"{block}.proj_in" for block in control[:1]]
        return [*names, "proj_out"]

    def transformer_config(self) -> dict[str, Any]:
        """The keyword arguments of the vendor's transformer class that build this model."""
        control = {"vace_layers": list(self.control_layers), "vace_in_channels": self.control_channels}
        return {
            "patch_size": self.patch,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.num_layers,
            "cross_attn_norm": self.cross_attn_norm,
            "eps": self.eps,
            "rope_max_seq_len": self.rope_max_seq_len,
            "image_dim": self.image_dim,
            "added_kv_proj_dim": self.width if self.image_tokens else None,
            "pos_embed_seq_len": self.image_tokens if self.image_positions else None,
            **(control if self.control_layers else {}),
        }


def image_to_video(name: str, defaults: Defaults, num_images: int = 1) -> Facts:
    """Wan2.1 14B given its first frame, or its first and its last."""
    return Facts(
        name, 40, 40, 128, 13824, defaults,
        in_channels=36, image_tokens=num_images * CLIP_TOKENS, image_dim=1280, image_positions=num_images == 2,
        family="wan-i2v", pipeline_class="WanImageToVideoPipeline",
    )  # fmt: skip


def controlled(layers) -> dict[str, Any]:
    """What VACE adds to the facts: 32 channels of encoded video, 64 of its mask, and hints after those blocks."""
    return {
        "control_layers": tuple(layers),
        "control_channels": 96,
        "family": "wan-vace",
        "pipeline_class": "WanVACEPipeline",
        "transformer_class": "WanVACETransformer3DModel",
    }


EVERY_FIFTH = controlled(range(0, 40, 5))
TI2V = {"in_channels": 48, "out_channels": 48, "vae_spatial": 16, "token_time": True, "family": "wan-ti2v"}
WITHOUT_IMAGE_TOKENS = {  # channels: what Wan2.2 is
    16: {"family": "wan2.2-t2v"},
    36: {"family": "wan2.2-i2v", "in_channels": 36, "pipeline_class": "WanImageToVideoPipeline"},
    48: TI2V,
}


def a14b(name: str, defaults: Defaults, boundary_ratio: float, channels: int) -> Facts:
    """Wan2.2 with two experts, each of Wan2.1 14B's shapes."""
    kind = WITHOUT_IMAGE_TOKENS[channels]
    return Facts(name, 40, 40, 128, 13824, defaults, boundary_ratio=boundary_ratio, **kind)


FACTS = {
    facts.name: facts
    for facts in (
        Facts("tiny", 4, 3, 128, 1024, Defaults(128, 128, 17, guidance_scale=4.0, fps=8), text_dim=192),
        Facts("wan2.1-t2v-1.3b", 30, 12, 128, 8960, Defaults(480, 832, 81)),
        Facts("wan2.1-t2v-14b", 40, 40, 128, 13824, Defaults(720, 1280, 81, flow_shift=5.0)),
        image_to_video("wan2.1-i2v-14b-480p", Defaults(480, 832, 81, steps=40)),
        image_to_video("wan2.1-i2v-14b-720p", Defaults(720, 1280, 81, steps=40, flow_shift=5.0)),
        image_to_video("wan2.1-flf2v-14b-720p", Defaults(720, 1280, 81, flow_shift=16.0), num_images=2),
        Facts("wan2.1-vace-1.3b", 30, 12, 128, 8960, Defaults(480, 832, 81), **controlled(range(0, 30, 2))),
        Facts("wan2.1-vace-14b", 40, 40, 128, 13824, Defaults(720, 1280, 81, flow_shift=5.0), **EVERY_FIFTH),
        Facts("wan2.2-ti2v-5b", 30, 24, 128, 14336, Defaults(704, 1280, 121, flow_shift=5.0, fps=24), **TI2V),
        a14b(
            "wan2.2-t2v-a14b",
            Defaults(720, 1280, 81, steps=40, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0),
            boundary_ratio=0.875,
            channels=16,
        ),
        a14b(
            "wan2.2-i2v-a14b",
            Defaults(720, 1280, 81, steps=40, guidance_scale=3.5, guidance_scale_2=3.5, flow_shift=5.0),
            boundary_ratio=0.9,
            channels=36,
        ),
    )
}


def facts_named(name: str) -> Facts:
    """The facts of a model DAX knows by name. DaxError("bad_request") names the nearest."""
    if name not in FACTS:
        raise DaxError("bad_request", f"unknown model name {name!r}{nearest(name, FACTS)}")
    return FACTS[name]


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
    config = check_mapping(transformer_config, "transformer/config.json")
    check_class(config, "transformer/config.json", "WanTransformer3DModel", "WanVACETransformer3DModel")
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        refuse(f"transformer/config.json: qk_norm = {config['qk_norm']!r}")

    def number(key: str, default: int, most: int) -> int:
        value = config.get(key, default)
        if type(value) is not int or not 0 < value <= most:
            raise DaxError(
                "bad_model", f"transformer/config.json: {key} = {value!r} must be a whole number from 1 to {most}"
            )
        return value

    image = config.get("image_dim") is not None
    control = config["_class_name"] == "WanVACETransformer3DModel"
    wide = config.get("in_channels") == 48 and not (image or control)  # Wan2.2 TI2V-5B
    ins = (16,) if control else (36,) if image else (16, 36, 48)
    for key, known in (("in_channels", ins), ("out_channels", (48,) if wide else (16,))):
        channels = config.get(key, 16)
        if channels is None and key == "out_channels" and config.get("in_channels", 16) in known:
            continue  # the vendor takes in_channels
        if number(key, 16, 4096) not in known:
            refuse(f"transformer/config.json: {key} = {channels}{' with image tokens' * image}")
    patch = config.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list | tuple) or list(patch) != [1, 2, 2]:
        refuse(f"transformer/config.json: patch_size = {patch!r}")
    eps = config.get("eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise DaxError("bad_model", f"transformer/config.json: eps = {eps!r} must be a small positive number")
    head_dim = number("attention_head_dim", 128, 1024)
    if head_dim % 2:
        raise DaxError("bad_model", f"transformer/config.json: attention_head_dim = {head_dim} must be even")
    cross_attn_norm = config.get("cross_attn_norm", True)
    if type(cross_attn_norm) is not bool:
        raise DaxError(
            "bad_model", f"transformer/config.json: cross_attn_norm = {cross_attn_norm!r} must be true or false"
        )
    facts = Facts(
        name="",
        **kind_of(config, number, boundary),
        boundary_ratio=boundary,
        num_layers=number("num_layers", 40, 1000),
        num_heads=number("num_attention_heads", 40, 1000),
        head_dim=head_dim,
        ffn_dim=number("ffn_dim", 13824, 1_000_000),
        text_dim=number("text_dim", 4096, 100_000),
        freq_dim=number("freq_dim", 256, 100_000),
        eps=eps,
        cross_attn_norm=cross_attn_norm,
        rope_max_seq_len=number("rope_max_seq_len", 1024, 1_000_000),
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


def kind_of(config: dict, number, boundary_ratio: float | None) -> dict[str, Any]:
    """What tells a member of the family from plain text-to-video, as facts."""
    if config["_class_name"] == "WanVACETransformer3DModel":
        return control_facts(config, number)
    return no_image(config, boundary_ratio) if config.get("image_dim") is None else image_facts(config, number)


def image_facts(config: dict, number) -> dict[str, Any]:
    """What image-to-video adds to the facts. The image's tokens are embedded as wide as the model."""
    width = number("num_attention_heads", 40, 1000) * number("attention_head_dim", 128, 1024)
    if config.get("added_kv_proj_dim") != width:
        refuse(f"transformer/config.json: added_kv_proj_dim = {config.get('added_kv_proj_dim')!r}, not {width}")
    positions = config.get("pos_embed_seq_len")
    if positions not in (None, 2 * CLIP_TOKENS):
        refuse(f"transformer/config.json: pos_embed_seq_len = {positions!r}, not {2 * CLIP_TOKENS}: two images")
    return {
        "in_channels": 36,
        "image_tokens": CLIP_TOKENS if positions is None else positions,
        "image_dim": number("image_dim", 1280, 100_000),
        "image_positions": positions is not None,
        "family": "wan-i2v",
        "pipeline_class": "WanImageToVideoPipeline",
    }


def no_image(config: dict, boundary_ratio: float | None) -> dict[str, Any]:
    """What no image tokens mean beside two experts or more channels; refuses a transformer that has parts for them."""
    for key in ("added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            refuse(f"transformer/config.json: {key} = {config[key]!r} without image_dim")
    channels = config.get("in_channels", 16)
    return WITHOUT_IMAGE_TOKENS[channels] if boundary_ratio is not None or channels in (36, 48) else {}


def control_facts(config: dict, number) -> dict[str, Any]:
    """What VACE adds to the facts."""
    if config.get("image_dim") is not None:
        refuse("transformer/config.json: image_dim in WanVACETransformer3DModel")
    if number("vace_in_channels", 96, 4096) != 96:
        refuse(f"transformer/config.json: vace_in_channels = {config['vace_in_channels']}")
    layers, depth = config.get("vace_layers", list(range(0, 40, 5))), number("num_layers", 40, 1000)
    whole = isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)
    if not whole or list(layers) != sorted(set(layers)) or 0 not in layers or layers[-1] >= depth:
        raise DaxError(
            "bad_model",
            f"transformer/config.json: vace_layers = {layers!r} must be ascending block numbers from 0 to {depth - 1}, "
            "0 among them",
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
