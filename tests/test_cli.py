"""The command as a shell sees it: exit codes, one-line errors, streams, signals, start-up time."""

import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = ["a red circle", "--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2"]
TINY = "no --model: the embedded tiny Wan, which knows coloured shapes that move"
COMMANDS = ("generate", "explain", "compare", "calibrate", "tune", "bench", "inspect", "doctor")


def dax(*arguments, cwd=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "dax", *arguments],
        cwd=cwd, capture_output=True, text=True, env=options.pop("env", ENVIRONMENT), timeout=120, **options,
    )  # fmt: skip


def assert_refused(ended, code: int, says: str) -> None:
    """One line on stderr (after the note on the default model), nothing on stdout."""
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("no --model")]
    assert ended.returncode == code, ended.stderr
    assert len(lines) == 1 and says in lines[0] and lines[0].startswith("dax: ")
    assert ended.stdout == ""


def test_help_is_quick_and_needs_no_torch():
    script = textwrap.dedent("""
        import sys
        from dax.cli.main import main
        try:
            main(["--help"])
        finally:
            print(sorted({"torch", "diffusers", "numpy", "transformers"} & set(sys.modules)), file=sys.stderr)
            import os
            assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"  # it must stand before torch is imported
    """)
    spent = []
    for _ in range(3):  # processor time: alone on a machine it is the time one waits
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert ended.returncode == 0 and ended.stderr.strip() == "[]"
    assert min(spent) < 0.5
    for word in (*COMMANDS, "--verbose"):
        assert word in ended.stdout


def test_where_an_error_comes_from_is_told_if_asked():
    quiet, verbose = dax("inspect", "/nowhere.mp4"), dax("inspect", "/nowhere.mp4", "-v")
    assert_refused(quiet, 2, "no such file")
    assert "Traceback" in verbose.stderr and verbose.stderr.endswith(quiet.stderr) and verbose.returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    ended = dax(command, "--help")
    assert ended.returncode == 0 and "Usage: dax" in ended.stdout


def test_generate_then_inspect_and_the_name_is_taken(tmp_path):
    ended = dax("generate", *SMALL, "--seed", "5", "--guidance_scale", "3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    path = ended.stdout.strip()
    assert path.startswith("outputs/a-red-circle-s5-") and os.listdir(tmp_path / "outputs") == [Path(path).name]
    assert ended.stderr.splitlines()[0] == TINY
    assert ended.stderr.splitlines()[-1].startswith(f"{path}: 5 frames 32x32 in ")
    record = json.loads(dax("inspect", path, cwd=tmp_path).stdout)
    assert (record["prompt"], record["guidance_scale"], record["path"]) == ("a red circle", 3.0, path)
    assert record["plan_hash"][:8] in path
    assert_refused(dax("generate", *SMALL, "--seed", "5", cwd=tmp_path), 6, "exists; pass --overwrite")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "x", "--heigth", "32"], 2, "--heigth"),
        (["generate"], 2, "no prompt"),
        (["generate", "--from", "no.mp4"], 2, "no.mp4: no such file"),
        (["generate", "x", "--device", "tpu"], 2, "unknown device 'tpu'; known: cuda, cpu"),
        (["generate", "x", "--steps", "many"], 2, "--steps"),
        (["generate", "x", "--height", "33"], 2, "nearest 32 or 48"),
        (["generate", "x", "--plan", "qaunt"], 2, "unknown plan 'qaunt'"),
        (["generate", "x", "--set", "attention.kernel=fast"], 2, "attention.kernel = 'fast'"),
        (["generate", "x", "--model", "/nowhere"], 3, "/nowhere"),
        (["generate", "x", "-o", "clip.gif"], 6, "unknown suffix '.gif'"),
        (["inspect", "/nowhere.mp4"], 2, "no such file"),
        (["render"], 2, "render"),
    ],
)
def test_bad_use_is_one_line(tmp_path, arguments, code, says):
    assert_refused(dax(*arguments, cwd=tmp_path), code, says)
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(42)
def test_row_42_a_closed_stdout_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "dax", "explain", "--json"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
    assert ended.returncode == 141
    assert ended.stderr.splitlines() == [TINY]


@pytest.mark.fault(42)
def test_row_42_a_plain_terminal(tmp_path):
    import numpy as np

    from dax.generate import video

    video.write(tmp_path / "a.npz", np.zeros((1, 16, 16, 3), np.uint8), 8, {"prompt": "\u2605 \U0001f600"})
    plain = {
        **ENVIRONMENT,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "COLUMNS": "20",
        "TERM": "dumb",
    }
    ended = dax("inspect", "a.npz", cwd=tmp_path, env=plain)
    assert ended.returncode == 0 and ended.stdout.isascii() and "\\u2605" in ended.stdout
    assert dax("--help", env=plain).returncode == 0


STAGES = {"text": "run.encode", "denoise": "run.denoise", "decode": "run.decode", "write": "video.check_readable"}


def start_and_wait(tmp_path, stage: str, stubborn: bool = False) -> subprocess.Popen:
    """A real run that stops inside a stage and says so; `stubborn` ones do not unwind."""
    module, _, name = STAGES[stage].partition(".")
    script = f"""
        import sys, time
        from dax.generate import run, video
        honest = {module}.{name}
        def pause(*arguments):
            if {stage == "write"}:
                honest(*arguments)
            word = "inside"
            while True:
                try:
                    print(word, flush=True)
                    time.sleep(60)
                except BaseException:
                    if not {stubborn}:
                        raise
                    word = "unmoved"
        {module}.{name} = pause
        from dax.cli.main import main
        main(["generate", *{SMALL!r}, "-o", "clip.mp4"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout.readline() == "inside\n", process.stderr.read()
    return process


INTERRUPTED, TERMINATED = (2, 130, "interrupted"), (15, 143, "terminated")


@pytest.mark.parametrize(
    ("stage", "signal", "code", "word"),
    [
        *(pytest.param(stage, *INTERRUPTED, marks=pytest.mark.fault(44)) for stage in STAGES),
        *(pytest.param(stage, *TERMINATED, marks=pytest.mark.fault(45)) for stage in ("denoise", "write")),
    ],
)
def test_rows_44_and_45_a_signal_in_any_stage(tmp_path, stage, signal, code, word):
    process = start_and_wait(tmp_path, stage)
    assert bool(os.listdir(tmp_path)) == (stage == "write")
    process.send_signal(signal)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.splitlines()[-1] == f"dax: {word}" and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(44)
def test_row_44_a_second_signal_is_a_hard_exit(tmp_path):
    process = start_and_wait(tmp_path, "denoise", stubborn=True)
    process.send_signal(2)
    assert process.stdout.readline() == "unmoved\n"
    time.sleep(0.5)
    process.send_signal(2)
    assert process.wait(timeout=5) == 130


@pytest.mark.fault(44)
def test_row_44_it_ends_at_once_inside_a_long_operation_too():
    script = """
        import hashlib
        from dax.cli.main import listen
        listen()
        print("inside", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert process.stdout.readline() == "inside\n"
        time.sleep(0.5)
        for _ in range(2):  # no one is ended by a signal that comes twice at a time
            process.send_signal(2)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(2)
        assert process.wait(timeout=5) == 130
    finally:
        process.kill()
