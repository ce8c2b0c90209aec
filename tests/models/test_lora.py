"""A LoRA is fused before quantising; one that matches nothing, or only partly, is an error and not a shrug."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dax
from dax.errors import DaxError
from dax.models.lora import fuse_lora
from tests.quant.test_apply import bits, relative, same, velocity

LAYERS = {"blocks.0.attn1.to_q": (64, 64), "blocks.1.ffn.net.0.proj": (128, 64), "blocks.1.attn2.to_out.0": (64, 64)}


def pairs(layers=LAYERS, rank=4, prefix="transformer."):
    torch.manual_seed(7)
    made = {}
    for name, (N, K) in layers.items():
        made[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, K) * K**-0.5
        made[f"{prefix}{name}.lora_B.weight"] = torch.randn(N, rank)
    return made


ORIGINAL = pairs(
    {f"blocks.{block}.self_attn.{name}": (64, 64) for block in range(2) for name in "qkvo"}, prefix="diffusion_model."
)


@pytest.fixture
def written(tmp_path):
    def write(tensors, **metadata):
        save_file(tensors, tmp_path / "lora.safetensors", metadata={"format": "pt", **metadata})
        return tmp_path / "lora.safetensors"

    return write


def test_it_is_added_to_the_weights_and_to_no_other(random_pipe, written):
    transformer, state = random_pipe.transformer, pairs()
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    assert fuse_lora(transformer, written(state), scale=0.5) == 3
    for name, weight in transformer.state_dict().items():
        layer = name.removesuffix(".weight")
        delta = 0.0
        if layer in LAYERS and name.endswith(".weight"):
            delta = 0.5 * state[f"transformer.{layer}.lora_B.weight"] @ state[f"transformer.{layer}.lora_A.weight"]
        assert torch.allclose(weight, before[name] + delta, atol=1e-6), name


@pytest.mark.parametrize(
    ("says", "factor"),
    [
        ({}, 2),
        ({"transformer.use_rslora": True}, 4),
        ({"transformer.alpha_pattern": {"attn1.to_q": 12, "blocks.1": 5}}, 3),
    ],
)
def test_the_alpha_of_its_header_counts(random_pipe, written, says, factor):
    layer = random_pipe.transformer.blocks[0].attn1.to_q
    before, state = layer.weight.clone(), pairs()
    header = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8, **says})
    fuse_lora(random_pipe.transformer, written(state, lora_adapter_metadata=header))
    delta = (
        state["transformer.blocks.0.attn1.to_q.lora_B.weight"] @ state["transformer.blocks.0.attn1.to_q.lora_A.weight"]
    )
    assert torch.allclose(layer.weight, before + factor * delta, atol=1e-5)


def test_the_format_of_the_original_repository(random_pipe, written):
    assert fuse_lora(random_pipe.transformer, written(ORIGINAL)) == 8


def test_fused_then_quantised(random_pipe, written):
    transformer = random_pipe.transformer
    stock = velocity(transformer)
    fuse_lora(transformer, written(pairs()))
    fused = velocity(transformer)
    with dax.optimize(random_pipe, linear={"scheme": "int8"}):
        assert relative(velocity(transformer), fused) < 0.1 < relative(fused, stock)
        with pytest.raises(DaxError, match="blocks.0.attn1.to_q is quantised already: fuse first") as caught:
            fuse_lora(transformer, written(pairs()))
    assert caught.value.exit_code == 2


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (pairs({"blocks.7.attn1.to_q": (64, 64)}), "0 of 1 layers matched; this model has no 'blocks.7.attn1.to_q'"),
        (pairs(LAYERS | {"blocks.0.attn1.to_x": (64, 64)}), "3 of 4 layers matched.* did you mean 'blocks.0.attn1.to_"),
        (
            pairs({"blocks.0.attn1.to_q": (64, 48)}),
            r"to_q is \[64, 64\], the file's matrices are \[64, 4\] and \[4, 48\]",
        ),
        (
            {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 64)},
            "what cannot be fused: blocks.0.attn1.to_q",
        ),
        (
            pairs() | {"transformer.blocks.0.attn1.to_q.diff": torch.zeros(3)},
            "cannot be fused: blocks.0.attn1.to_q.diff",
        ),
        (
            ORIGINAL | {"diffusion_model.blocks.0.norm3.diff": torch.ones(64)},  # diffusers drops it without a word
            "cannot be fused: diffusion_model.blocks.0.norm3.diff",
        ),
        ({"something.weight": torch.zeros(3)}, "0 layers, and what cannot be fused: something.weight"),
        ({key: tensor * float("nan") for key, tensor in pairs().items()}, "has NaN or infinity in it"),
    ],
)
def test_a_lora_that_does_not_fit_changes_nothing(random_pipe, written, tensors, text):
    before = bits(random_pipe.transformer)
    with pytest.raises(DaxError, match=text) as caught:
        fuse_lora(random_pipe.transformer, written(tensors))
    assert caught.value.exit_code == 3 and same(before, bits(random_pipe.transformer))


@pytest.mark.fault(35)
def test_a_pickled_lora_is_never_opened(random_pipe, tmp_path):
    torch.save(pairs(), tmp_path / "lora.bin")
    with pytest.raises(DaxError, match="not a safetensors file"):
        fuse_lora(random_pipe.transformer, tmp_path / "lora.bin")


def test_generate_fuses_before_it_optimizes_and_says_so(tmp_path):
    from dax.generate.run import Job, generate

    state = pairs({"blocks.0.ffn.net.0.proj": (1024, 384)})
    save_file(state, tmp_path / "style.safetensors", metadata={"format": "pt"})
    small = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "steps": 1}
    clips = []
    for name, loras in (("with", (f"{tmp_path}/style.safetensors:0.5",)), ("without", ())):
        job = Job(small, str(tmp_path / f"{name}.npz"), sets=("linear.scheme=int8",), device="cpu", loras=loras)
        clips.append(generate(job))
    (told,) = clips[0]["loras"]
    assert (told["name"], told["scale"], told["layers"]) == ("style.safetensors", 0.5, 1)
    assert clips[1]["loras"] == [] and clips[0]["plan_hash"] == clips[1]["plan_hash"]
    frames = [(tmp_path / f"{name}.npz").read_bytes() for name in ("with", "without")]
    assert frames[0] != frames[1]


@pytest.mark.parametrize("asked", ["{}/none.safetensors", "{}/torn.safetensors:0.5", "{}/none.safetensors:much"])
def test_generate_refuses_a_lora_before_weights_load(tmp_path, monkeypatch, asked):
    from dax.generate import run

    (tmp_path / "torn.safetensors").write_bytes(b"no")
    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("weights were loaded"))
    job = run.Job({"prompt": "a"}, str(tmp_path / "c.npz"), device="cpu", loras=(asked.format(tmp_path),))
    with pytest.raises(DaxError, match="safetensors") as caught:
        run.generate(job)
    assert caught.value.exit_code == 3
