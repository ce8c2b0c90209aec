"""`dax compare`: fidelity and speed of plans, side by side. The work is in `dax.bench.compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dax.cli import options
from dax.cli.options import log
from dax.errors import DaxError


def command(
    plan: Annotated[list[str], typer.Option(help="preset or YAML file; repeat it for each plan")],
    output: Annotated[str, typer.Option("-o", "--output", help="folder of the report")] = "report",
    prompts: Annotated[
        str | None, typer.Option(help="text file, one a line, # for a comment; default: those that ship")
    ] = None,
    model: options.Model = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    flow_shift: options.FlowShift = None,
    negative_prompt: options.NegativePrompt = None,
    seed: options.Seed = None,
    attribute: Annotated[int, typer.Option(help="prompts on which each knob runs alone; 0: none")] = 4,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    strict: options.Strict = False,
    as_json: options.Json = False,
) -> None:
    """Run plans on the same prompts, seeds and noise; report what each costs and saves (HTML, PNG, JSON)."""
    from dax.bench.compare import Job, compare
    from dax.bench.compare_files import check_folder, text, write_report
    from dax.bench.report import command_line
    from dax.generate.request import request_fields

    if not output.strip():
        raise DaxError("bad_request", "-o is empty: name a folder")
    options.say_if_tiny(model)
    given = request_fields(locals())
    folder = Path(output)
    job = Job(tuple(plan), folder, given, prompts, model, attribute, device, strict, command_line())
    comparison, clips = compare(job, log, ready=lambda: check_folder(folder, overwrite))
    path = write_report(folder, comparison, clips)
    log(text(comparison))
    print(json.dumps(comparison.model_dump()) if as_json else path)
