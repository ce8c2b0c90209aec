"""`dax bench start`: from the start of a process to the first block's output, kernel cache empty and warm.

A child process does what `dax generate` does up to there, with one block of random weights, and tells when each part
was done by the clock that all processes of a machine share. What it does afterwards, its exit, is not counted. The last
row is a script that imports diffusers as scripts do, without `dax.imports` and without a GPU begun beside.
"""

import importlib.util
import os
import tempfile
import time
from dataclasses import astuple

from dax.bench import report
from dax.bench.child import answer
from dax.bench.model import facts_of
from dax.bench.size import checked_size, named

PARTS = {
    "python_s": "python",  # until the first line runs
    "torch_s": "import torch",
    "diffusers_s": "diffusers",  # and the classes of the model
    "dax_s": "dax",
    "device_s": "device",  # the first tensor: what is left of the wait for the GPU's context
    "weights_s": "weights",  # one block of random ones and its inputs
    "optimize_s": "optimize",  # kernels compiled or loaded, checks, 8 bits
    "first_s": "first call",
}
COLUMNS = {"cache": "kernel cache", "imports": "imports", "seconds": "s", **PARTS}
ROWS = (("empty", "dax"), ("warm", "dax"), ("warm", "plain"))
CHILD = """
import time
spent, last = {}, float(__import__("sys").argv[1])
def mark(part):
    global last
    now = time.monotonic()
    spent[part], last = spent.get(part, 0.0) + now - last, now

mark("python_s")
import json, sys
from contextlib import nullcontext
from dax.imports import importing
imports, model, plan, device, *size = sys.argv[2:]
with importing() if imports == "dax" else nullcontext():
    import torch
    mark("torch_s")
    from dax.bench.model import build, facts_of
    from dax.generate.stages import import_vendor
    facts = facts_of(model)
    mark("dax_s")
    if imports == "dax":
        import_vendor(facts, device)
    else:
        import diffusers
        getattr(diffusers, facts.transformer_class), getattr(diffusers, facts.pipeline_class)
    mark("diffusers_s")
    import dax.optimize, dax.models.wan_guard, dax.attention.self_check, dax.quant
    from dax.bench.block import calls_of
    from dax.bench.size import Size
    mark("dax_s")
torch.zeros(1, device=device).item()
mark("device_s")
transformer = build(facts, None, device, 1)
call = calls_of(facts, transformer, Size(*map(int, size)), device)[0](transformer)
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
wait()
mark("weights_s")
dax.optimize(transformer, plan, linear={"keep_original": "none"})
wait()
mark("optimize_s")
with torch.no_grad():
    assert call().isfinite().all(), "the block's output is not finite"
mark("first_s")
print(json.dumps(spent))
"""


def bench(model: str | None, size, plan: str, device: str | None, log=print) -> dict:
    """The record of starts under a plan; the parts of a row, in seconds, add up to its `seconds`."""
    from dax.hardware import machine

    facts, device = facts_of(model or "tiny"), machine(device).device
    pixels = checked_size(facts, size)
    rows, compiled = [], bytecode()
    if not compiled:
        log("torch has no bytecode here: every import compiles its sources (is PYTHONDONTWRITEBYTECODE set?)")
    with tempfile.TemporaryDirectory() as cache:
        for name, imports in ROWS:
            spent = started([imports, model or "tiny", plan, device, *map(str, astuple(pixels))], cache)
            rows.append({"cache": name, "imports": imports, **spent})
            log(f"{name} cache, {imports} imports: {spent['seconds']:.1f} s")
    return report.record("start", device, **named(facts, pixels), plan=plan, bytecode=compiled, rows=rows)


def bytecode() -> bool:
    """Whether torch's modules lie compiled beside their sources, as pip leaves them."""
    return os.path.exists(importlib.util.find_spec("torch").cached)


def started(arguments: list[str], cache: str) -> dict[str, float]:
    """Start one process: {part: seconds}, and `seconds` from before it was started to the output of its block."""
    spent = answer("start", CHILD, [repr(time.monotonic()), *arguments], TRITON_CACHE_DIR=cache)
    return {"seconds": sum(spent.values()), **spent}
