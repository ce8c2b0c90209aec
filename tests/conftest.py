"""A small random Wan pipeline, loud enough that a wrong part shows, for tests that need no trained weights.

`random_pipe` is a fresh fp32 pipeline in memory, the same in every test; `random_folder` the same pipeline saved in
diffusers' layout (read only: copy it before you break it). Nothing is downloaded.
"""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_runtest_setup(item):
    """Tests of devices are skipped where there are none."""
    if wanted := 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0:
        import torch

        if torch.cuda.device_count() < wanted:
            pytest.skip(f"needs {wanted} CUDA device{'s' * (wanted > 1)}")


RANDOM_TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def build_tokenizer():
    """A T5 tokenizer of single printable characters, built offline."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(8))]
    return T5Tokenizer(vocab=special + letters + extra, extra_ids=8, model_max_length=512)


def build_random_pipe():
    """WanPipeline in fp32 on the CPU with seeded random weights whose blocks all matter."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        transformer = WanTransformer3DModel(**RANDOM_TRANSFORMER)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        with torch.no_grad():
            louder(transformer)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
    )
    for part in (text_encoder, transformer, vae):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_image_pipe(num_images: int = 1, heads: int = 2):
    """WanImageToVideoPipeline of the same parts: 36 channels, a small CLIP of 257 tokens, and louder image keys."""
    import torch
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    parts = build_random_pipe().components
    width = heads * RANDOM_TRANSFORMER["attention_head_dim"]
    config = RANDOM_TRANSFORMER | {"num_attention_heads": heads, "in_channels": 36, "image_dim": 16}
    config |= {"added_kv_proj_dim": width, "pos_embed_seq_len": 514 if num_images == 2 else None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=224,
                patch_size=14,
            )  # fmt: skip
        )
        transformer = WanTransformer3DModel(**config)
        with torch.no_grad():
            for attention in louder(transformer):
                attention.norm_added_k.weight.mul_(2.0)
                attention.add_v_proj.weight.mul_(3.0)
            if num_images == 2:
                transformer.condition_embedder.image_embedder.pos_embed.normal_()
    parts |= {"transformer": transformer, "image_encoder": encoder, "image_processor": CLIPImageProcessor()}
    for part in (encoder, transformer):
        part.eval().requires_grad_(False)
    pipe = WanImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


TI2V_VAE = {  # residual, in patches of 2 x 2 pixels
    "base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.1] * 48, "latents_std": [1.5] * 48,
}  # fmt: skip


def build_ti2v_pipe(image: bool = True, heads: int = 2):
    """The pipeline of Wan2.2 TI2V-5B of those parts: 48 channels, a timestep for each token, from an image or not."""
    import torch
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    parts = build_random_pipe().components
    config = RANDOM_TRANSFORMER | {"num_attention_heads": heads, "in_channels": 48, "out_channels": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        parts |= {"transformer": WanTransformer3DModel(**config), "vae": AutoencoderKLWan(**TI2V_VAE)}
        with torch.no_grad():
            louder(parts["transformer"])
            parts["transformer"].condition_embedder.time_proj.weight.mul_(4.0)  # the two timesteps differ
    for name in ("transformer", "vae"):
        parts[name].eval().requires_grad_(False)
    pipe = (WanImageToVideoPipeline if image else WanPipeline)(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_vace_pipe(heads: int = 2):
    """WanVACEPipeline of those parts: three blocks, hints after the first and the last."""
    import torch
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    parts = build_random_pipe().components
    config = RANDOM_TRANSFORMER | {"num_attention_heads": heads, "num_layers": 3, "vace_layers": [0, 2]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformer = parts["transformer"] = WanVACETransformer3DModel(**config)
        with torch.no_grad():
            louder(transformer)
            for block in transformer.vace_blocks:
                block.proj_out.weight.mul_(1.5)
    transformer.eval().requires_grad_(False)
    pipe = WanVACEPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_expert_pipe(image: bool = False, boundary_ratio: float = 0.875):
    """A pipeline of the same parts with two experts, of text-to-video or, with 36 channels, of image-to-video."""
    import diffusers
    import torch
    from diffusers import WanTransformer3DModel

    experts = []
    for seed in (2, 3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            experts.append(WanTransformer3DModel(**RANDOM_TRANSFORMER | {"in_channels": 36 if image else 16}))
            with torch.no_grad():
                louder(experts[-1])
            experts[-1].eval().requires_grad_(False)
    parts = {name: part for name, part in build_random_pipe().components.items() if "transformer" not in name}
    kind = getattr(diffusers, "WanImageToVideoPipeline" if image else "WanPipeline")
    pipe = kind(**parts, transformer=experts[0], transformer_2=experts[1], boundary_ratio=boundary_ratio)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_frames(pipe, given: dict, images: dict):
    """The clip of the pipeline as it is, [T, H, W, 3] uint8, of a request's fields and its images' paths."""
    import torch
    from PIL import Image

    renamed = {"steps": "num_inference_steps"}
    fields = {"guidance_scale": 5.0}  # what Facts say of the Wans that are made here
    fields |= {renamed.get(name, name): value for name, value in given.items() if name != "seed"}
    frames = pipe(
        negative_prompt="",
        generator=torch.Generator().manual_seed(given["seed"]),
        output_type="np",
        **fields,
        **{name: Image.open(path) for name, path in images.items()},
    ).frames[0]
    return (frames * 255).round().astype("uint8")


def louder(transformer) -> list:
    """Gates near 1, sharp attention, strong residuals: a part that is wrong shows. Returns the cross-attentions."""
    for block in (*transformer.blocks, *getattr(transformer, "vace_blocks", ())):
        block.scale_shift_table[:, [2, 5]] += 1.0
        for attention in (block.attn1, block.attn2):
            attention.norm_q.weight.mul_(2.0)
            attention.norm_k.weight.mul_(2.0)
            attention.to_v.weight.mul_(3.0)
            attention.to_out[0].weight.mul_(3.0)
    return [block.attn2 for block in transformer.blocks]


@pytest.fixture
def random_pipe():
    """A fresh random pipeline (heads 2 x 32, 2 layers); 64 x 64 x 9 in 2 steps takes well under a second."""
    return build_random_pipe()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """The random pipeline saved as a diffusers folder. Shared by the session: copy it before changing it."""
    folder = tmp_path_factory.mktemp("random_wan")
    build_random_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(random_folder, tmp_path):
    """The random pipeline's folder, a copy to break."""
    return shutil.copytree(random_folder, tmp_path / "model")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two cores are shared by everything: one thread each, and the same sums in the same order."""
    import torch

    torch.set_num_threads(1)
