"""Ranks that die, raise, hang or disagree end the run in seconds, in one line that names rank, stage and cause."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from dax.errors import DaxError
from dax.parallel.board import Board
from dax.parallel.join import agree, check_gpus, place
from dax.parallel.launch import FOLDER, clear_up, failure, run_ranks, write_cause
from dax.parallel.nodes import ELSEWHERE, SILENT_S, Nodes
from tests.parallel import runs

BUDGET_S = 5.0  # from the fault to the line, the promise of the contract


@pytest.fixture
def failing(tmp_path):
    """failing(fault, agreed): (the DaxError of a run with that fault, seconds from the fault to it). Nobody is left."""

    def run(fault, agreed=None, window=False):
        before, note = set(psutil.Process().children(recursive=True)), tmp_path / "note"
        note.write_text("nan")
        with pytest.raises(DaxError) as caught:
            run_ranks(runs.meet, (fault, str(note), agreed, window), 2)
        now = time.monotonic()
        left = set(psutil.Process().children(recursive=True)) - before
        assert not [process for process in left if "spawn_main" in " ".join(process.cmdline())]
        return caught.value, now - float(note.read_text())

    return run


@pytest.mark.fault(52)
@pytest.mark.fault(49)
def test_two_runs_at_once_and_no_rank_outlives_its_parent(tmp_path):
    other = subprocess.Popen([sys.executable, "-m", "tests.parallel.runs", str(tmp_path)])
    assert run_ranks(runs.meet, (None, str(tmp_path / "note.part")), 2) == (2, 8.0)
    deadline = time.monotonic() + 60
    while len([path for path in tmp_path.iterdir() if not path.suffix]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [psutil.Process(int((tmp_path / name).read_text())) for name in "01"]
    other.kill()
    other.wait()
    _, left = psutil.wait_procs(ranks, timeout=BUDGET_S)
    assert left == []
    behind = list(Path(tempfile.gettempdir()).glob(f"{FOLDER}{other.pid}-*"))
    clear_up()
    assert behind and not any(folder.exists() for folder in behind)


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("fault", "line", "window"),
    (
        ("kill", "rank 1 killed by SIGKILL during round 2", False),
        ("exit", "rank 1, during round 2: left early with exit code 0", False),
        ("kill", "rank 1 killed by SIGKILL during round 2", True),
    ),
)
def test_a_rank_that_is_gone_is_named(failing, fault, line, window):
    """Wherever the other waits for it: in a collective, or in a window's barrier."""
    error, seconds = failing(fault, window=window)
    print(f"{fault}: {seconds:.1f} s from the fault to the line")
    assert str(error).startswith(line) and error.exit_code == 7
    assert seconds < BUDGET_S


@pytest.mark.fault(47)
def test_the_first_cause_is_told_and_no_other(failing):
    error, seconds = failing("raise")
    assert str(error) == "rank 1, during round 2: ValueError: the dog ate it" and error.exit_code == 7
    assert "in strike" in error.__notes__[0], "what -v shows"
    assert seconds < BUDGET_S


@pytest.mark.fault(47)
def test_a_refusal_keeps_its_code_and_echoes_are_not_told(tmp_path):
    board = Board(tmp_path / "board", 2, 1)
    board.enter("denoise step 2 of 4")
    write_cause(tmp_path, 1, DaxError("out_of_memory", "1x1x1 does not fit: a larger machine"))
    write_cause(tmp_path, 0, RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    error = failure({}, board, None, tmp_path)
    assert str(error) == "1x1x1 does not fit: a larger machine" and error.exit_code == 5
    (tmp_path / "cause-1").unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with mock.patch("os.getpid", lambda: dead.pid):
        board.enter("denoise step 3 of 4")
    error = failure({}, board, None, tmp_path)
    assert str(error) == "rank 1 vanished during denoise step 3 of 4: all 2 ranks ended" and error.exit_code == 7
    write_cause(tmp_path, 0, ValueError("the dog ate it"))
    error = failure({}, board, None, tmp_path)
    assert str(error) == "rank 0, before it began: ValueError: the dog ate it", "the agent ended rank 1 for it"


@pytest.mark.fault(48)
def test_a_rank_that_hangs_is_named(failing):
    error, seconds = failing("hang")
    assert str(error).startswith("rank 1 hangs: no progress for 2 s during round 2") and error.exit_code == 7


@pytest.mark.fault(48)
def test_a_rank_that_hangs_on_another_machine_is_named(tmp_path):
    """Two agents of torchrun, a rank each: both nodes end, and the one that only waits says who hangs, where, and ends
    with 7."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    start += [
        f"--rdzv-endpoint={address}",
        "--rdzv-id=two",
        "-m",
        "tests.parallel.runs",
        "hang",
        str(tmp_path / "note"),
    ]
    nodes = [subprocess.Popen(start, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [node.communicate(timeout=60)[1] for node in nodes]
    seconds = time.monotonic() - float((tmp_path / "note").read_text())
    print(f"{seconds:.1f} s from the fault to the end of both nodes")
    waiting = next(text for text in said if "exitcode  : 7" in text)
    assert "dax: rank 1 hangs: no progress for 2 s during round 2" in waiting
    assert all(node.returncode for node in nodes) and seconds < 30  # of torchrun's own ways to end


@pytest.fixture
def two_nodes(tmp_path):
    """Two machines of two ranks each: (their Nodes, the boards of their ranks)."""
    from torch.distributed import HashStore

    store, nodes, ranks = HashStore(), [], []
    for node in range(2):
        own = range(2 * node, 2 * node + 2)
        ranks += [Board(tmp_path / f"node{node}", 4, rank) for rank in own]
        nodes.append(Nodes(ranks[own.start], store, node, 2, own))
    return nodes, ranks


@pytest.mark.fault(48)
def test_what_other_machines_say_stands_on_the_board(two_nodes, monkeypatch):
    nodes, ranks = two_nodes
    for board in ranks:
        board.enter("denoise step 3 of 50", patience_s=60)
    assert ranks[0].hung() is None and [node.exchange() for node in (*nodes, nodes[0])] == [None] * 3
    for board in (ranks[0], ranks[1], ranks[3]):
        board.tick()
    assert [node.exchange() for node in (*nodes, nodes[0])] == [None] * 3
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    nodes[1].tell()
    for node in nodes:
        assert node.exchange() is None, "both nodes speak, whatever their ranks do"
    assert ranks[0].hung() == ranks[3].hung() == 2
    assert ranks[0].read(2).pid == ELSEWHERE and ranks[3].read(2).pid == os.getpid()
    ranks[3].tick()
    nodes[1].exchange()
    assert nodes[0].exchange() is None and ranks[0].hung() is None, "progress on another machine counts"


@pytest.mark.fault(46)
def test_a_machine_that_falls_silent_is_lost(two_nodes, monkeypatch):
    nodes, ranks = two_nodes
    ranks[2].enter("decode")
    for node in (nodes[1], nodes[0]):
        node.exchange()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + SILENT_S + 1)
    assert nodes[0].exchange() == (2, "and its node are lost: silent for 11 s, last seen during decode")
    ranks[2].enter("done")
    nodes[1].tell()
    assert nodes[0].exchange() is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 3 * SILENT_S)
    assert nodes[0].exchange() is None, "it has finished"
    nodes[0].store = mock.Mock(set=mock.Mock(side_effect=RuntimeError("Connection refused\nat")))
    assert nodes[0].exchange() == (0, "and its node are lost: Connection refused")
    ranks[0].enter("done")
    assert nodes[0].exchange() is None, "this one has finished, too"


def test_no_process_here_dies_for_a_rank_elsewhere(tmp_path):
    """Its number on another machine is somebody else's here."""
    code = (
        "import time\nfrom functools import partial\n"
        "from dax.parallel.board import Board, Entry\nfrom dax.parallel.launch import Watch\n"
        f"board = Board({str(tmp_path / 'board')!r}, 2, 0)\nboard.put(1, Entry(0.0, 0.0, 0, -1, 'load'))\n"
        "board.tick()\nboard.enter('load', 0.0)\nWatch(board, partial(print, flush=True))\ntime.sleep(30)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 7 and ended.stdout.startswith("rank 1 hangs: no progress")


@pytest.mark.fault(50)
def test_ranks_that_disagree_say_about_what(failing):
    error, _ = failing(None, [{"request": "a dog", "plan": "1"}, {"request": "a cat", "plan": "1"}])
    assert str(error) == "rank 1 has request a cat, rank 0 has a dog" and error.exit_code == 7


@pytest.mark.fault(50)
def test_agreement_compares_every_name():
    from torch.distributed import HashStore

    store, same = HashStore(), {"code": "a", "plan": "b"}
    agree(store, 0, same)
    agree(store, 1, dict(same))
    for name in same:
        with pytest.raises(DaxError, match=f"rank 3 has {name} x, rank 0 has {same[name]}"):
            agree(store, 3, same | {name: "x"})


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    ("variables", "line"),
    (
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK is not set"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK = 'x'"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "do not fit"),
    ),
)
def test_a_place_that_makes_no_sense_is_refused(monkeypatch, variables, line):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert place().count == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DaxError, match=line) as caught:
        place()
    assert caught.value.exit_code == 4


@pytest.mark.fault(53)
def test_more_ranks_than_gpus():
    check_gpus(8, "cpu", 0)
    check_gpus(2, None, 2)
    for found, line in ((2, "8 ranks need 8 GPUs: this machine has 2;"), (0, "has none that torch can see")):
        with pytest.raises(DaxError, match=line) as caught:
            check_gpus(8, None, found)
        assert caught.value.exit_code == 4


@pytest.mark.fault(61)
def test_a_clock_that_jumps_makes_nobody_hang(tmp_path, monkeypatch):
    ranks = [Board(tmp_path / "board", 2, rank) for rank in range(2)]
    for board in ranks:
        board.enter("denoise step 3 of 50", patience_s=60)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert ranks[0].hung() is None


def test_the_rank_that_started_least_is_the_one_that_hangs(tmp_path):
    ranks = [Board(tmp_path / "board", 3, rank) for rank in range(3)]
    watching = Board(tmp_path / "board", 3)
    for board in ranks:
        board.enter("load", patience_s=0.0)
        board.tick()
    for board in (ranks[0], ranks[2]):
        board.tick()
    assert watching.hung() == 1 and watching.read(1).stage == "load"
    ranks[2].enter("load", patience_s=60)
    assert watching.hung() is None, "one of them makes progress"
    assert Board(tmp_path / "other", 2, 0).hung() is None, "rank 1 has not begun"
