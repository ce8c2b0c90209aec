"""`dax bench SUBJECT`: figures with their ceilings. The work is in `dax.bench`, a file for each subject."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dax.cli import options
from dax.cli.options import log
from dax.errors import DaxError, nearest

SUBJECTS = ("start", "load", "attention", "linear", "block", "forward", "cache", "step", "video", "parallel", "claims")


def command(
    subject: Annotated[str, typer.Argument(help=", ".join(SUBJECTS))],
    model: Annotated[str | None, typer.Option(help="a known name (random weights) or a diffusers folder")] = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    tokens: Annotated[int | None, typer.Option(help="attention: this many, whatever the video")] = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", "--num-blocks", help="blocks to build (4 for block, all for forward and load)"),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="rivals to time, as in eager,fa3,sage; of linear: int8,fp8,bf16; of parallel: ways,auto,link,vae,clip"
        ),
    ] = None,
    plan: Annotated[list[str] | None, typer.Option(help="also time DAX under this plan; may be repeated")] = None,
    steps: options.Steps = None,
    climb: Annotated[int, typer.Option(help="cached runs of the search for each budget, of cache")] = 40,
    waterfall: Annotated[bool, typer.Option("--waterfall", help="add each plan's techniques one by one")] = False,
    warm_up_s: Annotated[float, typer.Option("--warm-up", help="seconds back to back before each visit")] = 5.0,
    timed_s: Annotated[float, typer.Option("--seconds", help="seconds timed per row, over two visits")] = 5.0,
    gpus: Annotated[str, typer.Option(help="parallel: how many, or several numbers in turn, as in 2,4")] = "2",
    svg: Annotated[Path | None, typer.Option(help="parallel: draw the ways here, measured and predicted")] = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Time random weights at real sizes, DAX and rivals taking turns; print every figure with its ceiling."""
    if subject not in SUBJECTS:
        raise DaxError("bad_request", f"bench: unknown subject {subject!r}{nearest(subject, SUBJECTS)}")
    if subject == "claims":
        from dax.bench import claims, report

        entries = claims.read()
        print(json.dumps(entries) if as_json else report.table(entries, claims.COLUMNS))
        return

    if svg and (subject != "parallel" or "ways" not in (rows or "ways") or not svg.absolute().parent.is_dir()):
        raise DaxError("bad_request", f"--svg {svg}: bench parallel draws its ways, into a folder that is there")
    if subject in ("attention", "linear", "block", "forward", "video"):
        from dax.hardware import machine

        if machine(device).device == "cpu":
            log("no GPU: a CPU is slow at real sizes; --height, --width, --num-frames and --layers make them smaller")
    size = height, width, num_frames
    if subject == "start":
        from dax.bench.start import COLUMNS, bench

        result = bench(model, size, (plan or ["exact"])[0], device, log)
    elif subject == "load":
        from dax.bench.load import COLUMNS, bench

        result = bench(model, layers, (plan or [None])[0], device, log)
    elif subject == "attention":
        from dax.bench.attention import COLUMNS, bench

        result = bench(model, size, rows, warm_up_s, timed_s, device, log, tokens)
    elif subject == "cache":
        from dax.bench.cache import COLUMNS, SHARES, bench
        from dax.cache.calibrate import Effort

        effort = Effort(SHARES, climb=climb, batch=16)
        result = bench(
            (plan or ["exact"])[0], effort, steps=steps, device=device, log=log, bar=options.watched(as_json)
        )
    elif subject == "step":
        from dax.bench.step import COLUMNS, bench

        result = bench(model, size, warm_up_s, timed_s, device)
    elif subject == "video":
        from dax.bench.video import COLUMNS, bench

        result = bench(model, size, (plan or ["fast"])[0], steps, layers, device, log)
    elif subject == "linear":
        from dax.bench.linear import COLUMNS, bench

        result = bench(model, size, warm_up_s, timed_s, device, log, rows)
    elif subject == "parallel":
        from dax.bench.parallel import COLUMNS, bench

        result = bench(model, size, layers, (plan or ["exact"])[0], gpus, warm_up_s, timed_s, device, log, rows)
    else:
        from dax.bench.contest import COLUMNS, bench

        result = bench(
            subject, model, size, layers, rows, plan or [], warm_up_s, timed_s, device, log, waterfall=waterfall
        )
    if as_json:
        print(json.dumps(result))
    else:
        from dax.bench.report import headline, table

        print(headline(result))
        print(table(result["rows"], COLUMNS))
    if svg:
        from dax.bench.compare_cells import write_atomically
        from dax.bench.parallel_plot import drawn

        write_atomically(svg, drawn(result).encode())
    if result.get("failed"):
        raise DaxError("check_failed", result["failed"])
