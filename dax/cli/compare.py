"""`dax compare`: fidelity and speed of plans, side by side. The work is in `dax.bench.compare`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dax.errors import DaxError


def command(
    plan: Annotated[list[str], typer.Option(help="preset or YAML file; repeat it for each plan")],
    output: Annotated[str, typer.Option("-o", "--output", help="folder of the report")] = "report",
    prompts: Annotated[str | None, typer.Option(help="text file, one a line; default: eight for the model")] = None,
    model: Annotated[
        str | None, typer.Option(help="diffusers folder or hub id; default: the embedded tiny Wan")
    ] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4 n + 1")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 or less: no guidance")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="shift of the noise levels")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what it should not show")] = None,
    seed: Annotated[int | None, typer.Option(help="of the first prompt; the next ones count on")] = None,
    attribute: Annotated[int, typer.Option(help="prompts on which each knob runs alone; 0: none")] = 4,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: what is there")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the report of the folder")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="a fallback is an error")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report's record on stdout")] = False,
) -> None:
    """Run plans on the same prompts, seeds and noise; report what each costs and saves (HTML, PNG, JSON)."""
    from dax.bench.compare import Job, compare
    from dax.bench.compare_files import check_folder, text, write_report
    from dax.bench.report import command_line

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if not output.strip():
        raise DaxError("bad_request", "-o is empty: name a folder")
    if model is None:
        log("no --model: the embedded tiny Wan")
    given = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "flow_shift": flow_shift,
        "negative_prompt": negative_prompt,
        "seed": seed,
    }
    folder = Path(output)
    job = Job(tuple(plan), folder, given, prompts, model, attribute, device, strict, command_line())
    comparison, clips = compare(job, log, ready=lambda: check_folder(folder, overwrite))
    path = write_report(folder, comparison, clips)
    log(text(comparison))
    print(json.dumps(comparison.model_dump()) if as_json else path)
