"""`dax explain`: the resolved plan and what the model costs. The work is in `dax.bench.explain`."""

import json
from typing import Annotated

import typer

from dax.cli import options


def command(
    model: Annotated[str | None, typer.Option(help="a known name or a diffusers folder")] = None,
    plan: options.Plan = None,
    sets: options.Sets = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    steps: options.Steps = None,
    hardware: Annotated[str | None, typer.Option(help="a card by name, such as h200")] = None,
    gpus: Annotated[int, typer.Option(help="also what to expect of that many GPUs")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that one node joins")] = 8,
    strict: options.Strict = False,
    as_json: options.Json = False,
) -> None:
    """Print the resolved plan and where each value came from, what it changes, and FLOPs, bytes, memory and bounds."""
    from dax.bench.explain import explain
    from dax.bench.explain_text import text

    options.say_if_tiny(model)
    result = explain(model, plan, sets or [], (height, width, num_frames), steps, hardware, strict, gpus, gpus_per_node)
    print(json.dumps(result) if as_json else text(result))
