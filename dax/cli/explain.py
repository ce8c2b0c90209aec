"""`dax explain`: the resolved plan and what the model costs. The work is in `dax.bench.explain`."""

import json
import sys
from typing import Annotated

import typer


def command(
    model: Annotated[str | None, typer.Option(help="a known name or a diffusers folder")] = None,
    plan: Annotated[str | None, typer.Option(help="preset or YAML file")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="over --plan, repeated")] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    num_frames: Annotated[int | None, typer.Option(help="frames of the video")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    hardware: Annotated[str | None, typer.Option(help="a card by name, such as h200")] = None,
    gpus: Annotated[int, typer.Option(help="also what to expect of that many GPUs")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that one node joins")] = 8,
    strict: Annotated[bool, typer.Option("--strict", help="a fallback is an error")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Print the resolved plan and where each value came from, what it changes, and FLOPs, bytes, memory and bounds."""
    from dax.bench.explain import explain, text

    if model is None:
        print("no --model: the embedded tiny Wan", file=sys.stderr)
    result = explain(model, plan, sets or [], (height, width, num_frames), steps, hardware, strict, gpus, gpus_per_node)
    print(json.dumps(result) if as_json else text(result))
