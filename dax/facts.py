"""What a model is: one family as data, enough to cost it, check it and build it, without torch.

`FACTS` holds the models DAX knows by name; `dax.facts_config` reads the same facts from a diffusers folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from dax.errors import DaxError, nearest

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

    @property
    def plain(self) -> bool:
        """Text-to-video by one transformer: all that `dax compare`, `tune` and `calibrate` know so far."""
        return not self.control_layers and self.num_images == 0 and self.num_experts == 1

    def expert_steps(self, timesteps: Sequence[float], train_steps: int) -> tuple[int, ...]:
        """How many of a loop's steps each expert takes, by timesteps of a scheduler of so many training steps.

        Noise levels are timesteps of a single one.
        """
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
