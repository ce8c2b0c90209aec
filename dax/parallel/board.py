"""Where every rank is: one small shared file, a slot for each, that says stage, time and number of exchanges started.

The process that started the ranks reads it to name the rank that died or hangs, and what it was doing. Times are of the
monotonic clock, which all processes of a machine share and which nobody can set.
"""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATH, COUNT = "DAX_BOARD", "DAX_RANKS"  # of the environment, where somebody looks at a board
SLOT = 1024
HEAD = struct.Struct("<ddqqi")  # time of the last progress, patience, exchanges started, pid, bytes of text
LOADING_S = 1800.0  # patience with what happens once: loading, compiling, the first step


@dataclass(frozen=True)
class Entry:
    """What a rank last said. `at` and `patience_s`: after that many seconds without progress it counts as hung."""

    at: float
    patience_s: float
    exchanges: int
    pid: int
    stage: str


class Board:
    """The shared file of `count` ranks. A rank that gives its number may write its own slot."""

    def __init__(self, path: Path, count: int, rank: int | None = None):
        self.count, self.rank, self.exchanges, self.stage, self.patience_s = count, rank, 0, "start", LOADING_S
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(handle, count * SLOT)
        self.memory = mmap.mmap(handle, count * SLOT)
        os.close(handle)
        if rank is not None:
            self.write()

    def enter(self, stage: str, patience_s: float = LOADING_S) -> None:
        """This rank begins a stage that makes progress at least every so many seconds."""
        self.stage, self.patience_s = stage, patience_s
        self.write()

    def tick(self) -> None:
        """This rank starts an exchange."""
        self.exchanges += 1
        self.write()

    def write(self) -> None:
        self.put(self.rank, Entry(time.monotonic(), self.patience_s, self.exchanges, os.getpid(), self.stage))

    def put(self, rank: int, entry: Entry) -> None:
        """Write a rank's slot."""
        text = entry.stage.encode()[: SLOT - HEAD.size]
        head = HEAD.pack(entry.at, entry.patience_s, entry.exchanges, entry.pid, len(text))
        start = rank * SLOT
        self.memory[start : start + HEAD.size + len(text)] = head + text

    def read(self, rank: int) -> Entry | None:
        """What a rank last said; None if it has not begun."""
        start = rank * SLOT
        at, patience_s, exchanges, pid, length = HEAD.unpack_from(self.memory, start)
        text = self.memory[start + HEAD.size : start + HEAD.size + length].decode(errors="replace")
        return Entry(at, patience_s, exchanges, pid, text) if pid else None

    def hung(self) -> int | None:
        """The rank that holds the others up, once no rank has made progress for longer than it may take; else None.

        The others wait in an exchange that this one has not started.
        """
        entries = {rank: entry for rank in range(self.count) if (entry := self.read(rank))}
        if len(entries) < self.count:
            return None
        now = time.monotonic()
        if any(now - entry.at <= entry.patience_s for entry in entries.values()):
            return None
        return min(entries, key=lambda rank: (entries[rank].exchanges, entries[rank].at))


@cache
def mine() -> Board | None:
    """This rank's board; None where nobody looks at one."""
    if PATH not in os.environ:
        return None
    return Board(Path(os.environ[PATH]), int(os.environ[COUNT]), int(os.environ["RANK"]))
