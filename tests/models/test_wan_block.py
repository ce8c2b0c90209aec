"""The fused Wan block: equal to the vendor's, whatever its layers are, undone bit for bit, and never silently less."""

from functools import partial

import pytest
import torch
from torch import nn

import dax
from dax.errors import DaxError
from dax.models import wan_block, wan_guard
from tests.quant.test_apply import relative, velocity


@pytest.fixture
def block_calls(random_pipe):
    """(block, call): the first block and a call of it on fixed inputs, two videos with their own modulation."""
    block = random_pipe.transformer.blocks[0]
    generator = torch.Generator().manual_seed(3)
    x, text, temb = (torch.randn(2, n, 64, generator=generator) for n in (27, 7, 6))
    angle = torch.rand(1, 27, 1, 16, generator=generator).repeat_interleave(2, dim=-1) * 6

    def call():
        with torch.no_grad():
            return block(x, text, temb, (angle.cos(), angle.sin()))

    return block, call


def test_exact_in_fp32_equals_the_vendor(random_pipe, block_calls):
    block, call = block_calls
    stock = call()
    with dax.optimize(random_pipe, "exact") as engine:
        assert block.forward.func is wan_block.block_forward
        assert relative(call(), stock) < 1e-5
        assert "blocks.fused = true: 2 of 2 transformer blocks" in engine.summary()
    assert "forward" not in vars(block) and torch.equal(call(), stock)


def test_bf16_is_as_near_as_the_vendors_own_rounding(random_pipe, block_calls):
    block, call = block_calls
    exact = call()
    transformer = random_pipe.transformer
    for name, parameter in transformer.named_parameters():
        if not any(part in transformer._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()
    generator = torch.Generator().manual_seed(3)
    x, text, temb = (torch.randn(2, n, 64, generator=generator) for n in (27, 7, 6))
    angle = torch.rand(1, 27, 1, 16, generator=generator).repeat_interleave(2, dim=-1) * 6
    inputs = x.bfloat16(), text.bfloat16(), temb, (angle.cos(), angle.sin())
    with torch.no_grad():
        theirs = block(*inputs)
        with dax.optimize(random_pipe, "exact"):
            ours = block(*inputs)
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), exact) < 1.2 * relative(theirs.float(), exact)


@pytest.mark.parametrize(
    "linear",
    [
        {"scheme": "int8"},
        {"rules": {"blocks.*.ffn": "fp8"}},
        {"scheme": "int8", "rules": {"blocks.*.attn1.to_out.0": "none", "blocks.*.ffn.net.0.proj": "none"}},
    ],
)
def test_fused_and_layer_by_layer_give_the_same(random_pipe, linear):
    transformer = random_pipe.transformer
    stock = velocity(transformer)
    with dax.optimize(random_pipe, blocks={"fused": False}, linear=linear):
        layer_by_layer = velocity(transformer)
    with dax.optimize(random_pipe, linear=linear):
        fused = velocity(transformer)
    assert relative(fused, layer_by_layer) < 0.3 * relative(layer_by_layer, stock), "fusing adds no error of its own"


def test_q_k_v_share_one_storage_and_part_again(random_pipe):
    attn, names = random_pipe.transformer.blocks[1].attn1, ("to_q", "to_k", "to_v")
    parameters = [getattr(attn, name).weight for name in names]
    apart = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    for keys in ({}, {"linear": {"scheme": "int8"}}):
        with dax.optimize(random_pipe, **keys):
            weights = [getattr(attn, name).weight for name in names]
            whole = wan_block.joined(weights)
            assert whole.shape == (192, 64) and torch.equal(whole, torch.cat(weights))
            assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    now = [getattr(attn, name).weight for name in names]
    assert all(a is b for a, b in zip(parameters, now)) and len(apart) == 3
    assert len({parameter.untyped_storage().data_ptr() for parameter in now}) == 3


def test_neighbours_by_chance_are_not_joined():
    whole = torch.randn(8, 4)
    assert torch.equal(wan_block.joined([whole[:3], whole[3:]]), whole)
    assert wan_block.joined([whole[:3], whole[4:]]) is None
    assert wan_block.joined([whole[3:], whole[:3]]) is None
    assert wan_block.joined([whole[:3], torch.randn(5, 4)]) is None
    assert wan_block.joined([whole[:3], None]) is None


def test_a_model_saves_with_its_fused_storage(random_pipe, tmp_path):
    stock = {name: tensor.clone() for name, tensor in random_pipe.transformer.state_dict().items()}
    with dax.optimize(random_pipe):
        random_pipe.transformer.save_pretrained(tmp_path)
    again = type(random_pipe.transformer).from_pretrained(tmp_path).state_dict()
    assert stock.keys() == again.keys() and all(torch.equal(stock[name], again[name]) for name in stock)


class Adapter(nn.Module):
    """What a LoRA looks like from outside."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.extra = base_layer, nn.Linear(64, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.extra(x)


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_an_adapter_on_top_works_and_is_counted(random_pipe, scheme):
    transformer = random_pipe.transformer
    attn = transformer.blocks[0].attn1
    with dax.optimize(random_pipe, linear={"scheme": scheme}, blocks={"fused": False}):
        plain, attn.to_k = attn.to_k, Adapter(attn.to_k)
        extra, wanted = attn.to_k.extra, velocity(transformer)
        attn.to_k = plain
    with dax.optimize(random_pipe, linear={"scheme": scheme}) as engine:
        without = velocity(transformer)
        plain, attn.to_k = attn.to_k, Adapter(attn.to_k)
        attn.to_k.extra = extra
        assert relative(velocity(transformer), wanted) < 0.02 < relative(without, wanted)
        assert "self-attention in 1 of 2 blocks, cross-attention in 2 of 2 blocks" in engine.summary()
        attn.to_k = plain


def test_mixed_schemes_run_and_are_counted(random_pipe):
    rules = {"blocks.0.attn1.to_v": "none", "blocks.1.ffn.net.2": "fp8"}
    stock = velocity(random_pipe.transformer)
    with dax.optimize(random_pipe, linear={"scheme": "int8", "rules": rules}) as engine:
        assert relative(velocity(random_pipe.transformer), stock) < 0.2
        assert "self-attention in 1 of 2 blocks" in engine.summary()
        assert "feed-forward in 1 of 2 blocks" in engine.summary()


def test_weights_that_moved_apart_still_run(random_pipe):
    transformer = random_pipe.transformer
    with dax.optimize(random_pipe, linear={"scheme": "int8"}) as engine:
        together = velocity(transformer)
        attn = transformer.blocks[0].attn1
        attn.to_k.weight.data = attn.to_k.weight.data.clone()
        assert torch.equal(velocity(transformer), together)
        assert "self-attention in 1 of 2 blocks" in engine.summary()


def test_another_vendor_block_falls_back_by_name_or_is_refused(random_pipe, monkeypatch):
    monkeypatch.setattr(wan_guard, "block_difference", lambda control: "diffusers 9 computes Wan's block otherwise")
    with dax.optimize(random_pipe) as engine:
        assert engine.fallbacks == ("blocks.fused = true: diffusers 9 computes Wan's block otherwise; false instead",)
        assert not engine.plan.blocks.fused and "forward" not in vars(random_pipe.transformer.blocks[0])
    with pytest.raises(DaxError, match="--strict: blocks.fused = true: diffusers 9"):
        dax.optimize(random_pipe, strict=True)


def test_the_guard_sees_a_block_that_computes_otherwise(monkeypatch):
    assert wan_guard.block_difference.__wrapped__(False) is None
    stock = wan_block.gated_residual
    monkeypatch.setattr(wan_block, "gated_residual", lambda y, gate, *rest: stock(y, 1 + gate, *rest))
    assert "computes Wan's block otherwise" in wan_guard.block_difference.__wrapped__(False)


def test_hooks_that_came_first_are_refused(random_pipe):
    block = random_pipe.transformer.blocks[1]
    block.forward = block.forward
    with pytest.raises(DaxError, match="blocks.1: its forward carries a hook already"):
        dax.optimize(random_pipe)
    assert "forward" not in vars(random_pipe.transformer.blocks[0])


@pytest.mark.parametrize("name", ["norm_modulate_quantize", "gated_residual", "residual_norm_modulate", "attend_text"])
def test_planted_faults_are_heard(random_pipe, monkeypatch, name):
    """A forgotten scale, gate or attention moves the result far more than 8 bits do."""
    transformer, stock = random_pipe.transformer, velocity(random_pipe.transformer)
    original = getattr(wan_block, name)
    faults = {
        "norm_modulate_quantize": lambda *args: (lambda codes, scale: (codes, scale.mean() + 0 * scale))(
            *original(*args)
        ),
        "gated_residual": lambda y, gate, residual, split: residual + y,
        "residual_norm_modulate": lambda y, gate, *rest: original(y, None, *rest),
        "attend_text": lambda attn, q, *rest: torch.zeros_like(q),
    }
    keys = {"linear": {"scheme": "int8"}} if name == "norm_modulate_quantize" else {}
    with dax.optimize(random_pipe, **keys):
        usual = relative(velocity(transformer), stock)
        monkeypatch.setattr(wan_block, name, faults[name])
        assert relative(velocity(transformer), stock) > 2 * usual + 0.02


def test_pefts_own_adapter_on_8_bits(random_pipe):
    peft = pytest.importorskip("peft")
    transformer = random_pipe.transformer
    with dax.optimize(random_pipe, linear={"scheme": "int8"}) as engine:
        without = velocity(transformer)
        transformer.add_adapter(peft.LoraConfig(r=16, target_modules=["to_q"], init_lora_weights=False))
        assert relative(velocity(transformer), without) > 0.02
        assert "self-attention in 0 of 2 blocks, cross-attention in 0 of 2" in engine.summary()
        transformer.disable_adapters()
        assert torch.equal(velocity(transformer), without)


@pytest.mark.parametrize("gates", [None, (1, 1), (2, 2)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_residual_and_norm_in_one_pass_give_the_bits_of_two(device, gates):
    """The norm reads the sum as bf16 has it, so that the block computes what it did with a kernel for each."""
    generator = torch.Generator().manual_seed(0)
    y, residual = (torch.randn(2, 33, 1536, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    gate = None if gates is None else torch.randn(*gates, 1536, generator=generator).to(device)
    weight, bias = (torch.randn(2, 2, 1536, generator=generator).to(device) for _ in range(2))
    x, h = wan_block.residual_norm_modulate(y, gate, residual, weight, bias, 1e-6, 5)
    alone = residual + y if gate is None else wan_block.gated_residual(y, gate, residual, 5)
    assert torch.equal(x, alone)
    assert torch.equal(h, wan_block.norm_modulate(alone, weight, bias, 1e-6, 5))


def feed_forward(device, dtype=torch.bfloat16, approximate="tanh", bias=True):
    """The vendor's first half of a feed-forward."""
    from diffusers.models.activations import GELU

    with torch.device(device):
        return GELU(256, 512, approximate=approximate, bias=bias).to(dtype).requires_grad_(False)


def as_built(layer):
    return layer


def hooked(layer):
    layer.proj.register_forward_pre_hook(lambda *_: None)
    return layer


def offloaded(layer):
    layer.proj.forward = layer.proj.forward  # as accelerate's hooks replace it
    return layer


def subclassed(layer):
    layer.proj.__class__ = type("Adapted", (nn.Linear,), {})
    return layer


@pytest.mark.parametrize(
    ("device", "change", "options", "in_product"),
    [
        ("cuda", as_built, {}, True),
        ("cuda", as_built, {"dtype": torch.float16}, True),
        ("cuda", as_built, {"dtype": torch.float32}, False),
        ("cpu", as_built, {}, False),
        ("cuda", as_built, {"approximate": "none"}, False),
        ("cuda", as_built, {"bias": False}, False),
        ("cuda", hooked, {}, False),
        ("cuda", offloaded, {}, False),
        ("cuda", subclassed, {}, False),
    ],
)
def test_gelu_goes_into_the_product_where_it_is_the_same_function(device, change, options, in_product):
    """Told by the operators that are called, on a GPU that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    layer = change(feed_forward("meta", **options))
    with FakeTensorMode():
        for name, parameter in dict(layer.proj.named_parameters()).items():
            there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(layer.proj, name, nn.Parameter(there, requires_grad=False))
        h = torch.empty(2, 33, 256, dtype=layer.proj.weight.dtype, device=device)
        with Recorder():
            y = wan_block.gelu(layer, h, nn.Linear(512, 256), h.dtype)
    assert y.shape == (2, 33, 512) and y.dtype == h.dtype
    assert ("_addmm_activation" in called, "gelu" in called) == (in_product, not in_product)
    assert not {"clone", "copy_", "_to_copy"} & set(called), "the input is viewed, not copied"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gelu_in_the_product_is_as_near_as_after_it(dtype, compiled):
    layer = feed_forward("cuda", dtype)
    x = torch.randn(2, 333, 256, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(0)) * 3
    exact = torch.nn.functional.gelu(layer.proj.double()(x.double()), approximate="tanh")
    layer.proj.to(dtype)
    half = partial(wan_block.gelu, layer, following=None, dtype=dtype)
    with torch.no_grad():
        one, two = torch.compile(half, fullgraph=True)(x) if compiled else half(x), layer(x)
    assert one.dtype == dtype and one.shape == two.shape
    assert relative(one.double(), exact) <= 1.1 * relative(two.double(), exact) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("plan", "fused"), [("exact", True), ("balanced", True), ("balanced", False)])
@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-vace-1.3b", "wan2.2-ti2v-5b"])
def test_a_first_forward_compiles_nothing(monkeypatch, plan, fused, name):
    """What `optimize` compiled on a few tokens is what runs, at an odd number of them and for two videos too."""
    from triton import knobs

    from dax.facts import FACTS
    from dax.models.wan import build_random

    facts = FACTS[name]
    transformer = build_random(facts, "cuda", num_layers=1)
    with dax.optimize(transformer, plan, blocks={"fused": fused}):
        compiled = []
        monkeypatch.setattr(knobs.compilation, "listener", lambda *, src, **_: compiled.append(src.name))
        for videos, frames in ((1, 3), (2, 1)):
            gaussian = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
            latents, text = gaussian(videos, facts.in_channels, frames, 10, 14), gaussian(videos, 512, facts.text_dim)
            times, control = torch.full((videos,), 500.0, device="cuda"), {}
            if facts.token_time:
                times = times[:, None].repeat(1, 35 * frames)
                times[:, :35] = 0
            if facts.control_layers:
                control["control_hidden_states"] = gaussian(videos, 96, frames, 10, 14)
            with torch.no_grad():
                out = transformer(latents, times, text, **control).sample
            assert out.isfinite().all()
    assert compiled == []
