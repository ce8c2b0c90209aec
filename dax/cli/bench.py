"""`dax bench SUBJECT`: figures with their ceilings. The work is in `dax.bench`, a file for each subject."""

import json
from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from dax.cli import options
from dax.cli.options import log
from dax.errors import DaxError, nearest

SIZE, TIMES = ("height", "width", "num_frames"), ("warm_up_s", "timed_s")
COMMON = ("model", *SIZE, "layers", "plan")  # no bench of kernels or of the loop refuses one of these
STACKS = (*COMMON, "rows", "waterfall", *TIMES)
SUBJECTS = {  # and what of the flags each takes, beside --device and --json
    "start": ("model", *SIZE, "plan"),
    "load": ("model", "layers", "plan"),
    "attention": ("model", *SIZE, "tokens", "rows", *TIMES),
    "linear": ("model", *SIZE, "rows", *TIMES),
    "block": STACKS,
    "forward": STACKS,
    "cache": ("plan", "steps", "climb"),
    "step": ("model", *SIZE, *TIMES),
    "video": (*COMMON, "steps"),
    "parallel": (*COMMON, "rows", "gpus", "svg", *TIMES),
    "claims": (),
}
NAMES = {"num_frames": "num-frames", "warm_up_s": "warm-up", "timed_s": "seconds", "as_json": "json"}


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
            help="what to time: of block and forward rivals, as eager,fa3,sage; of attention kernels and passes; of "
            "linear int8,fp8,bf16; of parallel ways,auto,link,vae,clip"
        ),
    ] = None,
    plan: Annotated[list[str] | None, typer.Option(help="of DAX; block and forward time several, repeated")] = None,
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
    check(**locals())
    if subject == "claims":
        from dax.bench import claims, report

        entries = claims.read()
        print(json.dumps(entries) if as_json else report.table(entries, claims.COLUMNS))
        return

    if svg and ("ways" not in (rows or "ways") or not svg.absolute().parent.is_dir()):
        raise DaxError("bad_request", f"--svg {svg}: bench parallel draws its ways, into a folder that is there")
    if subject in ("attention", "linear", "block", "forward", "video"):
        from dax.hardware import machine

        if machine(device).device == "cpu":
            smaller = "--height, --width, --num-frames" + " and --layers" * ("layers" in SUBJECTS[subject])
            log(f"no GPU: a CPU is slow at real sizes; {smaller} make them smaller")
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


def check(subject: str, plan: list[str] | None, **typed) -> None:
    """DaxError("bad_request") for an unknown subject, or a flag that it would not read; one of COMMON is named only."""
    if subject not in SUBJECTS:
        raise DaxError("bad_request", f"bench: unknown subject {subject!r}{nearest(subject, SUBJECTS)}")
    takes, usual, unread = (*SUBJECTS[subject], "device", "as_json"), signature(command).parameters, {}
    for name, value in {"plan": plan or None, **typed}.items():
        if name not in takes and value != usual[name].default:
            known = ", ".join(f"--{NAMES.get(each, each)}" for each in takes)
            unread[name] = f"bench {subject} takes no --{NAMES.get(name, name)}, but {known}"
    if len(plan or ()) > 1 and "plan" in takes and "waterfall" not in takes:
        unread["plan"] = f"bench {subject} takes one --plan at a time, not {' and '.join(plan)}"
    for name, said in unread.items():
        if subject not in ("attention", "linear", "video") or name not in COMMON:
            raise DaxError("bad_request", said)
        log(said)
