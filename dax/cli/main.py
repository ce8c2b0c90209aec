"""The command `dax`: its commands, and how every failure ends in one line and an exit code.

Nothing heavy is imported here: `dax --help` must answer before torch could be loaded.
"""

import os
import signal
import sys
import threading
import time
import traceback

import typer

from dax.cli import bench, calibrate, compare, doctor, explain, generate, inspect, tune
from dax.errors import EXIT_CODES, DaxError

SIGNALS = signal.SIGINT, signal.SIGTERM
TOGETHER_S = 0.3  # two within that are one: `timeout` sends the process its signal, and then the whole group

app = typer.Typer(
    name="dax",
    help="Diffusion Accelerated eXecution: run diffusion transformers faster, and know what it cost.",
    epilog="With any command: -v, --verbose shows where an error comes from.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
for module in (generate, explain, compare, calibrate, tune, bench, inspect, doctor):
    app.command(module.__name__.rpartition(".")[2])(module.command)


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program stands, so that temporary files are removed on the way out."""

    def __init__(self, number: int):
        self.exit_code = 128 + number
        self.word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with the exit code of dax/errors.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = any(word in ("-v", "--verbose") for word in arguments)
    arguments = [word for word in arguments if word not in ("-v", "--verbose")] or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    listen()
    # torch's threads would spin while they wait for each other: on a busy machine that costs several times the time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command = typer.main.get_command(app)
        with command.make_context("dax", arguments) as context:
            command.invoke(context)
        code = 0
        sys.stdout.flush()
    except BaseException as error:
        if verbose and not isinstance(error, SystemExit | typer.Exit):
            traceback.print_exc()
        code, line = ending(error)
        if line:
            print(f"dax: {line}", file=sys.stderr)
    if code == BROKEN_PIPE:  # nobody reads: keep the interpreter from trying again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


BROKEN_PIPE = 128 + signal.SIGPIPE


def ending(error: BaseException) -> tuple[int, str]:
    """(exit code, one line for stderr or "") of whatever ended a command.

    The parser's errors are told by their names: which package they come from differs between versions of typer.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, DaxError):
        return error.exit_code, one_line(str(error))
    if isinstance(error, Stopped):
        return error.exit_code, error.word
    if isinstance(error, typer.Exit):
        return error.exit_code, ""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, ""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, ""
    if "UsageError" in kinds:
        context = getattr(error, "ctx", None)
        command = context.command_path.removeprefix("dax").strip() if context else ""
        return EXIT_CODES["bad_request"], (f"{command}: " if command else "") + one_line(error.format_message())
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return EXIT_CODES["bug"], f"bug at {place}: {type(error).__name__}: {one_line(str(error))} (-v shows where)"


def one_line(text: str) -> str:
    return " ".join(text.split())


def listen() -> None:
    """SIGINT and SIGTERM unwind the program once; a second one ends it at once, inside a long operation too."""

    def on_signal(number, frame):
        for caught in SIGNALS:
            signal.signal(caught, lambda number, frame: None)  # the thread hears the second one
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, on_signal)
    heard, said = os.pipe()
    os.set_blocking(said, False)
    signal.set_wakeup_fd(said, warn_on_full_buffer=False)
    threading.Thread(target=end_at_the_second, args=(heard,), daemon=True).start()


def end_at_the_second(heard: int) -> None:
    """Hears of signals as they arrive, whatever the main thread is in, and exits at the second of SIGNALS."""
    first = None
    while True:
        for number in os.read(heard, 64):
            if number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > TOGETHER_S:
                os._exit(128 + number)
