"""`dax tune`: the cheapest plan of a stated fidelity, or the truest within a time. The work is in `dax.tune.run`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dax.cli import options
from dax.cli.options import log


def command(
    min_psnr: Annotated[
        float | None,
        typer.Option(help="dB against exact: the mean over prompts must hold it, p10 at most 3 dB under"),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="of the denoising loop: the plan's share of exact's work x the seconds exact's loop takes here"
        ),
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", help=".yaml")] = "plan.yaml",
    model: options.Model = None,
    prompts: Annotated[str | None, typer.Option(help="text file, one a line, # for a comment, to tune on")] = None,
    held_out: Annotated[str | None, typer.Option(help="text file of other prompts, to verify on")] = None,
    calibration: Annotated[str, typer.Option(help="file of dax calibrate; auto: the one that ships")] = "auto",
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    flow_shift: options.FlowShift = None,
    seed: options.Seed = None,
    few: Annotated[int, typer.Option(help="prompts on which each setting is measured alone")] = 3,
    max_runs: Annotated[int, typer.Option(help="combinations that are run on all prompts")] = 10,
    presets: Annotated[bool, typer.Option("--presets", help="measure the presets on the held-out prompts too")] = False,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Search attention, linears, step cache and guidance for the cheapest plan that holds a fidelity (--min-psnr), the
    truest within a time (--max-seconds), or the cheapest that holds both.
    """
    from dax.bench.report import command_line, table
    from dax.generate.request import request_fields
    from dax.tune.job import Job
    from dax.tune.run import tune

    options.say_if_tiny(model)
    given = request_fields(locals())
    job = Job(
        min_psnr, Path(output), given, model, prompts, held_out, calibration, few, max_runs, device, overwrite,
        command_line(), max_seconds, presets,
    )  # fmt: skip
    found = tune(job, log)
    rows = [{"plan": p.name, "cost": 100 * p.cost, "psnr": p.psnr_db, "p10": p.p10_db} for p in found.front]
    log(table(rows, {"plan": "on the front", "cost": "% of exact's work", "psnr": "PSNR dB", "p10": "p10"}))
    held = found.measured
    log(
        f"{output}: {found.point.name}, {100 * held.cost:.0f} % of exact's work, {held.seconds:.3g} s, "
        f"{held.psnr_db:.1f} dB (p10 {held.psnr_p10_db:.1f}) on {held.prompts} held-out prompts"
    )
    for name, preset in found.presets.items():
        word = "holds" if preset["holds"] else "does not hold"
        log(
            f"{name} {word} that: {100 * preset['cost']:.0f} % of exact's work, {preset['psnr_db']:.1f} dB "
            f"(p10 {preset['p10_db']:.1f})"
        )
    if found.speedup:
        log(f"{found.speedup:.2f} times cheaper than the cheapest preset that holds it")
    record = {"path": output, "plan": found.plan.model_dump(), "measured": held.model_dump(), "front": rows}
    record |= {"presets": found.presets, "speedup_over_preset": found.speedup} if found.presets else {}
    print(json.dumps(record | {"sensitivity": found.errors, "left_out": found.left_out}) if as_json else output)
