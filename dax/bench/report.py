"""What a bench hands back: one JSON object with everything needed to get the figure again, and a table for people."""

import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata

PACKAGES = ("torch", "triton", "diffusers", "transformers", "sageattention", "flash-attn", "flash-attn-3")


def versions() -> dict[str, str]:
    """{package: version} of what a figure may depend on; packages that are not installed are left out."""
    found = {"python": sys.version.split()[0]}
    for name in ("dax-engine", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """What was typed."""
    return shlex.join(["dax", *sys.argv[1:]])


def record(subject: str, device: str, **figures) -> dict:
    """The JSON object of one bench: where, when, with what, and its figures."""
    import torch

    gpu = device.startswith("cuda")
    return {
        "bench": subject,
        "command": command_line(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "cuda": torch.version.cuda if gpu else None,
        "versions": versions(),
        **figures,
    }


def headline(result: dict) -> str:
    """The line above the table."""
    blocks = f", {result['num_blocks']} blocks" if "num_blocks" in result else ""
    video = (
        f": {result['height']}x{result['width']}x{result['num_frames']} = {result['tokens']} tokens"
        if "tokens" in result
        else ""
    )
    return f"{result['bench']} of {result['model']}{video}{blocks}, on {result['device']}"


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown table of the rows: {key: heading}. Floats in three significant figures and more, None as a dash."""
    cells = [list(columns.values()), *([shown(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def shown(value) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
