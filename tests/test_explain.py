"""`dax explain`: fast, without torch, and right about tokens, parameters, bytes, provenance and bounds."""

import json
import subprocess
import sys
import time

import pytest

from dax.bench import explain as module
from dax.bench.explain import explain
from dax.bench.explain_text import text
from dax.errors import DaxError
from dax.hardware import MACHINES

SCRIPT = """
import sys, typer
from dax.cli.explain import command
try:
    typer.run(command)
finally:
    heavy = {"torch", "diffusers", "transformers", "numpy"} & sys.modules.keys()
    assert not heavy, heavy
"""


def ask(model="wan2.1-t2v-14b", plan=None, sets=(), size=(None, None, None), steps=None, hardware="h200", strict=False):
    return explain(model, plan, list(sets), size, steps, hardware, strict)


@pytest.mark.parametrize(
    "extra", [[], ["--hardware", "h200"], ["--hardware", "h200", "--set", "attention.kernel=sage"]]
)
def test_under_three_seconds_and_without_torch(extra):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--model", "wan2.1-t2v-14b", "--json", *extra], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 3
    assert json.loads(done.stdout)["tokens"] == 75600


def test_counts_of_14b_at_720p():
    result = ask()
    assert result["tokens"] == 75_600
    assert result["parameters"] == pytest.approx(14.288e9, rel=1e-3)
    assert result["weights_gib"] == pytest.approx(26.67, abs=0.05)
    assert result["forward"]["tflop"] == pytest.approx(6520, rel=0.005)
    assert result["video"]["forwards"] == 100
    assert result["video"]["pflop"] == pytest.approx(652, rel=0.005)


def test_bounds_on_an_h200():
    parts = {part["name"]: part for part in ask()["parts"]}
    peak = MACHINES["h200"].peak_tflops["bf16"]
    assert parts["self-attention"]["ms_at_least"] == pytest.approx(40 * 117.05 / peak * 1e3, rel=1e-3)
    assert parts["self-attention"]["bound"] == "compute"
    assert parts["rotary embedding"]["bound"] == "memory"


def test_parts_add_up_to_the_forward():
    result = ask()
    assert sum(part["gflop"] or 0 for part in result["parts"]) / 1e3 == pytest.approx(result["forward"]["tflop"])
    total_ms = sum(part["ms_at_least"] for part in result["parts"])
    assert total_ms / 1e3 == pytest.approx(result["forward"]["seconds_at_least"])
    expected_ms = sum(part["ms_expected"] for part in result["parts"])
    assert expected_ms / 1e3 == pytest.approx(result["forward"]["seconds_expected"])
    assert all(part["ms_expected"] > part["ms_at_least"] for part in result["parts"])


def test_what_each_setting_would_buy_is_what_the_plan_with_it_is_expected_to_take():
    result = ask()
    found = {(row["key"], row["value"]): row for row in result["gains"]}
    for sets, key in (
        (["attention.kernel=int8"], ("attention.kernel", "int8")),
        (["linear.scheme=fp8"], ("linear.scheme", "fp8")),
        (["blocks.fused=false"], ("blocks.fused", False)),
        (["compile=blocks"], ("compile", "blocks")),
    ):
        there = ask(sets=sets)["video"]["seconds_expected"]
        assert found[key]["seconds_expected"] == pytest.approx(there), key
        assert found[key]["times"] == pytest.approx(result["video"]["seconds_expected"] / there)
    assert found["cache.budget", 0.4]["times"] == pytest.approx(2.5)
    assert [row["times"] for row in result["gains"]] == sorted((row["times"] for row in result["gains"]), reverse=True)
    assert ("attention.kernel", "int8") not in {(r["key"], r["value"]) for r in ask(plan="balanced")["gains"]}
    assert not any(row["value"] == "fp8" for row in ask(hardware="a100")["gains"]), "an A100 has no 8-bit floats"
    fast = {row["value"]: row for row in ask(plan="fast")["gains"]}
    assert fast["none"]["times"] < 1 and 0.4 not in fast, "36 of 100 are computed already"


def test_a_table_that_takes_weights_to_know_is_counted_as_none_and_says_so():
    result = ask(sets=["cache.policy=teacache"])
    assert result["step_cache"] is None and result["video"]["forwards"] == 100
    assert "counted as if all were computed" in text(result)
    assert "counted as if" not in text(ask()) + text(ask(plan="fast"))


def test_compiling_moves_fewer_bytes_and_the_same_flops():
    eager, compiled = ask(sets=["blocks.fused=false"]), ask(sets=["compile=blocks"])
    paper = lambda result: [{key: part[key] for key in part if key != "ms_expected"} for part in result["parts"]]
    assert paper(ask()) == paper(compiled), "fused by hand or by a compiler, the traffic on paper is the same"
    assert compiled["forward"]["tflop"] == eager["forward"]["tflop"]
    assert sum(part["gb"] for part in compiled["parts"]) < 0.6 * sum(part["gb"] for part in eager["parts"])
    assert compiled["video"]["seconds_at_least"] < eager["video"]["seconds_at_least"]


def test_what_the_plan_becomes_on_a_card_is_said():
    result = ask(sets=["attention.kernel=sage"])
    assert result["plan"]["attention.kernel"]["value"] == "sage"
    assert result["changes"][0] == "attention.kernel = sage: 40 self-attention layers"
    assert "sage" not in result["changes"][1]
    auto = ask()["plan"]["attention.kernel"]
    assert auto["asked"] == "auto" and auto["value"] in ("cudnn", "flash", "bf16")


def test_8_bit_attention_halves_its_bound():
    bound = lambda result: {part["name"]: part["ms_at_least"] for part in result["parts"]}["self-attention"]
    assert bound(ask(sets=["attention.kernel=sage"])) == pytest.approx(bound(ask()) / 2)


def test_every_value_says_which_layer_it_came_from(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("attention:\n  kernel: sdpa\n")
    plan = ask(plan=str(file), sets=["compile=blocks"], hardware=None)["plan"]
    assert plan["attention.kernel"] == {"value": "sdpa", "asked": "sdpa", "from": f"file {file}"}
    assert plan["compile"]["from"] == "--set"
    assert ask(hardware=None)["plan"]["compile"]["from"] == "preset exact"


def test_a_folder_is_explained_from_its_json_alone(tmp_path):
    from dax.facts import facts_named

    tiny = facts_named("tiny")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    config = {"_class_name": "WanTransformer3DModel", **tiny.transformer_config()}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    assert ask(str(tmp_path))["parameters"] == tiny.num_parameters


@pytest.mark.parametrize(
    "named, wrong, code",
    [
        ({"model": "wan2.1-t2v-14"}, "did you mean 'wan2.1-t2v-14b'", 2),
        ({"hardware": "h300"}, "unknown card 'h300'", 2),
        ({"plan": "exacct"}, "did you mean 'exact'", 2),
        ({"sets": ["attention.kernel=sdpaa"]}, "did you mean 'sdpa'", 2),
        ({"size": (721, None, None)}, "--height 721", 2),
        ({"steps": 0}, "--steps 0", 2),
    ],
)
def test_bad_requests_are_refused(named, wrong, code):
    with pytest.raises(DaxError) as caught:
        ask(**named)
    assert wrong in str(caught.value)
    assert caught.value.exit_code == code


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DaxError, match="model_index.json") as caught:
        ask(str(tmp_path))
    assert caught.value.exit_code == 3


def test_without_a_card_there_are_no_times(monkeypatch):
    monkeypatch.setattr(module, "gpu_name", lambda: None)
    result = ask(hardware=None)
    assert result["forward"]["seconds_at_least"] is result["ms_per_layer_expected"] is None
    assert "--hardware" in text(result)


@pytest.mark.parametrize("seen, key", [("NVIDIA H200", "h200"), ("NVIDIA H20", "h20"), ("Radeon", None)])
def test_the_card_here_is_recognised_by_name(monkeypatch, seen, key):
    monkeypatch.setattr(module, "gpu_name", lambda: seen)
    assert module.card(None) == MACHINES.get(key)


@pytest.mark.parametrize(("hardware", "kernel"), [("h100", "bf16"), ("h200", "bf16"), ("b200", "cudnn")])
def test_exact_is_counted_with_the_kernel_that_auto_means_on_the_card(hardware, kernel):
    auto, named = (ask(plan="exact", hardware=hardware, sets=sets) for sets in ([], [f"attention.kernel={kernel}"]))
    assert auto["plan"]["attention.kernel"]["value"] == kernel
    assert auto["ms_per_layer_expected"] == named["ms_per_layer_expected"]
    assert {part["name"]: part["ms_expected"] for part in auto["parts"]}["cross-attention"] == pytest.approx(
        40 * 4 * 75600 * 512 * 5120 / (MACHINES[hardware].peak_tflops["bf16"] * 1e9) / 0.569
    )


def test_the_text_names_what_matters():
    shown = text(ask(sets=["compile=blocks"]))
    for word in ("75600 tokens", "G parameters", "from --set", "40 transformer blocks", "ms at least", "compute"):
        assert word in shown, word


def test_8_bit_linears_and_fused_blocks_are_told():
    exact, balanced = ask(), ask(plan="balanced")
    assert "linear.scheme = int8: 400 linear layers" in balanced["changes"]
    assert "blocks.fused = true: 40 transformer blocks" in balanced["changes"]
    assert 0.5 < balanced["weights_gib"] / exact["weights_gib"] < 0.53
    dtypes = {part["name"]: part["dtype"] for part in balanced["parts"]}
    assert dtypes["ffn in"] == dtypes["self q, k, v"] == dtypes["self-attention"] == "int8"
    assert dtypes["cross-attention"] == dtypes["patch embedding"] == "bf16"
    assert balanced["video"]["seconds_at_least"] < 0.6 * exact["video"]["seconds_at_least"]
    with pytest.raises(DaxError, match="'blocks.99' matches no linear layer"):
        ask(sets=["linear.rules.blocks.99=int8"])


def test_two_experts_share_loop_and_memory():
    """Both in 8 bits at 720p: with text encoder (10.6 GiB in bf16) and VAE (0.5) within 45 GiB."""
    exact, small = ask("wan2.2-t2v-a14b"), ask("wan2.2-t2v-a14b", "balanced")
    one = ask("wan2.1-t2v-14b", "balanced")
    assert small["parameters"] == one["parameters"] and small["parts"] == one["parts"]
    assert small["experts"]["steps"] == [26, 14] and small["experts"]["forwards"] == [52, 28]
    assert small["experts"]["device_weights_gib"] == pytest.approx(2 * one["weights_gib"])
    assert exact["device_gib"] > 53 and small["device_gib"] + 10.6 + 0.5 < 45
    assert small["changes"][0] == "attention.kernel = int8: 80 self-attention layers"
    assert "two experts: 26 steps down to the boundary at 0.875, then 14; 52 and 28 forwards" in text(small)
    idle = ask("wan2.2-t2v-a14b", "balanced", ["offload=experts"])
    assert idle["experts"]["host_weights_gib"] == pytest.approx(2 * 13.1, abs=0.05)
    assert idle["device_gib"] == pytest.approx(one["device_gib"] + 0.49, abs=0.01)
    assert one["experts"] is None
    assert one["device_gib"] == pytest.approx(one["weights_gib"] + one["activations_gib"] + 0.78, abs=0.01)
    masked = ask("wan2.2-i2v-a14b", None, ["cache.policy=mask", f"cache.mask=1{39 * '0'}"])
    first = masked["experts"]["steps"][0]
    assert masked["step_cache"]["cond"] == "1" + (first - 1) * "0" + "1" + (39 - first) * "0"
    assert masked["experts"]["forwards"] == [2, 2] and masked["video"]["forwards"] == 4


def test_what_a_model_cannot_have_is_refused_with_a_way_out_that_it_has():
    for model, sets, says in (
        ("wan2.2-i2v-a14b", ["cache.policy=magcache"], "nothing is published or calibrated .* cache.policy = mask"),
        ("wan2.1-vace-14b", ["cache.policy=calibrated"], "nothing is published or calibrated .* cache.policy = mask"),
        ("wan2.2-ti2v-5b", ["cache.policy=calibrated"], "nothing is published or calibrated .* run `dax calibrate`"),
        ("wan2.1-t2v-14b", ["offload=experts"], "wan2.1-t2v-14b has one transformer"),
        ("wan2.2-t2v-a14b", ["offload=experts", "compile=blocks"], "cannot be combined"),
    ):
        with pytest.raises(DaxError, match=says):
            ask(model, None, sets)
    for model, known in (("wan2.1-i2v-14b-480p", False), ("wan2.1-t2v-14b", True)):
        (fallback,) = ask(model, "fast")["fallbacks"]
        assert f"the published mask of {model}" in fallback and ("run `dax calibrate`" in fallback) is known


def test_a_card_that_is_too_small_is_said():
    for model, card, fits in (
        ("wan2.1-t2v-14b", "rtx4090", False), ("wan2.2-t2v-a14b", "h200", True), ("wan2.2-t2v-a14b", "l40s", False)
    ):  # fmt: skip
        assert ("does not fit" not in text(ask(model, "exact", hardware=card))) is fits
