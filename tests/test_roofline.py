"""FLOPs and bytes against figures counted by hand and by others."""

from dataclasses import dataclass, field, replace

import pytest

from dax.bench import roofline
from dax.facts import CLIP_TOKENS, controlled, facts_named

WAN14B = facts_named("wan2.1-t2v-14b")
TOKENS = 75_600
ONE_IMAGE = {"in_channels": 36, "image_tokens": 257, "image_dim": 80}


@dataclass(frozen=True)
class Card:
    """1 TFLOP/s and 1 TB/s, so that seconds are TFLOP and TB."""

    peak_tflops: dict = field(default_factory=lambda: {"bf16": 1.0, "int8": 2.0, "fp8": 2.0})
    bandwidth_tbs: float = 1.0


def named(operations):
    return {op.name: op for op in operations}


def test_tokens_of_720p():
    assert WAN14B.tokens(720, 1280, 81) == TOKENS


def test_one_block_of_14b_at_720p_has_the_published_flops():
    operations = roofline.block_operations(WAN14B, TOKENS)
    by_name = named(operations)
    assert by_name["self-attention"].flops / 1e12 == pytest.approx(117.05, abs=0.005)
    assert by_name["cross-attention"].flops / 1e12 == pytest.approx(0.793, abs=0.001)
    linears = roofline.total(operations, "gemm")[0] / 1e12
    assert linears == pytest.approx(45.2, abs=0.1)
    assert roofline.total(operations)[0] / 1e12 == pytest.approx(163, abs=0.2)


def test_linears_counted_by_hand():
    C, F, S, T = 5120, 13824, TOKENS, 512
    by_hand = 2 * S * C * C * 6 + 2 * S * C * F * 2 + 2 * T * C * C * 2
    assert roofline.total(roofline.block_operations(WAN14B, S), "gemm")[0] == by_hand


def test_elementwise_traffic_of_a_block():
    """130.4 U stock and 18 U fused, in 8 bits 20.6 U, U = 774 MB: counted op by op at full size."""
    _, eager, fused = roofline.total(roofline.block_operations(WAN14B, TOKENS), "elementwise")
    U = 2 * TOKENS * 5120
    assert U == pytest.approx(774e6, rel=1e-3)
    assert eager / U == pytest.approx(130.4, abs=0.1)
    assert fused / U == pytest.approx(18)
    *_, eight_bits = roofline.total(roofline.block_operations(WAN14B, TOKENS, "int8"), "elementwise")
    assert eight_bits / U == pytest.approx(20.55)
    assert eager == pytest.approx(101e9, rel=0.01)


def test_a_forward_has_the_published_flops():
    flops = roofline.total(roofline.forward_operations(WAN14B, 720, 1280, 81))[0]
    assert flops == pytest.approx(6.52e15, rel=0.005)
    flops_480p = roofline.total(roofline.forward_operations(WAN14B, 480, 832, 81))[0]
    assert flops_480p == pytest.approx(1.68e15, rel=0.01)


def test_a_layer_costs_the_difference_between_two_depths():
    two, three = (roofline.total(roofline.forward_operations(WAN14B, 720, 1280, 81, num_layers=n))[0] for n in (2, 3))
    assert three - two == roofline.total(roofline.block_operations(WAN14B, TOKENS))[0]


@pytest.mark.parametrize(
    "more",
    [{}, ONE_IMAGE, ONE_IMAGE | {"image_tokens": 514, "image_positions": True}, controlled([0, 2])],
    ids=["text", "an image", "two images", "control"],
)
def test_flops_agree_with_torch_counting_the_real_module(more):
    """The tiny model's forward on the meta device, counted by torch's own flop counter."""
    torch = pytest.importorskip("torch")
    import diffusers
    from torch.utils.flop_counter import FlopCounterMode

    tiny = replace(facts_named("tiny"), **more)
    with torch.device("meta"):
        model = getattr(diffusers, tiny.transformer_class)(**tiny.transformer_config())
        latents = torch.empty(1, *tiny.latent_shape(64, 96, 9))
        text = torch.empty(1, tiny.text_tokens, tiny.text_dim)
        timestep = torch.empty(1)
        image = torch.empty(tiny.num_images, CLIP_TOKENS, tiny.image_dim) if tiny.num_images else None
        control = {"control_hidden_states": torch.empty(1, 96, *latents.shape[2:])} if tiny.control_layers else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, timestep, text, image, **control, return_dict=False)
    assert roofline.total(roofline.forward_operations(tiny, 64, 96, 9))[0] == counter.get_total_flops()


def test_time_is_the_larger_of_arithmetic_and_traffic():
    card = Card()
    compute = roofline.gemm("g", 10_000, 10_000, 10_000)
    assert compute.seconds(card) == (pytest.approx(2.0), "compute")
    memory = roofline.gemm("g", 1, 10_000, 10_000)
    assert memory.seconds(card)[1] == "memory"
    assert memory.seconds(card)[0] == pytest.approx(2 * (10_000 + 1e8 + 10_000) / 1e12)


def test_eight_bits_halve_attention_time():
    card = Card()
    bf16, int8 = (roofline.attention("a", TOKENS, TOKENS, 5120, dtype).seconds(card)[0] for dtype in ("bf16", "int8"))
    assert bf16 == pytest.approx(117.05, abs=0.01)
    assert int8 == pytest.approx(bf16 / 2)


def test_fusing_saves_elementwise_time_only():
    operations = roofline.block_operations(WAN14B, TOKENS)
    saved = roofline.seconds(operations, Card()) - roofline.seconds(operations, Card(), fused=True)
    _, eager, fused = roofline.total(operations, "elementwise")
    assert saved == pytest.approx((eager - fused) / 1e12)


def test_an_image_adds_its_attention_and_nothing_else():
    """Wan2.1 I2V at 720p: 4 x 75600 x 257 x 5120 FLOPs of attention and two products of 257 rows, in each block."""
    image, plain = (
        roofline.block_operations(facts_named(f"wan2.1-{kind}"), TOKENS) for kind in ("i2v-14b-720p", "t2v-14b")
    )
    added = named(image).keys() - named(plain).keys()
    assert added == {"cross k, v of the image", "image attention", "add image attention"}
    assert roofline.total(image)[0] - roofline.total(plain)[0] == 4 * TOKENS * 257 * 5120 + 2 * 2 * 257 * 5120**2


def test_a_timestep_for_each_token_is_traffic_that_fusing_saves():
    """Wan2.2 TI2V-5B at its size: 27 280 tokens of 6 x 3072 fp32 numbers are 2 GB."""
    facts = facts_named("wan2.2-ti2v-5b")
    tokens = facts.tokens(704, 1280, 121)
    found = roofline.block_operations(facts, tokens)
    (extra,) = [op for op in found if op.name == "modulation of every token"]
    assert extra.bytes / 62 * 12 == pytest.approx(2.0e9, rel=0.01) and extra.fused_bytes == 0
    assert len(found) == 1 + len(roofline.block_operations(replace(facts, token_time=False), tokens))
    assert roofline.activation_bytes(facts, tokens) == pytest.approx(5.2e9, rel=0.02)


@pytest.mark.parametrize("name", ["wan2.1-flf2v-14b-720p", "wan2.1-vace-1.3b", "wan2.2-ti2v-5b"])
def test_weights_are_the_vendors(name):
    """In bytes, as loaded: bf16 but for the parts that the vendor keeps in fp32."""
    torch = pytest.importorskip("torch")
    import diffusers

    facts = facts_named(name)
    with torch.device("meta"):
        model = getattr(diffusers, facts.transformer_class)(**facts.transformer_config())
    kept = set(model._keep_in_fp32_modules)
    counted = sum(p.numel() * (4 if kept & set(name.split(".")) else 2) for name, p in model.named_parameters())
    assert roofline.weight_bytes(facts) == counted
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n}
    saved = sum(m.weight.numel() - 4 * m.out_features for m in layers.values())
    assert roofline.weight_bytes(facts, eight_bits=True) == counted - saved


def test_weights_of_14b():
    """14.29 G parameters in bf16, time embedder, norm2 and modulation in fp32."""
    assert roofline.weight_bytes(WAN14B) == pytest.approx(2 * WAN14B.num_parameters, rel=0.005)
    assert roofline.weight_bytes(WAN14B) > 2 * WAN14B.num_parameters
