"""`dax bench parallel --gpus N`: one GPU against N. The ranks are started, each part is measured, and checked.

Of several numbers, as in `--gpus 2,4`, each has ranks of its own, one after the other, and every row says its `gpus`.

The ways to share a forward are in parallel_ways.py; the link, the decoder and a whole clip in parallel_parts.py.
"""

from dataclasses import asdict

from dax.bench import report
from dax.bench.model import FEW_BLOCKS, blocks_of, facts_of
from dax.bench.parallel_parts import Job, Part, clip_alone, clip_rows, decode_rows, link_rows
from dax.bench.parallel_ways import COLUMNS, SAME, auto_rows, one_rank, way_rows
from dax.bench.ranks_clock import RanksClock
from dax.bench.rivals import chosen
from dax.bench.size import checked_size, named
from dax.errors import DaxError
from dax.parallel.board import mine
from dax.parallel.join import check_gpus, code_digest, joined, place
from dax.parallel.launch import run_ranks

__all__ = ["COLUMNS", "bench"]
DECODE_SAME = 5e-3  # the VAE's convolutions run in TF32, by whatever algorithm suits the strip
PARTS = {
    "ways": Part(way_rows, one_rank),
    "auto": Part(auto_rows),
    "link": Part(link_rows),
    "vae": Part(decode_rows),
    "clip": Part(clip_rows, clip_alone),
}


def bench(
    model, size, layers, plan, gpus, warm_up_s, timed_s, device=None, log=print, parts: str | None = None, chunks=5
) -> dict:
    """Start the ranks and return the record. DaxError for what cannot be, before they start.

    size    height, width, num_frames; None for the model's own
    layers  blocks to build, FEW_BLOCKS by default
    gpus    how many, or several numbers with commas between: "2,4"
    parts   some of PARTS, with commas between; all by default
    chunks  head chunks of the ways that hide the exchange
    log     hears each figure as it is known, so that a run that is cut short has told something
    Where ranks fail after those of another number have answered, that is what failed, and the record holds the rest.
    """
    import torch

    facts = facts_of(model or "tiny")
    pixels = checked_size(facts, size)
    if facts.control_layers:
        raise DaxError("bad_request", f"bench parallel: {facts.name} takes a control video: dax bench forward knows it")
    if facts.num_experts > 1:
        raise DaxError(
            "bad_request", f"bench parallel: {facts.name} has two experts: wan2.1-t2v-14b is as large as one"
        )
    counts, names = numbers(str(gpus)), chosen(parts, PARTS)
    layers = blocks_of(facts, layers, FEW_BLOCKS)
    check_gpus(max(counts), device, torch.cuda.device_count())
    device = device or "cuda"
    figures, failed = {name: [] for name in ("ways", *names)}, []
    for count in counts:
        log(f"{facts.name}: {layers} of {facts.num_layers} blocks, plan {plan}, on {count} x {device}")
        job = Job(facts, asdict(pixels), layers, plan, count, device, warm_up_s, timed_s, chunks, log)
        try:
            found = run_ranks(measure, (job, names), count)
        except DaxError as error:
            if count == counts[0] or error.code in ("interrupted", "terminated"):
                raise
            failed.append(f"{count} GPUs: {error}")
            break
        failed += [f"{count} GPUs: {wrong}" for wrong in wrong_in(found)]
        for name, rows in found.items():
            figures[name] += [{"gpus": count} | row for row in rows]
    about = {**named(facts, pixels), "num_blocks": layers, "plan": plan, "gpus": counts}
    rows = figures.pop("ways")
    return report.record("parallel", device, **about, failed="; ".join(failed) or None, rows=rows, **figures)


def numbers(text: str) -> list[int]:
    """Of "2,4": [2, 4]. DaxError("bad_request") for what is no list of different numbers from 2 up."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 1 for part in parts):
        raise DaxError("bad_request", f"bench parallel: --gpus {text}: 2 or more, or several numbers as in 2,4")
    counts = [int(part) for part in parts]
    if len(set(counts)) < len(counts):
        raise DaxError("bad_request", f"bench parallel: --gpus {text}: each number once")
    return counts


def wrong_in(figures: dict) -> list[str]:
    """What checks found wrong, a line each. A clip must lie inside the noise floor."""
    limits = {"ways": lambda row: SAME, "vae": lambda row: DECODE_SAME, "clip": lambda row: row["floor"]}
    return [
        f"{row['label']}: error {row['error']:.2g}, limit {limits[part](row):.2g}"
        for part, rows in figures.items()
        for row in rows
        if part in limits and not row["error"] <= limits[part](row)
    ]


def measure(job: Job, names: list[str]) -> dict:
    """What every rank does; rank 0's figures are the record's."""
    import torch

    here = place()
    if job.device == "cuda":
        torch.cuda.set_device(here.local_rank)
    with torch.no_grad():
        before = {name: PARTS[name].alone(job) for name in names}
        with joined(here, job.device, {"code": code_digest()}):
            clock, figures = RanksClock(job.device, job.warm_up_s, job.timed_s, job.log), {}
            for name in names:
                if board := mine():
                    board.enter(f"bench {name}")
                figures[name] = PARTS[name].together(job, clock, before.pop(name))
    return figures
