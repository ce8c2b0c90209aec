"""`dax bench start`: from the start of a process to the first block, with an empty kernel cache and with a warm one.

A child process imports DAX, builds one block of random weights, optimizes it and runs it once; this process times it.
"""

import os
import subprocess
import sys
import tempfile
import time

from dax.bench import report
from dax.bench.model import facts_of
from dax.bench.size import checked_size
from dax.errors import DaxError

COLUMNS = {
    "cache": "kernel cache",
    "seconds": "s",
    "imports_s": "imports s",
    "build_s": "build s",
    "first_s": "first s",
}
CHILD = """
import sys, time
start = time.perf_counter()
import torch, diffusers, dax
from dax.bench.block import calls_of
from dax.bench.model import build, facts_of
from dax.bench.size import Size
model, plan, device, *size = sys.argv[1:]
facts, size = facts_of(model), Size(*map(int, size))
imported = time.perf_counter()
transformer = build(facts, None, device, 1)
dax.optimize(transformer, plan, linear={"keep_original": "none"})
call = calls_of(facts, transformer, size, device)[0](transformer)
built = time.perf_counter()
with torch.no_grad():
    assert call().isfinite().all()
print(imported - start, built - imported, time.perf_counter() - built)
"""


def bench(model: str | None, size, plan: str, device: str | None, log=print) -> dict:
    """The record of a cold and of a warm start under a plan; `seconds` count from the start of the process."""
    from dataclasses import astuple

    from dax.hardware import machine

    facts, device = facts_of(model or "tiny"), machine(device).device
    pixels = checked_size(facts, size)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        for name in ("empty", "warm"):
            arguments = [facts.name, plan, device, *map(str, astuple(pixels))]
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise DaxError("check_failed", f"bench start: {done.stderr.strip().splitlines()[-1]}")
            parts = dict(zip(("imports_s", "build_s", "first_s"), map(float, done.stdout.split()[-3:])))
            rows.append({"cache": name, "seconds": seconds, **parts})
            log(f"{name} cache: {seconds:.1f} s")
    height, width, num_frames = astuple(pixels)
    named = {"model": facts.name, "height": height, "width": width, "num_frames": num_frames, "plan": plan}
    return report.record("start", device, **named, tokens=facts.tokens(height, width, num_frames), rows=rows)
