"""Quantised checkpoints and static scales: bit for bit through a file, and refused where they do not belong."""

import json

import pytest
import torch

import dax
from dax import quant
from dax.errors import DaxError
from dax.quant.layers import digest
from tests.conftest import build_random_pipe
from tests.quant.test_apply import relative, velocity

RULES = {"blocks": "int8", "blocks.1.ffn": "fp8"}


@pytest.fixture
def saved(random_pipe, tmp_path):
    transformer = random_pipe.transformer
    source = digest(transformer)
    quant.quantize_(transformer, RULES)
    quant.save(transformer, tmp_path / "model.safetensors", source)
    return transformer, tmp_path / "model.safetensors", source


def test_a_quantised_checkpoint_is_bit_exact(saved):
    transformer, path, source = saved
    again = build_random_pipe().transformer
    assert quant.load(again, path, source) == 20
    theirs, ours = transformer.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor.double(), ours[name].double()), name
    assert torch.equal(velocity(again), velocity(transformer))
    engine = dax.optimize(again, linear={"rules": RULES})
    assert "linear.scheme = int8: 18 of 18" in engine.summary()
    with pytest.raises(DaxError, match="quantised before it was loaded"):
        engine.undo()


def test_a_model_without_weights_gets_them_on_the_host(saved):
    transformer, path, source = saved
    empty = build_random_pipe().transformer.to("meta")
    assert quant.load(empty, path, source) == 20
    assert {parameter.device.type for parameter in empty.parameters()} == {"cpu"}
    layer, theirs = empty.blocks[0].ffn.net[2], transformer.blocks[0].ffn.net[2]
    assert torch.equal(layer.weight, theirs.weight) and torch.equal(layer.weight_scale, theirs.weight_scale)


@pytest.mark.fault(37)
def test_a_file_of_another_model_version_or_source_is_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    _, path, _ = saved
    again = build_random_pipe().transformer
    with pytest.raises(DaxError, match="made from .*, asked for 000"):
        quant.load(again, path, "000")
    quant.save(quant_of(torch.nn.Sequential(torch.nn.Linear(32, 32))), tmp_path / "other", "x")
    with pytest.raises(DaxError, match="of another model: 0 is"):
        quant.load(again, tmp_path / "other")
    save_file(load_file(path), tmp_path / "plain", metadata={"format": "pt"})
    with pytest.raises(DaxError, match="format 'pt', this version reads 'dax-quant-2'"):
        quant.load(again, tmp_path / "plain")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(DaxError, match="quantised weights .*junk"):
        quant.load(again, tmp_path / "junk")
    torn = path.read_bytes()[: path.stat().st_size // 2]
    (tmp_path / "torn").write_bytes(torn)
    with pytest.raises(DaxError, match="quantised weights .*torn"):
        quant.load(again, tmp_path / "torn")
    assert not any(type(layer) is quant.QuantLinear for layer in again.modules()), "a refusal changes nothing"
    with pytest.raises(DaxError, match="no layer of this module is quantised"):
        quant.save(again, tmp_path / "none", "x")


def quant_of(module):
    quant.quantize_(module, "int8")
    return module


def test_static_scales_are_measured_saved_and_used(random_pipe, tmp_path):
    transformer, stock = random_pipe.transformer, velocity(random_pipe.transformer)
    rules = {"blocks": "int8"}
    scales = quant.calibrate(transformer, rules, lambda: [velocity(transformer, seed) for seed in range(2)])
    assert len(scales.amax) == 20 and scales.amax["blocks.0.attn1.to_q"] == scales.amax["blocks.0.attn1.to_k"]
    assert torch.equal(velocity(transformer), stock), "observers are gone"
    scales.save(tmp_path / "scales.json")
    assert quant.Scales.load(tmp_path / "scales.json") == scales
    static = {"scheme": "int8", "granularity": "tensor-channel", "activation": "static"}
    for fused in (True, False):
        keys = {"linear": static | {"scales": str(tmp_path / "scales.json")}, "blocks.fused": fused}
        with dax.optimize(random_pipe, **keys) as engine:
            assert engine.plan.linear.scales == f"sha256:{scales.digest}"
            assert relative(velocity(transformer), stock) < 0.15
    with pytest.raises(DaxError, match="static needs linear.scales = FILE"):
        dax.optimize(random_pipe, linear=static)
    transformer.blocks[0].attn1.to_q.weight.mul_(2)
    with pytest.raises(DaxError, match="static scales are of model .*: calibrate"):
        dax.optimize(random_pipe, linear=static | {"scales": str(tmp_path / "scales.json")})


def test_a_layer_without_its_scale_is_named_before_any_weight_is_gone(random_pipe, tmp_path):
    transformer = random_pipe.transformer
    stock = velocity(transformer)
    scales = quant.calibrate(transformer, {"blocks": "int8"}, lambda: velocity(transformer))
    del scales.amax["blocks.1.ffn.net.2"]
    scales.save(tmp_path / "scales.json")
    linear = {"scheme": "int8", "granularity": "tensor-channel", "activation": "static", "keep_original": "none"}
    with pytest.raises(DaxError, match="blocks.1.ffn.net.2: static activations need its scale"):
        dax.optimize(random_pipe, linear=linear | {"scales": str(tmp_path / "scales.json")})
    assert torch.equal(velocity(transformer), stock)


def test_a_layer_that_never_ran_or_saw_nothing_finite_is_named(random_pipe):
    transformer = random_pipe.transformer
    with pytest.raises(DaxError, match="20 layers were never run, the first is blocks.0.attn1"):
        quant.calibrate(transformer, {"blocks": "int8"}, lambda: None)
    transformer.blocks[0].attn1.to_v.bias.fill_(float("inf"))
    with pytest.raises(DaxError, match="the largest input of .* is (nan|inf)"):
        quant.calibrate(transformer, {"blocks": "int8"}, lambda: velocity(transformer))


@pytest.mark.parametrize("content", ["{}", "[]", "junk", json.dumps({"model": "m", "amax": {"a": -1}, "version": 1})])
def test_a_bad_file_of_scales_is_refused(tmp_path, content):
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(DaxError, match="scales .*scales.json"):
        quant.Scales.load(tmp_path / "scales.json")


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_diffusers_loads_saves_and_loads_again_with_fp32_scales(random_folder, tmp_path, scheme):
    from diffusers import WanTransformer3DModel

    config = quant.register()({"blocks": scheme})
    first = WanTransformer3DModel.from_pretrained(
        random_folder / "transformer", quantization_config=config, dtype=torch.bfloat16
    )
    assert type(first.blocks[0].ffn.net[2]) is quant.QuantLinear and first.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not support|not supported|quantized"):
        first.to(torch.float16)
    first.save_pretrained(tmp_path / "saved")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    theirs, ours = first.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor.double(), ours[name].double()), name
    assert ours["blocks.0.ffn.net.2.weight_scale"].dtype == torch.float32
    engine = dax.optimize(again, linear={"scheme": scheme}, strict=True)
    with pytest.raises(DaxError, match="quantised before it was loaded"):
        engine.undo()
