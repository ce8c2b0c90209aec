"""`dax inspect`: the settings a clip was made with, as the clip itself tells them."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    clip: Annotated[str, typer.Argument(help=".mp4, .npz or .png written by dax")],
    as_json: Annotated[bool, typer.Option("--json", help="on one line")] = False,
) -> None:
    """Print the record of a clip, the object of `dax generate --json`."""
    from dax.generate.video import read_record

    print(json.dumps(read_record(Path(clip)), indent=None if as_json else 2, ensure_ascii=False))
