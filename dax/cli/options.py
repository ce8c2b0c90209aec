"""The flags that several commands share, each written once: what it is called, what it takes, what `--help` says."""

import sys
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option("--model", help="diffusers folder or hub id; default: the tiny Wan")]
Plan = Annotated[str | None, typer.Option("--plan", help="preset or YAML file")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="over --plan, repeated")]
Height = Annotated[int | None, typer.Option("--height", help="pixels")]
Width = Annotated[int | None, typer.Option("--width", help="pixels")]
NumFrames = Annotated[int | None, typer.Option("--num-frames", help="4 n + 1")]
Steps = Annotated[int | None, typer.Option("--steps", help="denoising steps")]
GuidanceScale = Annotated[float | None, typer.Option("--guidance-scale", help="1 or less: no guidance")]
FlowShift = Annotated[float | None, typer.Option("--flow-shift", help="shift of the noise levels")]
NegativePrompt = Annotated[str | None, typer.Option("--negative-prompt", help="what it should not show")]
Seed = Annotated[int | None, typer.Option("--seed", help="default 0; of several prompts each has the next")]
Device = Annotated[str | None, typer.Option("--device", help="cuda or cpu; default: what is there")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output if it exists")]
Strict = Annotated[bool, typer.Option("--strict", help="a fallback is an error")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


def log(text: str) -> None:
    """A line for people, on stderr: stdout carries the result only."""
    print(text, file=sys.stderr, flush=True)


def watched(as_json: bool) -> bool:
    """Whether somebody looks on at a terminal: then a bar may move on stderr."""
    return not as_json and sys.stderr.isatty()


def say_if_tiny(model: str | None) -> None:
    """Nobody shall take the embedded model for theirs."""
    if model is None:
        log("no --model: the embedded tiny Wan, which knows coloured shapes that move")
