"""The examples run as they stand, and the first DAX's command means what it meant."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dax.errors import DaxError
from dax.generate.run import Job, generate
from dax.generate.video import decoded_shape, read_record

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
FLAGS = """--model_id --prompt --negative_prompt --height --width --num_frames --num_inference_steps --output_file
--seed --sequence_parallel --int8_linear --overlap_comm --enable_teacache --compile""".split()


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("wan_t2v_example", EXAMPLES / "wan_t2v_example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_exactly_the_flags_of_the_first_dax(command):
    source = (EXAMPLES / "wan_t2v_example.py").read_text()
    assert re.findall(r'add_argument\("(--\w+)"', source) == FLAGS
    plain = command.parse([])
    assert (plain.model_id, plain.num_inference_steps) == ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 50)
    assert (plain.output_file, plain.seed) == ("output.mp4", 0)


@pytest.mark.parametrize(
    ("backend", "kernel"), [({}, "sdpa"), ({"ATTENTION_BACKEND": "SAGE_ATTN"}, "sage"),
                            ({"ATTENTION_BACKEND": "FLASH_ATTN"}, "flash")],
)  # fmt: skip
def test_the_environment_picks_the_attention(command, backend, kernel):
    assert command.plan_of(command.parse([]), backend).attention.kernel == kernel


@pytest.mark.fault(21)
def test_a_backend_nobody_knows_is_refused(command):
    for wrong in ("SAGE", "sage_attn", ""):
        with pytest.raises(DaxError, match=f"ATTENTION_BACKEND={wrong}: unknown") as refusal:
            command.plan_of(command.parse([]), {"ATTENTION_BACKEND": wrong})
        assert refusal.value.exit_code == 2


def test_every_flag_becomes_part_of_the_plan(command):
    flags = ["--sequence_parallel", "--overlap_comm", "--enable_teacache", "--compile", "--int8_linear"]
    plan = command.plan_of(command.parse(flags), {})
    assert (plan.cache.policy, plan.cache.threshold, plan.compile) == ("teacache", 0.1, "blocks")
    assert (plan.parallel.overlap, plan.linear.scheme, plan.blocks.fused) == ("auto", "int8", False)
    assert command.plan_of(command.parse(["--sequence_parallel"]), {}).parallel.overlap == 0
    with pytest.raises(DaxError, match="--overlap_comm needs --sequence_parallel"):
        command.plan_of(command.parse(["--overlap_comm"]), {})


SMALL = "--model_id tiny --height 32 --width 48 --num_frames 5 --num_inference_steps 2".split()


def run_example(name: str, *arguments, ranks: int = 0) -> str:
    """stdout of an example, under torchrun if `ranks` is given."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    ended = subprocess.run(
        [sys.executable, *start, EXAMPLES / f"{name}.py", *arguments],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_it_runs_on_the_tiny_model_with_its_own_manners(tmp_path):
    (tmp_path / "clip.mp4").write_text("is replaced")
    said = run_example("wan_t2v_example", *SMALL, "--output_file", tmp_path / "clip.mp4")
    assert re.search(r"^Inference finished. Per prompt time:\d+\.\d\ds$", said, re.M)
    assert "Using default prompt" in said
    assert decoded_shape(tmp_path / "clip.mp4") == (5, 32, 48, 3) and read_record(tmp_path / "clip.mp4")["seed"] == 0


def test_under_torchrun_two_ranks_make_the_clip_of_dax_generate(command, tmp_path):
    made, expected = tmp_path / "made" / "for you" / "two.npz", tmp_path / "one.npz"
    prompt = "a red circle moves right over a black background"
    run_example("wan_t2v_example", *SMALL, "--sequence_parallel", "--prompt", prompt, "--output_file", made, ranks=2)
    size = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "guidance_scale": 5.0, "flow_shift": 5.0}
    generate(Job({"prompt": prompt, "negative_prompt": command.NEGATIVE, **size}, str(expected)))
    one, two = (np.load(path)["frames"].astype(int) for path in (expected, made))
    assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a_plan_of_your_own", "did you mean 'attention.kernel'"),
        ("how_far_apart", "worst frame"),
        ("optimize_in_place", r"relative difference to stock diffusers: (0|\de-0[5-9])\n"),
    ],
)
def test_short_examples_run_and_stay_short(name, says):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40
    assert re.search(says, run_example(name))
