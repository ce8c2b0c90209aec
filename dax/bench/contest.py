"""One bench, from what was typed to its record: rows are arranged, checked against stock eager, then timed in turns.

A row whose result is off ends the bench: no time is printed beside a wrong answer.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dax.bench import block, forward, report, rivals, roofline
from dax.bench.breakdown import breakdown
from dax.bench.model import FEW_BLOCKS, LOGIT_STD, blocks_of, build, facts_of
from dax.bench.size import checked_size, named
from dax.bench.timing import Timing, measure
from dax.errors import DaxError
from dax.facts import Facts

SUBJECTS = {"block": block, "forward": forward}
COLUMNS = {
    "label": "stack",
    "ms_per_layer": "ms/layer",
    "ceiling_ms_per_layer": "ceiling ms",
    "of_ceiling_pct": "% of ceiling",
    "video_s": "video s",
    "error": "error",
    "first_call_s": "first call s",
    "attention_ms_per_layer": "attention ms",
    "gemm_ms_per_layer": "GEMM ms",
    "elementwise_ms_per_layer": "elementwise ms",
    "peak_gib": "peak GiB",
    "sm_mhz": "SM MHz",
    "watts": "W",
}


@dataclass
class Result:
    """One row, measured. `error` is the relative L2 distance to eager of what the model adds to its input.

    `arrange_s` is what optimize took, quantising included; `kinds` see breakdown.
    """

    row: rivals.Row
    error: float
    arrange_s: float
    first_call_s: float
    peak_gib: float | None
    kinds: dict
    timing: Timing


def bench(
    subject: str,
    model: str | None = None,
    size: tuple[int | None, int | None, int | None] = (None, None, None),
    num_layers: int | None = None,
    rows: str | None = None,
    plans: list[str] | tuple = (),
    warm_up_s: float = 5.0,
    timed_s: float = 5.0,
    device: str | None = None,
    log=print,
    waterfall: bool = False,
) -> dict:
    """Run `block` or `forward` and return its record (see report.record). Everything that can be refused is, first."""
    chosen = rivals.rows_named(rows, list(plans), waterfall)
    if model is None:
        log("no --model: the embedded tiny Wan's shapes")
    facts = facts_of(model or "tiny")
    folder = model if model and Path(model).is_dir() else None
    pixels = checked_size(facts, size)
    about = named(facts, pixels) | {"model": folder or facts.name}
    num_layers = blocks_of(facts, num_layers, FEW_BLOCKS if subject == "block" else None)

    import torch

    from dax.hardware import machine

    here = machine(device)
    device, sheet = here.device, here if here.peak_tflops else None  # a card without a data sheet has no ceiling
    transformer = build(facts, folder, device, num_layers)
    log(f"{facts.name}: {num_layers} of {facts.num_layers} blocks, {about['tokens']} tokens, on {device}")
    calls, origin = SUBJECTS[subject].calls_of(facts, transformer, pixels, device)
    with torch.no_grad():
        results, left_out = run_rows(transformer, calls, origin, chosen, device, warm_up_s, timed_s, log)
    num_blocks, operations_of = facts.cut(num_layers).num_blocks, SUBJECTS[subject].operations_of
    work = [operations_of(facts, pixels, num_layers, *rivals.arithmetic(result.row)) for result in results]
    return report.record(
        subject,
        device,
        **about,
        num_blocks=num_layers,
        weights="folder" if folder else "random",
        method={
            "warm_up_s": warm_up_s,
            "timed_s": timed_s,
            "interleaved": True,
            "logit_std": None if folder else LOGIT_STD,
        },
        rows=[line(result, ops, sheet, facts, num_blocks) for result, ops in zip(results, work)],
        left_out=left_out,
    )


def run_rows(model, calls, origin, rows, device, warm_up_s, timed_s, log) -> tuple[list[Result], dict[str, str]]:
    """Arrange, check and time every row: (results, {row left out: reason}).

    `calls(arranged)` makes a row's call; `origin`, a tensor or 0, is taken off its output before comparing, because a
    residual stream would hide an error. DaxError("check_failed") when a row's result is off.
    """
    import torch

    torch.compiler.reset()
    ready, known, left_out = {}, {}, {}
    with rivals.backends_restored():
        eager, _ = rivals.arrange(model, rivals.RIVALS["eager"], device)
        reference = calls(eager)().float() - origin
        del eager
        for row in rows:
            arrange = partial(rivals.arrange, model, row, device, alone=len(rows) == 1)
            (arranged, reason), arrange_s = waited_for(arrange, device)
            if reason:
                left_out[row.name] = reason
                log(f"left out {row.name}: {reason}")
                continue
            ready[row.name] = call = rivals.choice_kept(calls(arranged))
            known[row.name] = {"row": row, "arrange_s": arrange_s}
            known[row.name] |= checked(row, call, origin, reference, device, log)
        if not ready:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise DaxError("unsupported", f"no row runs here: {reasons}")
        del reference
        kinds = {name: breakdown(call) if device.startswith("cuda") else {} for name, call in ready.items()}
        timings = measure(ready, device, warm_up_s, timed_s, log)
    return [Result(**known[name], kinds=kinds[name], timing=timings[name]) for name in ready], left_out


def checked(row: rivals.Row, call, origin, reference, device: str, log) -> dict:
    """A row's first call beside eager's result: {error, first_call_s, peak_gib}; the peak is None without a GPU.

    DaxError("check_failed") for a result that is off.
    """
    import torch

    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    output, first_call_s = waited_for(call, device)
    peak_gib = (torch.cuda.max_memory_allocated() - reference.nbytes) / 2**30 if gpu else None
    error = relative_error(output.float() - origin, reference)
    log(f"{row.name}: first call {first_call_s:.1f} s, error {error:.4f} (limit {row.limit})")
    if not error <= row.limit:  # so that NaN fails too
        raise DaxError(
            "check_failed", f"{row.name}: result lies {error:.4f} from eager's, limit {row.limit}; not timed"
        )
    return {"error": error, "first_call_s": first_call_s, "peak_gib": peak_gib}


def waited_for(call, device: str) -> tuple:
    """(what a call gives, seconds until the device is done with it)."""
    import torch

    start = time.perf_counter()
    found = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def line(result: Result, operations: list, machine, facts: Facts, num_blocks: int) -> dict:
    """One row of the record. `video_s` is for all layers, both branches of guidance and the model's usual steps."""
    timing = result.timing
    each = timing.ms / num_blocks
    ceiling = 1e3 * roofline.seconds(operations, machine, fused=True) / num_blocks if machine else None
    flops = roofline.total(operations)[0]
    return {
        "row": result.row.name,
        "label": result.row.label,
        "ms_per_layer": each,
        "visits_ms_per_layer": [visit / num_blocks for visit in timing.visits],
        "low_ms_per_layer": timing.low_ms / num_blocks,
        "high_ms_per_layer": timing.high_ms / num_blocks,
        "tflops": flops / timing.ms / 1e9,
        "ceiling_ms_per_layer": ceiling,
        "of_ceiling_pct": 100 * ceiling / each if ceiling else None,
        "video_s": each * facts.num_blocks * 2 * facts.defaults.steps / 1e3,
        "error": result.error,
        "error_limit": result.row.limit,
        "arrange_s": result.arrange_s,
        "first_call_s": result.first_call_s,
        **{f"{kind}_ms_per_layer": parts / num_blocks for kind, parts in result.kinds.items() if kind != "kernels"},
        "ceiling_of_kind_ms_per_layer": {
            kind: 1e3 * roofline.seconds([op for op in operations if op.kind == kind], machine, fused=True) / num_blocks
            for kind in ("attention", "gemm", "elementwise")
        }
        if machine
        else None,
        "kernels": result.kinds.get("kernels"),
        "peak_gib": result.peak_gib,
        "calls": timing.count,
        "timed_s": timing.timed_s,
        **asdict(timing.reading),
    }


def relative_error(output, reference) -> float:
    """||output - reference|| / ||reference||, in fp32."""
    return ((output - reference).norm() / reference.norm()).item()
