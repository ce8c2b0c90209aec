"""`dax calibrate`: a step plan made for one model. The work is in `dax.generate.calibrate`."""

import json
from typing import Annotated

import typer

from dax.cli import options
from dax.cli.options import log


def command(
    output: Annotated[str, typer.Option("-o", "--output", help=".json")] = "calibration.json",
    model: options.Model = None,
    plan: options.Plan = None,
    sets: options.Sets = None,
    prompts: Annotated[
        str | None, typer.Option(help="text file, one a line, # for a comment; half record, half judge")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="use the first so many")] = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    flow_shift: options.FlowShift = None,
    seed: options.Seed = None,
    budget: Annotated[list[float] | None, typer.Option(help="share of forwards to compute; may be repeated")] = None,
    probes: Annotated[int, typer.Option(help="exact runs spent on how errors grow, at most 6")] = 6,
    climb: Annotated[int, typer.Option(help="cached runs of the search, for each budget")] = 40,
    batch: Annotated[int, typer.Option(help="clips at a time")] = 1,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Measure what a step cache needs to know of a model, and write the file that `cache.file` takes."""
    from dax.cache.calibrate import BUDGETS, Effort
    from dax.generate.calibrate import Job, run
    from dax.generate.request import request_fields

    options.say_if_tiny(model)
    given = request_fields(locals())
    effort = Effort(tuple(budget or BUDGETS), probes, climb, batch, seed or 0)
    job = Job(given, output, model, plan, tuple(sets or ()), prompts, num_prompts, effort, device, overwrite)
    found = run(job, log, options.watched(as_json))
    rows = [
        {
            "computed": rung.plan.computed,
            "mask": rung.plan.mask(),
            "predictor": rung.predictor,
            "psnr_db": rung.psnr_db,
            "p10_db": rung.p10_db,
        }
        for rung in found.rungs
    ]
    for row in rows:
        log(f"{row['mask']}  {row['computed']['cond']} steps, {row['predictor']}, {row['psnr_db']:.1f} dB")
    print(json.dumps({"path": output, "rungs": rows, "notes": found.notes}) if as_json else output)
