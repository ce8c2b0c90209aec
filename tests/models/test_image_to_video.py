"""Wan2.1 image-to-video and first-last-frame: the stock pipeline's clip, whatever the plan is meant to leave exact."""

import pytest
import torch
from PIL import Image

import dax
from dax.cache import magcache, teacache
from dax.errors import DaxError
from dax.facts import FACTS
from dax.models import wan, wan_guard
from tests.conftest import build_image_pipe, build_random_pipe
from tests.quant.test_apply import relative

LAYERS = 2


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (60, 100, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def latents(pipe, guidance_scale=4.0, height=80, width=48, num_frames=9, steps=2, **options):
    """45 tokens: odd. A second picture where the model takes two."""
    image = {}
    if type(pipe).__name__ == "WanImageToVideoPipeline":
        image["image"] = picture(0)
        if pipe.transformer.config.pos_embed_seq_len:
            image["last_image"] = picture(1)
    return pipe(
        prompt="a cat",
        negative_prompt="b",
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **image,
        **options,
    ).frames


@pytest.fixture(params=[1, 2], ids=["first frame", "first and last"])
def image_pipe(request):
    return build_image_pipe(request.param)


def test_every_block_and_both_images_matter():
    """Else nothing below could fail."""
    pipe = build_image_pipe(2)
    stock, blocks = latents(pipe), pipe.transformer.blocks
    for i in range(LAYERS):
        pipe.transformer.blocks = torch.nn.ModuleList(b for j, b in enumerate(blocks) if j != i)
        assert relative(latents(pipe), stock) > 0.2
    pipe.transformer.blocks = blocks
    encode = pipe.encode_image
    for i in range(2):
        pipe.encode_image = lambda images, device, i=i: encode([images[i]] * 2, device)
        assert relative(latents(pipe), stock) > 1e-3


@pytest.mark.parametrize(
    "size",
    [{}, {"guidance_scale": 1.0}, {"num_frames": 1}, {"height": 16, "width": 112, "num_frames": 5}],
    ids=["guided", "not guided", "one frame", "wide"],
)
def test_exact_is_the_stock_clip_and_undo_gives_the_model_back(image_pipe, size):
    if size == {"num_frames": 1} and image_pipe.transformer.config.pos_embed_seq_len:
        pytest.skip("a first and a last frame are two")
    stock = latents(image_pipe, **size)
    for keys in ({}, {"blocks": {"fused": False}}):
        with dax.optimize(image_pipe, "exact", **keys) as engine:
            assert relative(latents(image_pipe, **size), stock) < 1e-5
            assert f"{LAYERS} of {LAYERS} cross-attention layers" in engine.summary()
            assert engine.facts.family == "wan-i2v" and engine.fallbacks == ()
    assert torch.equal(latents(image_pipe, **size), stock)


def test_several_videos_at_once():
    """Rows of the embeddings are then strided where the text is parted from the image."""
    model = build_image_pipe().transformer
    generator = torch.Generator().manual_seed(5)
    gaussian = lambda *shape: torch.randn(*shape, generator=generator)
    given = gaussian(2, 36, 3, 6, 10), torch.tensor([500.0, 20.0]), gaussian(2, 512, 32), gaussian(2, 257, 16)
    with torch.no_grad():
        stock = model(*given, return_dict=False)[0]
        for linear, off in (("none", 1e-5), ("int8", 0.1)):
            with dax.optimize(model, linear={"scheme": linear}):
                assert relative(model(*given, return_dict=False)[0], stock) < off


def test_a_block_compiles_as_one_graph(image_pipe):
    """Traced, not compiled: no compiler is asked."""
    block, width = image_pipe.transformer.blocks[0], 64
    generator = torch.Generator().manual_seed(5)
    gaussian = lambda *shape: torch.randn(*shape, generator=generator)
    given = gaussian(1, 15, width), gaussian(1, 512 + 257, width), gaussian(1, 6, width)
    rotary = (torch.ones(1, 15, 1, 32), torch.zeros(1, 15, 1, 32))
    with torch.no_grad(), dax.optimize(image_pipe, blocks={"fused": False}):
        eager = block(*given, rotary)
        traced = torch.compile(block, backend="eager", fullgraph=True)(*given, rotary)
    assert relative(traced, eager) < 1e-5


def test_the_two_sizes_are_told_apart_by_the_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = build_image_pipe()
    with torch.device("meta"):
        pipe.transformer = type(pipe.transformer)(**FACTS["wan2.1-i2v-14b-480p"].transformer_config())
    assert wan.target_of(pipe).facts == FACTS["wan2.1-i2v-14b-480p"]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert wan.target_of(pipe).facts == FACTS["wan2.1-i2v-14b-720p"]


def test_fused_projections_are_used(image_pipe):
    stock = latents(image_pipe)
    for block in image_pipe.transformer.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
        for name in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
            getattr(block.attn2, name).weight.fill_(torch.nan)
    with dax.optimize(image_pipe, "exact"):
        assert relative(latents(image_pipe), stock) < 1e-5


def test_8_bits_err_no_more_than_without_an_image():
    errors = []
    for pipe in (build_random_pipe(), build_image_pipe(1), build_image_pipe(2)):
        stock = latents(pipe)
        with dax.optimize(pipe, attention={"kernel": "sdpa"}, linear={"scheme": "int8"}) as engine:
            errors.append(relative(latents(pipe), stock))
            layers = [f"blocks.{i}.attn2.add_{x}_proj" for i in range(LAYERS) for x in "kv"]
            if engine.facts.image_tokens:
                assert {type(pipe.transformer.get_submodule(name)).__name__ for name in layers} == {"QuantLinear"}
                assert type(pipe.transformer.condition_embedder.image_embedder.ff.net[2]) is torch.nn.Linear
        assert torch.equal(latents(pipe), stock)
    plain, *image = errors
    assert 1e-4 < plain and max(image) < 1.5 * plain, errors


def test_keys_of_the_image_are_computed_once_a_prompt(monkeypatch):
    pipe, calls = build_image_pipe(), []
    wan_guard.check_processor()
    right = wan.text_operands
    monkeypatch.setattr(wan, "text_operands", lambda attn, text: calls.append(attn) or right(attn, text))
    with dax.optimize(pipe, blocks={"fused": False}):
        remembered = latents(pipe, steps=3)
        assert len(calls) == 2 * LAYERS
        pipe.transformer._forward_pre_hooks.clear()
        assert torch.equal(latents(pipe, steps=3), remembered) and len(calls) == 8 * LAYERS


def test_another_image_is_seen():
    """Under the same text, given as a keyword or not, and changed in place."""
    model = build_image_pipe().transformer
    generator = torch.Generator().manual_seed(5)
    gaussian = lambda *shape: torch.randn(*shape, generator=generator)
    video, text, first, other = (
        gaussian(1, 36, 3, 6, 10),
        gaussian(1, 512, 32),
        gaussian(1, 257, 16),
        gaussian(1, 257, 16),
    )

    def run(image):
        return model(video, torch.tensor([500.0]), text, encoder_hidden_states_image=image, return_dict=False)[0]

    with torch.no_grad():
        stock = [run(image) for image in (first, other)]
        with dax.optimize(model, "exact"):
            memory = model.blocks[0].attn2.processor.text
            for image, wanted in zip((first, other, first), (*stock, stock[0])):
                assert relative(run(image), wanted) < 1e-5
            assert relative(model(video, torch.tensor([500.0]), text, other, return_dict=False)[0], stock[1]) < 1e-5
            first.copy_(other)
            assert relative(run(first), stock[1]) < 1e-5
            assert len(memory.known) == 2
            del first, image
            assert len(memory.known) == 1  # the text lives on, the image does not


@pytest.mark.parametrize("fault", ["no image", "image twice", "keys not normed", "split off by one"])
def test_the_guards_hear_planted_faults(monkeypatch, fault):
    """Those that run before a model is touched."""
    right, pair = wan.text_operands, wan.key_value
    assert wan_guard.block_difference.__wrapped__(False) is None
    if fault == "split off by one":
        monkeypatch.setattr(wan, "TEXT_TOKENS", 511)
    elif fault == "keys not normed":
        monkeypatch.setattr(wan, "key_value", lambda attn, *x: pair(attn, *x[:-1], attn.norm_k))
    else:
        kept = {"no image": lambda text, *image: (text,), "image twice": lambda *pairs: pairs[-1:] * len(pairs)}[fault]
        monkeypatch.setattr(wan, "text_operands", lambda *x: kept(*right(*x)))
    with pytest.raises(DaxError, match="computes Wan's image-attention otherwise"):
        wan_guard.check_processor.__wrapped__()
    assert "computes Wan's block otherwise" in wan_guard.block_difference.__wrapped__(False)


def test_published_constants_go_by_the_names_of_the_facts():
    assert magcache.PUBLISHED.keys() == teacache.PUBLISHED.keys() <= FACTS.keys()
    for name, polynomials in teacache.PUBLISHED.items():
        if "i2v" in name:
            setting, defaults = polynomials[True].setting, FACTS[name].defaults
            assert (setting.steps, setting.flow_shift) == (defaults.steps, defaults.flow_shift)


@pytest.mark.parametrize("reuse", ["velocity", "residual"])
def test_a_step_cache_serves_it(image_pipe, reuse):
    stock = latents(image_pipe, steps=4)
    with dax.optimize(image_pipe, cache={"policy": "mask", "mask": "1011", "reuse": reuse}) as engine:
        assert 1e-3 < relative(latents(image_pipe, steps=4), stock) < 1
        assert engine.gate.last.computed == {"cond": 3, "uncond": 3}
