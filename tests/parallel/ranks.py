"""Ranks for tests: started once per session; each task runs on all of them inside a gloo group and gives its answers.

Tasks are functions of a module, called on every rank with the same arguments. A failing rank fails the test with its
traceback. The processes are forked from one that has imported what they need, so that eight cost no more than one.
"""

import tempfile
import traceback
from multiprocessing.connection import wait

import torch.multiprocessing as mp


class Ranks:
    """`count` processes that wait for tasks."""

    def __init__(self, count: int, timeout_s: float = 20):
        self.count, self.timeout_s = count, timeout_s
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.preload"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            args = (rank, count, f"{self.folder.name}/store", theirs)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, task, *args):
        """task(*args) on every rank; returns the list of what they return. Raises the first failure."""
        for pipe in self.pipes:
            pipe.send((task, args))
        answers = {}
        while len(answers) < self.count:
            waiting = [pipe for pipe in self.pipes if pipe not in answers]
            failed = any(not good for good, _ in answers.values())
            ready = wait(waiting, 1 if failed else self.timeout_s)
            if not ready:  # the others may wait for a failed rank forever
                self.close()
                break
            answers |= {pipe: pipe.recv() for pipe in ready}
        failures = [answer for good, answer in answers.values() if not good]
        if failures or len(answers) < self.count:
            raise AssertionError("\n".join(failures) or f"{self.count - len(answers)} ranks do not answer")
        return [answers[pipe][1] for pipe in self.pipes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


def serve(rank: int, count: int, store: str, pipe) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        try:
            task, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, task(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
