"""`dax calibrate`: a step plan made for one model. The work is in `dax.generate.calibrate`."""

import json
import sys
from typing import Annotated

import typer


def command(
    output: Annotated[str, typer.Option("-o", "--output", help=".json")] = "calibration.json",
    model: Annotated[
        str | None, typer.Option(help="diffusers folder or hub id; default: the embedded tiny Wan")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="preset or YAML file whose kernels will run")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value over the plan; may be repeated")] = None,
    prompts: Annotated[str | None, typer.Option(help="file of prompts, one a line; half record, half judge")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="use the first so many")] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4 n + 1")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="above 1")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="shift of the noise levels")] = None,
    seed: Annotated[int | None, typer.Option(help="default 0")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="share of forwards to compute; may be repeated")] = None,
    probes: Annotated[int, typer.Option(help="exact runs spent on how errors grow, at most 6")] = 6,
    climb: Annotated[int, typer.Option(help="cached runs of the search, for each budget")] = 40,
    batch: Annotated[int, typer.Option(help="clips at a time")] = 1,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: what is there")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output if it exists")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the plans as one JSON object on stdout")] = False,
) -> None:
    """Measure what a step cache needs to know of a model, and write the file that `cache.file` takes."""
    from dax.cache.calibrate import BUDGETS, Effort
    from dax.generate.calibrate import Job, run

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if model is None:
        log("no --model: the embedded tiny Wan")
    given = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "flow_shift": flow_shift,
        "seed": seed,
    }
    effort = Effort(tuple(budget or BUDGETS), probes, climb, batch, seed or 0)
    job = Job(given, output, model, plan, tuple(sets or ()), prompts, num_prompts, effort, device, overwrite)
    found = run(job, log)
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
