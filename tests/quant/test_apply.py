"""Rules, whole models and optimize(): every layer asked for, or none; undone bit for bit."""

import dataclasses
from copy import deepcopy

import pytest
import torch
from torch import nn

import dax
from dax.errors import DaxError
from dax.facts import FACTS
from dax.hardware import MACHINES
from dax.plan import Plan
from dax.quant import QuantLinear, quantize_
from dax.quant.scheme import covers, match, reason
from dax.resolve import resolve

NAMES = FACTS["tiny"].linear_layers()


def velocity(transformer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(1, 16, 3, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        dtype = transformer.dtype
        return transformer(latents.to(dtype), torch.tensor([500.0]), text.to(dtype), return_dict=False)[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def bits(module):
    return {name: (id(p), p.dtype, p.detach().clone()) for name, p in module.named_parameters()}


def same(before, after):
    return before.keys() == after.keys() and all(
        before[k][:2] == after[k][:2] and torch.equal(before[k][2], after[k][2]) for k in before
    )


def test_the_longest_rule_wins_and_children_inherit():
    rules = {"*": "int8", "blocks.1": "none", "blocks.1.ffn": "fp8", "condition_embedder": "none"}
    found = match(NAMES, rules)
    assert found["blocks.0.attn1.to_q"] == "int8" and found["blocks.1.ffn.net.2"] == "fp8" and "proj_out" in found
    assert not any(name.startswith(("condition_embedder", "blocks.1.attn")) for name in found)
    assert covers("blocks.*.attn1", "blocks.3.attn1.to_out.0") and not covers("blocks.1", "blocks.10.attn1.to_q")


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"blocks.9": "int8"}, "'blocks.9' matches no linear layer"),
        ({"*": "int8", "block.0": "none"}, "did you mean 'blocks.0'"),
        ({"*": "int7"}, "'int7' is not known"),
        ({"*": "none"}, "leave none of"),
        ({}, "leave none of"),
        ({"*": "fp8"}, "add the rule condition_embedder.time_embedder.linear_1: none"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(random_pipe, rules, text):
    before = bits(random_pipe.transformer)
    with pytest.raises(DaxError, match=text) as caught:
        quantize_(random_pipe.transformer, rules)
    assert caught.value.exit_code == 2 and same(before, bits(random_pipe.transformer))


def test_any_module_in_one_call():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).requires_grad_(False)
    x, wanted = torch.randn(5, 32), None
    wanted = model(x)
    assert quantize_(model, "int8") == 2 and all(type(model[i]) is QuantLinear for i in (0, 2))
    assert relative(model(x), wanted) < 0.03


def test_a_linear_layer_alone_has_no_place_to_be_replaced_in():
    with pytest.raises(DaxError, match="itself a linear layer: use QuantLinear.from_float"):
        quantize_(nn.Linear(64, 64), "int8")


@pytest.mark.parametrize("how", ["plan", "quantize_"])
def test_codes_are_not_saved_as_if_they_were_weights(random_pipe, tmp_path, how):
    transformer = random_pipe.transformer
    engine = dax.optimize(random_pipe, linear={"scheme": "int8"}) if how == "plan" else None
    if engine is None:
        quantize_(transformer, {"blocks": "int8"})
    for saver in (random_pipe, transformer):
        with pytest.raises(DaxError, match="save_pretrained: the linear layers have 8 bits"):
            saver.save_pretrained(tmp_path)
    if engine is not None:
        engine.undo()
        transformer.save_pretrained(tmp_path)
        again = type(transformer).from_pretrained(tmp_path)
        assert torch.equal(velocity(again), velocity(transformer))


class Adapter(nn.Module):
    """A layer on top of another, as peft puts it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return 2 * self.base_layer(x)


def test_undo_leaves_an_adapter_that_was_loaded_meanwhile(random_pipe):
    block = random_pipe.transformer.blocks[0]
    old = block.attn1.to_q
    with dax.optimize(random_pipe, linear={"scheme": "int8"}):
        adapter = block.attn1.to_q = Adapter(block.attn1.to_q)
    assert block.attn1.to_q is adapter and adapter.base_layer is old


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_before_anything_changes(random_pipe, value):
    transformer = random_pipe.transformer
    transformer.blocks[1].ffn.net[2].weight[3, 4] = value
    before = bits(transformer)
    with pytest.raises(DaxError, match="blocks.1.ffn.net.2: the weight has NaN or infinity") as caught:
        dax.optimize(transformer, linear={"scheme": "int8", "keep_original": "none"})
    assert caught.value.exit_code == 3
    assert before.keys() == bits(transformer).keys() and transformer.blocks[0].attn1.to_q.weight.dtype == torch.float32


def test_a_layer_of_an_odd_size_is_named_with_the_way_out(random_pipe):
    block = random_pipe.transformer.blocks[0]
    block.ffn.net[0].proj, block.ffn.net[2] = nn.Linear(64, 120), nn.Linear(120, 64)
    with pytest.raises(
        DaxError, match="blocks.0.ffn.net.0.proj: 64 -> 120 .* add the rule blocks.0.ffn.net.0.proj: none"
    ):
        dax.optimize(random_pipe, linear={"scheme": "int8"})
    kept = {"blocks.0.ffn.net.0.proj": "none", "blocks.0.ffn.net.2": "none"}
    with dax.optimize(random_pipe, linear={"scheme": "int8", "rules": kept}) as engine:
        assert "linear.scheme = int8: 18 of 18 linear layers" in engine.summary()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8_weight_only"])
def test_a_plan_quantises_every_layer_of_the_blocks_and_comes_back(random_pipe, scheme, fused):
    transformer, stock = random_pipe.transformer, velocity(random_pipe.transformer)
    before = bits(transformer)
    with dax.optimize(random_pipe, linear={"scheme": scheme}, blocks={"fused": fused}) as engine:
        assert f"linear.scheme = {scheme}: 20 of 20 linear layers" in engine.summary()
        plain = [name for name, layer in transformer.named_modules() if type(layer) is nn.Linear]
        assert all(name.startswith(("condition_embedder", "proj_out")) for name in plain) and len(plain) == 6
        assert 1e-4 < relative(velocity(transformer), stock) < (0.25 if scheme == "fp8" else 0.1)
    assert same(before, bits(transformer)) and torch.equal(velocity(transformer), stock)


@pytest.mark.parametrize("plan", ["exact", "balanced"])
def test_a_model_cast_meanwhile_comes_back_cast(random_pipe, plan):
    """What `.to(dtype)` would have made of it without DAX, kept weights in host memory included."""
    transformer = random_pipe.transformer
    same_objects = {name: id(p) for name, p in transformer.named_parameters()}
    alone = deepcopy(transformer).to(torch.bfloat16)
    with dax.optimize(random_pipe, plan):
        transformer.to(torch.bfloat16)
        assert relative(velocity(transformer), velocity(alone)) < 0.2
    found = bits(transformer)
    assert {name: found[name][0] for name in found} == same_objects
    assert all(found[k][1] == torch.bfloat16 and torch.equal(found[k][2], p) for k, p in alone.named_parameters())


def test_weights_that_were_not_kept_cannot_come_back(random_pipe):
    engine = dax.optimize(random_pipe, linear={"scheme": "int8", "keep_original": "none"})
    now = velocity(random_pipe.transformer)
    with pytest.raises(DaxError, match="keep_original = none: the original weights were not kept"):
        engine.undo()
    assert engine.active and torch.equal(velocity(random_pipe.transformer), now)


def test_fusing_after_quantising_is_refused(random_pipe):
    with dax.optimize(random_pipe, linear={"scheme": "int8"}):
        with pytest.raises(DaxError, match="blocks.0.attn1: projections are fused before quantising"):
            random_pipe.transformer.fuse_qkv_projections()
    random_pipe.transformer.fuse_qkv_projections()
    stock = velocity(random_pipe.transformer)
    with dax.optimize(random_pipe, linear={"scheme": "int8"}):
        assert relative(velocity(random_pipe.transformer), stock) < 0.1


def test_a_card_too_old_for_a_scheme_is_named():
    plan = Plan.from_layers([("test", {"linear.rules": {"blocks.0": "fp8"}})])[0]
    with pytest.raises(
        DaxError, match="linear.scheme = fp8: needs compute capability 8.9 or newer, NVIDIA A100"
    ) as caught:
        resolve(plan, FACTS["tiny"], MACHINES["a100"])
    assert caught.value.exit_code == 4 and reason("int8", MACHINES["a100"]) is None
    without = dataclasses.replace(MACHINES["h200"], packages={})
    with pytest.raises(DaxError, match="package triton is not installed"):
        resolve(plan, FACTS["tiny"], without)


def test_an_adapter_comes_after_or_is_fused_before(random_pipe):
    peft = pytest.importorskip("peft")
    transformer = random_pipe.transformer
    transformer.add_adapter(peft.LoraConfig(r=16, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(DaxError, match="carries an adapter: call fuse_lora"):
        dax.optimize(random_pipe, linear={"scheme": "int8"})
