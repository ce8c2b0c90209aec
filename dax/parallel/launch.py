"""Ranks of one machine started and watched: torch's elastic agent spawns them, one line says who failed and where.

`run_ranks` is what `--gpus N` calls; under torchrun the ranks exist already and only `joined` is needed. No rank
survives its parent, and the first failure ends them all.
"""

import ctypes
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from dax.errors import EXIT_CODES, DaxError
from dax.parallel.board import COUNT, PATH, Board

PR_SET_PDEATHSIG = 1
ECHO_S = 0.5
INTERVAL_S = 0.25  # from one look at the board to the next
FOLDER = "dax-ranks-"


def run_ranks(task: Callable, args: tuple, count: int):
    """task(*args) in `count` processes that torch.distributed can join; returns what rank 0 returns.

    DaxError: the cause that a rank gave, else "rank_failed" with rank, stage and cause; "interrupted" and "terminated"
    for a signal to this process. Takes the import of torch and the model in each process.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    clear_up()
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-") as folder, quiet_agent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port: two runs never meet
            local_addr="localhost",  # what ranks connect to: no name of this machine has to resolve
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            signals_to_handle="SIGTERM,SIGINT",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        board = Board(Path(folder) / "board", count)
        watch = Watch(board)
        try:
            return elastic_launch(config, worker)(task, args, folder, count)[0]
        except ChildFailedError as error:
            raise failure(error.failures, board, watch.verdict, Path(folder)) from None
        except SignalException as error:
            code = "interrupted" if error.sigval == signal.SIGINT else "terminated"
            raise DaxError(code, f"{code}; all {count} ranks are down") from None
        finally:
            watch.stop()
            for number, handler in before.items():
                signal.signal(number, handler)


def clear_up() -> None:
    """Remove what runs left whose parent was killed: their folders carry its process id."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        pid = path.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdigit() and not process_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def quiet_agent():
    """What the agent logs of a failure, our one line says better."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def worker(task: Callable, args: tuple, folder: str, count: int):
    """What a spawned process runs. A failure is written down before the process ends, for the parent to tell."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # end at once, even inside a collective
    rank = int(os.environ["RANK"])
    os.environ[PATH], os.environ[COUNT] = str(Path(folder) / "board"), str(count)
    try:
        result = task(*args)
    except BaseException as error:
        write_cause(Path(folder), rank, error)
        if is_echo(error):
            time.sleep(ECHO_S)  # the agent shall notice first who died
        os._exit(EXIT_CODES["rank_failed"])  # peers may never answer: nothing is torn down
    return result if rank == 0 else None


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however that ends."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):  # Linux only; elsewhere torch's own agent does what it can
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_CODES["rank_failed"])


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank no longer answers. Gloo has no class of its own for that."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def write_cause(folder: Path, rank: int, error: BaseException) -> None:
    """Why a rank fails, as a file that is there whole or not at all."""
    told = isinstance(error, DaxError)
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, SystemExit):
        said = f"left early with exit code {error.code or 0}"
    elif not told:
        said = f"{type(error).__name__}: {said}"
    code, echo = error.code if told else "rank_failed", is_echo(error)
    cause = {"at": time.monotonic(), "code": code, "said": said, "told": told, "echo": echo}
    part = folder / f"part-{rank}"
    part.write_text(json.dumps(cause | {"traceback": traceback.format_exc()}))
    part.rename(folder / f"cause-{rank}")


def failure(failures: dict, board: Board, verdict: tuple[int, str] | None, folder: Path) -> DaxError:
    """The first cause: a rank found hung; a rank that a signal killed; else the rank that raised first."""
    causes = {int(path.name.removeprefix("cause-")): json.loads(path.read_text()) for path in folder.glob("cause-*")}
    killed = {
        rank: signal.Signals(-found.exitcode).name
        for rank, found in failures.items()
        if found.exitcode < 0 and found.exitcode != -signal.SIGTERM and rank not in causes
    }

    def stage(rank: int) -> str:
        entry = board.read(rank)
        return f"during {entry.stage}" if entry else "before it began"

    if verdict:
        rank, said = verdict
        return DaxError("rank_failed", f"rank {rank} {said}: all {board.count} ranks ended")
    if killed:
        rank = min(killed)
        return DaxError(
            "rank_failed", f"rank {rank} killed by {killed[rank]} {stage(rank)}: all {board.count} ranks ended"
        )
    gone = [rank for rank in range(board.count) if rank not in causes and not alive(board.read(rank))]
    if causes:
        rank = min(causes, key=lambda rank: (causes[rank]["echo"], causes[rank]["at"]))
        cause = causes[rank]
        if gone and cause["echo"]:  # with another cause they are gone because the agent ended them
            return DaxError("rank_failed", f"rank {gone[0]} vanished {stage(gone[0])}: all {board.count} ranks ended")
        if cause["told"]:
            return DaxError(cause["code"], cause["said"])
        error = DaxError("rank_failed", f"rank {rank}, {stage(rank)}: {cause['said']}")
        error.add_note(cause["traceback"])  # which -v shows
        return error
    rank, found = min(failures.items())
    return DaxError("rank_failed", f"rank {rank} ended with exit code {found.exitcode} {stage(rank)}")


def alive(entry) -> bool:
    """Whether the process of a board's entry is there; one that has not begun counts as such."""
    return entry is None or entry.stage == "done" or process_exists(entry.pid)


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process has such a number
        return False
    except OSError:  # somebody else's
        return True
    return True


class Watch:
    """A thread that looks at the board and kills the rank that holds the others up. `tell` gets the line about it.

    nodes   the other machines, where there are any: a rank of theirs is theirs to kill, and this process ends itself
    """

    def __init__(self, board: Board, tell: Callable[[str], None] = lambda line: None, nodes=None):
        self.board, self.tell, self.nodes = board, tell, nodes
        self.verdict: tuple[int, str] | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self) -> None:
        """What the thread does, until a rank is lost or `stop`."""
        while not self.over.wait(INTERVAL_S):
            self.verdict = self.judged()
            if self.verdict:
                rank, said = self.verdict
                self.tell(f"rank {rank} {said}")
                entry = self.board.read(rank)
                if entry is None or entry.pid <= 0:
                    os._exit(EXIT_CODES["rank_failed"])  # of another machine: whoever waits for it here waits forever
                with suppress(ProcessLookupError):
                    os.kill(entry.pid, signal.SIGKILL)
                return

    def judged(self) -> tuple[int, str] | None:
        """(the rank that is lost or hangs, what to say of it), or None."""
        if self.nodes and (lost := self.nodes.exchange()):
            return lost
        rank = self.board.hung()
        if rank is None:
            return None
        entry = self.board.read(rank)
        return rank, f"hangs: no progress for {time.monotonic() - entry.at:.0f} s during {entry.stage}"

    def stop(self) -> None:
        """This process's ranks are done: tell the other machines so, and look no more."""
        self.over.set()
        self.thread.join()
        if self.nodes:
            with suppress(RuntimeError):  # the others may have gone
                self.nodes.tell()
