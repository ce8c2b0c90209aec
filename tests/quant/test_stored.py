"""A folder whose transformer was saved in 8 bits: clips as of its original quantised, and never taken for that."""

import json
import shutil

import numpy as np
import pytest

import dax
from dax import quant
from dax.bench.explain import explain
from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate.preflight import preflight, verify
from dax.generate.request import experts_bytes
from dax.generate.run import generate
from dax.generate.settle import Job, check_model
from dax.plan import Linear, Plan
from dax.quant.scheme import Rule, match, rules_of
from dax.quant.stored import held_to
from tests.broken import WEIGHTS, change, edit, refused

CLIP = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "steps": 2, "guidance_scale": 4.0}


def save_in_8_bits(folder, out, rules, part="transformer"):
    """What docs/linears.md tells a user to do."""
    import torch
    from diffusers import WanTransformer3DModel

    config = quant.register()(rules)
    shutil.copytree(folder, out, dirs_exist_ok=True)
    shutil.rmtree(out / part)
    transformer = WanTransformer3DModel.from_pretrained(
        folder, subfolder=part, quantization_config=config, dtype=torch.float32
    )
    transformer.save_pretrained(out / part)
    return out


@pytest.fixture
def stored(random_folder, tmp_path):
    return save_in_8_bits(random_folder, tmp_path / "stored", {"blocks": "int8"})


def clip(model, tmp_path, **job):
    record = generate(Job(CLIP, str(tmp_path / "clip.npz"), model=str(model), device="cpu", overwrite=True, **job))
    return record, np.load(tmp_path / "clip.npz")["frames"]


@pytest.mark.parametrize(
    ("plan", "same"), [("balanced", ("balanced", ())), ("exact", ("exact", ("linear.scheme=int8",)))]
)
def test_the_clip_is_the_originals_quantised(stored, random_folder, tmp_path, plan, same):
    """Whether the weights are quantised before they are saved or after they are loaded, the frames are the same."""
    record, frames = clip(stored, tmp_path, plan=plan)
    plan, sets = same
    original, expected = clip(random_folder, tmp_path, plan=plan, sets=sets)
    assert np.array_equal(frames, expected)
    assert record["plan"]["linear"]["scheme"] == "int8" == original["plan"]["linear"]["scheme"]
    assert record["stored_linear"] == {"int8": 20} and "stored_linear" not in original
    assert record["model_digest"] != original["model_digest"]
    said = "linear.scheme = none: 20 of 26 linear layers were saved in 8 bits (20 int8), which cannot be taken back"
    assert set(record["warnings"]) - set(original["warnings"]) == (
        {f"{said}; as saved instead"} if plan == "exact" else set()
    )


def test_a_plan_may_quantise_more_and_layers_it_leaves_out_are_named(random_folder, tmp_path):
    partly = save_in_8_bits(random_folder, tmp_path / "partly", {"blocks.0": "int8", "proj_out": "int8"})
    frames = clip(partly, tmp_path, plan="balanced")
    expected = clip(random_folder, tmp_path, plan="balanced", sets=("linear.rules.proj_out=int8",))
    assert np.array_equal(frames[1], expected[1])
    assert frames[0]["plan"]["linear"]["rules"] == {"proj_out": "int8"}
    assert "1 of 26 linear layers were saved in 8 bits (11 int8)" in frames[0]["warnings"][0]


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"sets": ("linear.scheme=fp8",)}, 2, "is asked as fp8, token-channel, and .* already: int8, token-channel"),
        ({"plan": "balanced", "sets": ("linear.granularity=tensor",)}, 2, "asked as int8, tensor, and"),
        ({"strict": True}, 4, "--strict: linear.scheme = none: 20 of 26"),
        ({"min_psnr": 40.0}, 2, "this plan carries no measured fidelity"),
        ({"loras": ("LORA",)}, 2, "--lora: .* saved in 8 bits: fuse it into the original weights"),
    ],
)
def test_row_68_what_8_bits_cannot_give_is_refused_before_weights_load(
    stored, tmp_path, monkeypatch, change, code, says
):
    monkeypatch.setattr("dax.generate.run.load", lambda *_: pytest.fail("weights were loaded"))
    if "loras" in change:
        change = {"loras": (str(stored / "vae" / WEIGHTS),)}
    with pytest.raises(DaxError, match=says) as caught:
        clip(stored, tmp_path, **change)
    assert caught.value.exit_code == code


@pytest.mark.fault(68)
def test_row_68_whoever_needs_the_original_weights_refuses(stored):
    assert check_model(str(stored), family=True).stored
    with pytest.raises(
        DaxError, match="saved in 8 bits: dax generate takes it, comparing, tuning and calibrating start"
    ):
        check_model(str(stored))


def test_the_folder_passes_and_counts_the_originals_parameters(stored, random_folder):
    checked = preflight(stored)
    assert checked.parameters == preflight(random_folder).parameters
    assert set(checked.stored.values()) == {Rule("int8")} and len(checked.stored) == 20
    assert len(verify(checked)) == 1  # finite; no file has a recorded digest


@pytest.mark.fault(29)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_row_29_codes_without_scales_or_of_another_type(random_folder, tmp_path, scheme):
    import torch

    folder = save_in_8_bits(random_folder, tmp_path / "stored", {"blocks": scheme})
    config, weights = folder / "transformer" / "config.json", folder / "transformer" / WEIGHTS
    verify(preflight(folder))
    whole = weights.read_bytes()
    layer = "blocks.0.ffn.net.2"
    for broken, says in (
        (lambda tensors: tensors.pop(f"{layer}.weight_scale"), f"first {layer}.weight_scale"),
        (
            lambda tensors: tensors.update({f"{layer}.weight": torch.zeros(64, 128)}),
            f"{layer}.weight has dtype F32; its",
        ),
        (
            lambda tensors: tensors.update({f"{layer}.weight_scale": torch.ones(64).bfloat16()}),
            f"{layer}.weight_scale has dtype BF16; its config says F32",
        ),
    ):
        edit(weights, broken)
        refused(folder, says)
        weights.write_bytes(whole)
    whole = config.read_text()
    for broken, says in (
        (None, "has dtype"),  # codes, and nobody says so
        ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes'; supported: 'dax'"),
        ({"quant_method": "dax", "rules": ["blocks"], "granularity": "token-channel"}, "must be a mapping"),
        (
            {"quant_method": "dax", "rules": {"blocks.7": scheme}, "granularity": "token-channel"},
            "'blocks.7' matches no",
        ),
        ({"quant_method": "dax", "rules": {"blocks": "int7"}, "granularity": "token-channel"}, "'int7' is not known"),
        ({"quant_method": "dax", "rules": {"blocks": scheme}, "granularity": 3}, "granularity = 3 must be a word"),
        ({"quant_method": "dax", "rules": {"blocks": scheme}, "bits": 8}, "unknown key 'bits'"),
        ({"quant_method": "dax", "rules": {}, "granularity": "token-channel"}, "name no layer"),
        ({"quant_method": "dax", "rules": {"blocks": scheme}}, "rotation = None, this version reads 8"),
    ):
        change(config, quantization_config=broken)
        refused(folder, says)
        config.write_text(whole)


@pytest.mark.fault(68)
def test_row_68_experts_that_are_not_quantised_alike(tmp_path):
    from tests.conftest import build_expert_pipe

    pipe = build_expert_pipe()
    pipe.save_pretrained(tmp_path / "original")
    one = save_in_8_bits(tmp_path / "original", tmp_path / "one", {"blocks": "int8"})
    refused(one, "transformer_2/config.json", "not quantised as transformer is")
    both = save_in_8_bits(one, tmp_path / "both", {"blocks": "int8"}, "transformer_2")
    frames = clip(both, tmp_path, plan="balanced")[1]
    assert np.array_equal(frames, clip(tmp_path / "original", tmp_path, plan="balanced")[1])
    quant.quantize_(pipe.transformer, {"blocks": "int8"})
    with pytest.raises(DaxError, match="two experts are not quantised alike"):
        dax.optimize(pipe)


@pytest.mark.parametrize("hardware", ["h100", None])
def test_explain_knows(stored, hardware):
    found = explain(str(stored), None, [], (64, 64, 9), None, hardware)
    assert found["plan"]["linear.scheme"] | {"from": ""} == {"value": "int8", "asked": "none", "from": ""}
    assert "linear.scheme = int8: 20 linear layers" in found["changes"]
    assert len(found["fallbacks"]) == 1 and "which cannot be taken back" in found["fallbacks"][0]
    assert not any(row["key"].startswith("linear.") for row in found["gains"])
    original = explain("tiny", None, [], (64, 64, 9), None, hardware)
    assert not original["fallbacks"]
    with pytest.raises(DaxError, match="--strict: linear.scheme = none"):
        explain(str(stored), None, [], (64, 64, 9), None, hardware, strict=True)


@pytest.mark.parametrize("asked", [Linear(), Linear(scheme="int8"), Linear(rules={"blocks.1": "int8"})])
@pytest.mark.parametrize("saved", [{"*": "int8"}, {"blocks": "int8"}, {"blocks.0.ffn": "int8"}, {"proj_out": "int8"}])
def test_the_plan_that_is_left_names_exactly_the_layers_that_have_8_bits(asked, saved):
    facts = FACTS["tiny"]
    layers = match(facts.linear_layers(), saved)
    part, notes, fallbacks = held_to(asked, facts, {name: Rule(scheme) for name, scheme in layers.items()})
    wanted = match(facts.linear_layers(), *rules_of(asked, facts))
    assert match(facts.linear_layers(), *rules_of(part, facts)) == wanted | layers
    assert bool(fallbacks) == bool(layers.keys() - wanted.keys()) != bool(notes)


def test_the_weights_as_loaded_need_half_the_memory():
    facts, plan = FACTS["wan2.1-t2v-14b"], Plan(linear=Linear(scheme="int8"))
    assert experts_bytes(facts, plan, 2) == 2 * facts.num_parameters
    assert experts_bytes(facts, plan, 2, stored=True) / 2**30 == pytest.approx(13.6, abs=0.1)


def test_leaving_a_block_never_refuses_and_gives_back_all_else(random_pipe):
    """Where original weights are gone, the rest comes back; what would save codes as weights stays refused."""
    transformer = random_pipe.transformer
    processor = transformer.blocks[0].attn1.processor
    with dax.optimize(random_pipe, linear={"scheme": "int8", "keep_original": "none"}):
        assert transformer.blocks[0].attn1.processor is not processor
    assert transformer.blocks[0].attn1.processor is processor
    assert type(transformer.blocks[0].ffn.net[2]) is quant.QuantLinear
    with pytest.raises(DaxError, match="save_pretrained"):
        transformer.save_pretrained("nowhere")
    with pytest.raises(DaxError, match="projections are fused before quantising"):
        transformer.fuse_qkv_projections()
    with dax.optimize(random_pipe) as engine:
        assert "20 of 26 linear layers were saved in 8 bits" in engine.summary()


def test_generate_keeps_no_originals_unless_told(random_folder, tmp_path):
    for sets, kept in (((), "none"), (("linear.keep_original=cpu",), "cpu"), (("linear.keep_original=none",), "none")):
        record, frames = clip(random_folder, tmp_path, plan="balanced", sets=sets)
        assert record["plan"]["linear"]["keep_original"] == kept
        assert json.dumps(record["computed"]) == '{"cond": 2, "uncond": 2}'


@pytest.mark.fault(37)
def test_diffusers_own_loading_refuses_codes_that_were_rotated_otherwise():
    from dax.quant import register

    saved = {"quant_method": "dax", "rules": {"blocks": "int8"}, "granularity": "token-channel"}
    for found, says in ((saved, "rotation = None"), (saved | {"rotation": 16}, "rotation = 16")):
        with pytest.raises(DaxError, match=f"quantization_config: {says}, this version reads 8") as caught:
            register().from_dict(found)
        assert caught.value.code == "bad_model"
    assert register().from_dict(saved | {"rotation": 8}).to_dict() == saved | {"rotation": 8}
