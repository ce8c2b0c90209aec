"""`dax bench block` and `forward` on the tiny shapes: rivals checked, timed, recorded; wrong answers never timed."""

import json
import time
from dataclasses import replace

import pytest
import typer

from dax.bench import contest, linear, report, rivals, start, step
from dax.bench.block import calls_of
from dax.bench.breakdown import kind_of
from dax.bench.model import build
from dax.bench.size import Size
from dax.cache import gate
from dax.errors import DaxError
from dax.facts import TI2V, controlled, facts_named
from dax.models import wan_block, wan_guard
from dax.plan import Plan

torch = pytest.importorskip("torch")

TINY = facts_named("tiny")
SIZE = Size(64, 64, 5)
QUICK = {"size": (64, 64, 5), "warm_up_s": 0.02, "timed_s": 0.05, "device": "cpu"}


@pytest.fixture(scope="module")
def model():
    return build(TINY, None, "cpu", 2)


@pytest.mark.parametrize("subject", ["block", "forward"])
def test_a_record_has_what_it_takes_to_get_the_figure_again(subject):
    log = []
    result = contest.bench(subject, "tiny", rows="eager,compiled-cudnn,fa3", log=log.append, **QUICK)
    assert json.loads(json.dumps(result)) == result
    assert {"command", "date", "device", "versions", "tokens", "num_blocks", "method"} <= result.keys()
    assert result["versions"]["torch"] == torch.__version__
    assert result["tokens"] == 2 * 4 * 4
    (row,) = result["rows"]
    assert row["row"] == "eager"
    assert row["error"] == 0
    assert row["low_ms_per_layer"] <= row["ms_per_layer"] <= row["high_ms_per_layer"]
    assert row["video_s"] == pytest.approx(row["ms_per_layer"] * 4 * 100 / 1e3)
    assert row["timed_s"] >= 0.05
    assert set(result["left_out"]) == {"compiled-cudnn", "fa3"}
    assert any("left out fa3" in text for text in log)


@pytest.mark.parametrize("subject", ["block", "forward"])
def test_a_timestep_for_each_token(subject, monkeypatch):
    """As Wan2.2 TI2V-5B has them with an image: stock's blocks get a row for every token, DAX's two for all."""
    facts = replace(TINY, **TI2V)
    monkeypatch.setattr(contest, "facts_of", lambda model: facts)
    quick = QUICK | {"size": (64, 96, 5)}
    rows = contest.bench(subject, "tiny", rows="eager", plans=["exact"], num_layers=2, log=print, **quick)["rows"]
    assert [row["row"] for row in rows] == ["eager", "dax exact"] and 0 < rows[1]["error"] < 0.05
    monkeypatch.setattr("dax.models.wan_block.modulation", lambda temb: replace(temb, rows=temb.rows.flip(1)))
    with pytest.raises(DaxError, match="not timed"):
        contest.bench(subject, "tiny", rows="eager", plans=["exact"], num_layers=2, log=print, **quick)


@pytest.mark.parametrize("subject", ["block", "forward"])
def test_control_blocks_and_their_hints(subject, monkeypatch):
    """Two of VACE's three blocks here, and the one control block that feeds them."""
    monkeypatch.setattr(contest, "facts_of", lambda model: replace(TINY, **controlled([0, 2, 3])))
    quick = {"num_layers": 2, "log": print, **QUICK}
    result = contest.bench(subject, "tiny", rows="eager", plans=["exact"], **quick)
    assert [row["row"] for row in result["rows"]] == ["eager", "dax exact"]
    assert 0 < result["rows"][1]["error"] < 0.05
    right = wan_block.control_forward
    monkeypatch.setattr(wan_block, "control_forward", lambda *x: (0 * right(*x)[0], right(*x)[1]))
    monkeypatch.setattr(wan_guard, "block_difference", lambda control: None)
    with pytest.raises(DaxError, match="not timed"):
        contest.bench(subject, "tiny", rows="eager", plans=["exact"], **quick)


def test_without_a_model_the_log_says_which_one_is_used():
    log = []
    contest.bench("block", None, rows="eager", num_layers=1, log=log.append, **QUICK)
    assert "tiny" in log[0]


def test_a_twin_shares_tensors_and_nothing_else(model):
    twin = rivals.twin(model)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters()):
        assert ours is theirs, name
    assert twin.blocks[0] is not model.blocks[0]
    assert twin.blocks[0].attn1.processor is not model.blocks[0].attn1.processor


def test_rows_leave_the_default_attention_backend_as_it_was(model):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

    with attention_backend(AttentionBackendName._NATIVE_MATH):
        before = _AttentionBackendRegistry.get_active_backend()[0]
        with rivals.backends_restored():
            rivals.arrange(model, rivals.RIVALS["eager"], "cpu")
            assert _AttentionBackendRegistry.get_active_backend()[0] != before
        assert _AttentionBackendRegistry.get_active_backend()[0] == before
    assert model.blocks[0].attn1.processor._attention_backend is None


def skip_self_attention(model):
    model.blocks[1].attn1.forward = lambda hidden, *rest, **named: torch.zeros_like(hidden)


def skip_cross_attention(model):
    model.blocks[1].attn2.forward = lambda hidden, *rest, **named: torch.zeros_like(hidden)


def forget_positions(model):
    stock = model.blocks[1].attn1.forward
    model.blocks[1].attn1.forward = lambda hidden, text, mask, rotary: stock(hidden, text, mask, None)


def swap_two_heads(model):
    attn = model.blocks[1].attn1
    stock = attn.to_v.forward
    attn.to_v.forward = lambda x: torch.cat([(v := stock(x))[..., 128:256], v[..., :128], v[..., 256:]], -1)


def not_a_number(model):
    model.blocks[0].ffn.forward = lambda hidden: hidden * float("nan")


@pytest.mark.parametrize(
    "fault", [skip_self_attention, skip_cross_attention, forget_positions, swap_two_heads, not_a_number]
)
def test_a_planted_fault_ends_the_bench_before_any_timing(model, fault, monkeypatch):
    stock = rivals.arrange
    monkeypatch.setitem(rivals.RIVALS, "faulty", rivals.Row("faulty", "x", limit=rivals.EIGHT_BITS))

    def arrange(model, row, device, alone=False):
        arranged, reason = stock(model, row, device)
        if row.name == "faulty":
            fault(arranged)
        return arranged, reason

    monkeypatch.setattr(rivals, "arrange", arrange)
    monkeypatch.setattr(contest, "measure", lambda *rest: pytest.fail("timed a wrong answer"))
    calls, origin = calls_of(TINY, model, SIZE, "cpu")
    rows = [rivals.RIVALS["eager"], rivals.RIVALS["faulty"]]
    with torch.no_grad(), pytest.raises(DaxError, match="faulty: result lies") as caught:
        contest.run_rows(model, calls, origin, rows, "cpu", 0.0, 0.01, lambda text: None)
    assert caught.value.exit_code == 8


def test_rows_are_those_named_each_once():
    known = ("ways", "link", "vae")
    assert rivals.chosen(" link, ways,link,", known) == ["link", "ways"] and rivals.chosen(None, known) == list(known)
    assert rivals.chosen("", known, beside=["a plan"]) == []
    for text, told in (("lnk", "unknown row 'lnk', did you mean 'link'"), (" ,", "nothing to time; known: ways, link")):
        with pytest.raises(DaxError, match=told):
            rivals.chosen(text, known)


@pytest.mark.parametrize(
    "named, wrong",
    [
        ({"rows": "eagr"}, "did you mean 'eager'"),
        ({"rows": ","}, "nothing to time"),
        ({"model": "wan2.1-t2v-14"}, "did you mean 'wan2.1-t2v-14b'"),
        ({"size": (65, None, None)}, "--height 65"),
        ({"size": (None, -16, None)}, "--width -16"),
        ({"size": (None, None, 6)}, "--num-frames 6"),
        ({"num_layers": 5}, "--layers 5"),
        ({"num_layers": 0}, "--layers 0"),
        ({"plans": ["exakt"]}, "did you mean 'exact'"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_built(named, wrong, monkeypatch):
    monkeypatch.setattr(contest, "build", lambda *rest: pytest.fail("built a model"))
    with pytest.raises(DaxError) as caught:
        contest.bench("block", **({"model": "tiny", "rows": "eager"} | named))
    assert wrong in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_is_timed_with_its_own_weights_cut_to_the_asked_depth(random_folder):
    result = contest.bench("block", str(random_folder), num_layers=1, rows="eager", log=lambda text: None, **QUICK)
    assert (result["weights"], result["num_blocks"]) == ("folder", 1)
    assert result["model"] == str(random_folder)


def test_a_folder_with_broken_weights_is_refused(random_folder, tmp_path):
    import shutil

    shutil.copytree(random_folder, tmp_path / "broken")
    (tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DaxError, match="broken/transformer") as caught:
        contest.bench("block", str(tmp_path / "broken"), rows="eager", log=lambda text: None, **QUICK)
    assert caught.value.exit_code == 3


def test_when_no_row_runs_here_the_reason_is_the_error():
    with pytest.raises(DaxError, match="needs an NVIDIA GPU") as caught:
        contest.bench("block", "tiny", rows="fa3", num_layers=1, log=lambda text: None, **QUICK)
    assert caught.value.exit_code == 4


def test_dax_under_a_plan_is_a_row_like_any_other(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("attention:\n  kernel: sdpa\n")
    result = contest.bench("block", "tiny", rows="eager", plans=["exact", str(file)], log=lambda text: None, **QUICK)
    assert [row["row"] for row in result["rows"]] == ["eager", "dax exact", f"dax {file}"]
    assert all(row["error"] <= 0.02 for row in result["rows"])


def test_a_plan_that_cannot_run_here_is_refused_not_replaced(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("attention:\n  kernel: cudnn\n")
    with pytest.raises(DaxError, match="cudnn") as caught:
        contest.bench("block", "tiny", rows="eager", plans=[str(file)], log=lambda text: None, **QUICK)
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_compiled_blocks_agree_with_eager():
    result = contest.bench("block", "tiny", rows="eager,compiled", num_layers=1, log=lambda text: None, **QUICK)
    eager, compiled = result["rows"]
    assert 0 < compiled["error"] < compiled["error_limit"]
    assert compiled["first_call_s"] > eager["first_call_s"]


def test_a_table_shows_every_row_and_dashes_for_nothing():
    text = report.table([{"a": 1234.5, "b": None}, {"a": 0.00123, "b": "x"}], {"a": "A", "b": "B"})
    assert text.splitlines()[0].split() == ["|", "A", "|", "B", "|"]
    assert "| 1234" in text and "0.0012" in text and "| - |" in text


def test_the_command_prints_one_json_object_on_stdout_and_progress_on_stderr(capsys):
    from dax.cli.bench import command

    quick = {"height": 64, "width": 64, "num_frames": 5, "warm_up_s": 0.02, "timed_s": 0.05, "device": "cpu"}
    command("block", "tiny", layers=1, rows="eager", as_json=True, **quick)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_blocks"] == 1
    assert printed.err.startswith("no GPU: a CPU is slow") and "eager: first call" in printed.err
    command("block", "tiny", layers=1, rows="eager", as_json=False, **quick)
    assert "diffusers eager" in capsys.readouterr().out


@pytest.mark.parametrize(("subject", "rows"), [("attention", "sdpa"), ("linear", None), ("block", "eager")])
def test_every_time_is_told_as_it_is_known(subject, rows, capsys):
    """So that a run that is cut short has told something."""
    from dax.cli.bench import command

    size = {"height": 64, "width": 64, "num_frames": 5}
    command(subject, "tiny", rows=rows, warm_up_s=0.0, timed_s=0.001, device="cpu", as_json=True, **size)
    printed = capsys.readouterr()
    timed = [row for row in json.loads(printed.out)["rows"] if "sm_mhz" in row]
    assert timed and printed.err.count("round 1 of 2, ") == printed.err.count("round 2 of 2, ") == len(timed)


def test_the_command_prints_the_ledger(capsys):
    from dax.cli.bench import command

    command("claims", as_json=True)
    assert isinstance(json.loads(capsys.readouterr().out), list)
    with pytest.raises(DaxError, match="did you mean 'block'"):
        command("blok")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            ["cache", "--model", "wan2.1-t2v-14b"],
            "bench cache takes no --model, but --plan, --steps",
        ),
        (["load", "--num-frames", "5"], "bench load takes no --num-frames"),
        (["start", "--seconds", "2"], "bench start takes no --seconds"),
        (["video", "--rows", "eager"], "bench video takes no --rows"),
        (["attention", "--gpus", "4"], "bench attention takes no --gpus"),
        (["parallel", "--plan", "exact", "--plan", "fast"], "one --plan at a time, not exact and fast"),
    ],
)
def test_a_flag_that_a_bench_would_not_read_is_refused(typed, told):
    from dax.cli.main import app

    with pytest.raises(DaxError, match=told) as caught:
        typer.main.get_command(app)(["bench", *typed], standalone_mode=False)
    assert caught.value.exit_code == 2


def test_a_common_flag_that_a_bench_of_kernels_has_no_use_for_is_named(monkeypatch, capsys):
    from dax.cli.bench import command

    monkeypatch.setattr("dax.bench.linear.bench", lambda *_: {"rows": []})
    command("linear", layers=1, plan=["exact", "fast"], as_json=True)
    heard = capsys.readouterr().err
    assert "bench linear takes no --layers, but --model" in heard and "takes no --plan" in heard


def test_linear_checks_every_product_and_names_its_ceiling():
    log = []
    result = linear.bench("tiny", (64, 64, 5), 0.0, 0.01, "cpu", log.append)
    assert json.loads(json.dumps(result)) == result and result["tokens"] == 32
    shapes = [row["shape"] for row in result["rows"]]
    assert {"384 x 384", "384 x 1024", "1024 x 384", "384 x 1024 x 384"} == set(shapes)
    labels = {row["label"] for row in result["rows"] if row["subject"] == "ffn"}
    assert labels == {"DAX int8", "DAX fp8", "bf16, gate in one pass"}
    assert all(row["error"] < 0.05 for row in result["rows"]) and any("int8 0.00" in text for text in log)
    few = linear.bench("tiny", (64, 64, 5), 0.0, 0.01, "cpu", log.append, "bf16")["rows"]
    assert [row["label"] for row in few] == ["bf16"] * 3 + ["bf16, gate in one pass"]
    with pytest.raises(DaxError, match="did you mean 'int8'"):
        linear.bench("tiny", (64, 64, 5), 0.0, 0.01, "cpu", log.append, "int")


def test_a_predicted_step_is_the_sum_it_should_be_or_is_not_timed(monkeypatch):
    (row,) = step.bench("tiny", (64, 64, 5), 0.0, 0.01, "cpu")["rows"]
    assert row["error"] < 3e-3 and row["ms"] > 0 and row["state_mb"] == pytest.approx(2 * 4 * 16 * 2 * 8 * 8 * 2 / 1e6)
    original = gate.combine
    monkeypatch.setattr(gate, "combine", lambda velocities, weights: original(velocities[::-1], weights))
    monkeypatch.setattr(step, "measure", lambda *rest: pytest.fail("timed a wrong answer"))
    with pytest.raises(DaxError, match="from the sum it should be; not timed"):
        step.bench("tiny", (64, 64, 5), 0.0, 0.01, "cpu")


def test_linear_does_not_time_a_wrong_product(monkeypatch):
    from dax.kernels import scaled_linear

    original = scaled_linear.scaled_linear
    monkeypatch.setattr(scaled_linear, "scaled_linear", lambda *args: original(*args) * 1.01)
    monkeypatch.setattr(linear, "measure", lambda *rest: pytest.fail("timed a wrong answer"))
    with pytest.raises(DaxError, match="DAX int8: 0.01.* from the reference, limit") as caught:
        linear.bench("tiny", (64, 64, 5), 0.0, 0.01, "cpu", lambda text: None)
    assert caught.value.exit_code == 8


def test_a_waterfall_adds_one_technique_after_the_other():
    rows = rivals.rows_named("eager", ["balanced"], as_waterfall=True)
    assert [row.name for row in rows] == ["eager", "dax stock", "dax +blocks", "dax +attention", "dax +linear"]
    assert [row.plan.blocks.fused for row in rows[1:]] == [False, True, True, True]
    assert rows[-1].plan == Plan.load("balanced") and rows[1].limit == rows[2].limit < rows[3].limit
    assert [rivals.arithmetic(row) for row in rows[2:]] == [("bf16", "bf16"), ("bf16", "int8"), ("int8", "int8")]


def test_a_plan_alone_may_change_the_model_itself_and_is_held_to_eager():
    result = contest.bench("block", "tiny", rows="", plans=["balanced"], num_layers=2, log=lambda text: None, **QUICK)
    (row,) = result["rows"]
    assert 0.005 < row["error"] < row["error_limit"] and row["arrange_s"] > 0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("attention_kernel", "attention"),
        ("nvjet_sm90_tst_192x208_64x4_1x2_h_bz_coopB_bias_TNT", "gemm"),
        ("linear_kernel", "gemm"),
        ("norm_rope_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor", "elementwise"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel, kind):
    assert kind_of(kernel) == kind


def test_a_start_is_timed_cold_and_warm(monkeypatch):
    files = "len(os.listdir(os.environ['TRITON_CACHE_DIR']))"
    child = f"import json, os; print('a warning'); print(json.dumps({{'torch_s': {files}, 'first_s': 3.0}}))"
    monkeypatch.setattr(start, "CHILD", child)
    result = start.bench("tiny", (64, 64, 5), "balanced", "cpu", lambda text: None)
    assert [(row["cache"], row["imports"]) for row in result["rows"]] == [
        ("empty", "dax"),
        ("warm", "dax"),
        ("warm", "plain"),
    ]
    assert all(row["torch_s"] == 0 and row["seconds"] == 3 for row in result["rows"])
    monkeypatch.setattr(start, "CHILD", "raise ValueError('no such plan')")
    with pytest.raises(DaxError, match="bench start: ValueError: no such plan"):
        start.bench("tiny", (64, 64, 5), "balanced", "cpu", lambda text: None)


def test_a_start_of_a_folder_whose_sizes_have_no_name(monkeypatch, random_folder):
    child = "import json, sys; from dax.bench.model import facts_of; facts_of(sys.argv[3]); print(json.dumps({}))"
    monkeypatch.setattr(start, "CHILD", child)
    result = start.bench(str(random_folder), (64, 64, 5), "exact", "cpu", lambda text: None)
    assert result["model"].startswith("wan-t2v-") and result["tokens"] == 32


@pytest.mark.parametrize("there", [True, False])
def test_a_start_without_bytecode_says_so(there, monkeypatch, tmp_path):
    monkeypatch.setattr(start, "ROWS", ())
    monkeypatch.setattr(torch.__spec__, "cached", str(tmp_path / "torch.pyc"))
    if there:
        (tmp_path / "torch.pyc").touch()
    heard = []
    assert start.bench("tiny", (64, 64, 5), "balanced", "cpu", heard.append)["bytecode"] is there
    assert any("no bytecode" in line for line in heard) is not there


def test_the_parts_of_a_start_are_all_of_it_up_to_the_first_output(monkeypatch, tmp_path):
    """A child that lingers after its output is not slower for it."""
    monkeypatch.setattr(start, "CHILD", start.CHILD + "\ntime.sleep(3)")
    before = time.monotonic()
    spent = start.started(["dax", "tiny", "balanced", "cpu", "64", "64", "5"], str(tmp_path))
    whole = time.monotonic() - before
    seconds = spent.pop("seconds")
    assert spent.keys() == start.PARTS.keys() and all(part >= 0 for part in spent.values())
    assert sum(spent.values()) == pytest.approx(seconds, abs=1e-6) and seconds < whole - 3
    assert spent["torch_s"] > 0.1 and spent["diffusers_s"] > 0.1
