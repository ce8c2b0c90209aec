"""Several machines: each node's first rank tells the others where its ranks are, through torch.distributed's own store.

What is heard is written into this node's board as if those ranks had written it there, so that one rule finds the rank
that hangs, wherever it runs. A node that falls silent for SILENT_S before it is done is lost; one that never spoke has
not joined, which the rendezvous waits for.
"""

import json
import time

from dax.parallel.board import Board, Entry

SILENT_S = 10.0
ELSEWHERE = -1  # the process id of a rank on another machine: never one to send a signal to


class Nodes:
    """This node, number `node` of `count`, whose ranks are `own`, the first of them this process.

    board   of this process;  store  of torch.distributed, for the one thread that uses this alone
    """

    def __init__(self, board: Board, store, node: int, count: int, own: range):
        self.board, self.store, self.node, self.count, self.own = board, store, node, count, own
        self.beat = 0
        self.heard: dict[int, tuple[float, dict]] = {}  # node: when it last said something new, and what

    def exchange(self) -> tuple[int, str] | None:
        """Tell and hear, once. (a rank, what is wrong) when a whole node is lost, else None."""
        if self.board.stage == "done":  # whoever leaves now may
            return None
        try:
            self.tell()
            for node in range(self.count):
                if node != self.node and self.store.check([f"node/{node}"]):
                    self.hear(node, json.loads(self.store.get(f"node/{node}")))
        except RuntimeError as error:  # torch's errors of stores are
            return 0, f"and its node are lost: {next(iter(str(error).splitlines()), 'no answer')}"
        return self.lost()

    def tell(self) -> None:
        """Where this node's ranks are."""
        self.beat += 1
        entries = {rank: entry for rank in self.own if (entry := self.board.read(rank))}
        ranks = {rank: [entry.at, entry.patience_s, entry.exchanges, entry.stage] for rank, entry in entries.items()}
        self.store.set(f"node/{self.node}", json.dumps({"beat": self.beat, "ranks": ranks}))

    def hear(self, node: int, said: dict) -> None:
        """Write what is new into the board. Clocks of two machines differ: progress counts from when it is heard of."""
        now, (_, before) = time.monotonic(), self.heard.get(node, (0.0, {"beat": None, "ranks": {}}))
        if said["beat"] == before["beat"]:
            return
        self.heard[node] = now, said
        for rank, (at, patience_s, exchanges, stage) in said["ranks"].items():
            if before["ranks"].get(rank, [None])[0] != at:
                self.board.put(int(rank), Entry(now, patience_s, exchanges, ELSEWHERE, stage))

    def lost(self) -> tuple[int, str] | None:
        """The first rank of a node that fell silent before it was done, and since when."""
        for at, said in self.heard.values():
            silent = time.monotonic() - at
            (rank, (_, _, _, stage)), *_ = said["ranks"].items()
            if silent > SILENT_S and stage != "done":
                return int(rank), f"and its node are lost: silent for {silent:.0f} s, last seen during {stage}"
        return None
