"""`dax doctor`: this machine, the libraries DAX needs, and which attention kernels run here and why others do not."""

import json
from dataclasses import asdict
from importlib import metadata
from typing import Annotated

import typer

from dax.errors import EXIT_CODES

DISTRIBUTION = "dax-engine"


def command(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Print what DAX finds here. Ends with 4 when a required library is missing or too old, otherwise with 0."""
    result = examine()
    print(json.dumps(result, default=str) if as_json else text(result))
    if any(need["problem"] for need in result["requirements"]):
        raise typer.Exit(EXIT_CODES["unsupported"])


def examine() -> dict:
    """machine, requirements, optional packages, and attention: each kernel with None or why it does not run."""
    needs = requirements()
    if any(need["problem"] and need["name"] == "torch" for need in needs):
        return {"machine": {}, "requirements": needs, "optional": {}, "attention": {}}
    from dax.attention import available
    from dax.bench.report import versions
    from dax.hardware import machine

    required = {need["name"] for need in needs}
    return {
        "machine": asdict(machine()),
        "requirements": needs,
        "optional": {name: version for name, version in versions().items() if name not in required},
        "attention": available(),
    }


def requirements() -> list[dict]:
    """Every library DAX is installed with: name, wanted and present version, what is wrong with it or None."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return [{"name": DISTRIBUTION, "wanted": "", "here": None, "problem": "not installed: pip install -e ."}]
    found = []
    for need in map(Requirement, stated):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            here = metadata.version(need.name)
            problem = (
                None if need.specifier.contains(here, prereleases=True) else f"too old: pip install -U {need.name}"
            )
        except metadata.PackageNotFoundError:
            here, problem = None, f"missing: pip install {need.name}"
        found.append({"name": need.name, "wanted": str(need.specifier), "here": here, "problem": problem})
    return found


def text(result: dict) -> str:
    """The object for people."""
    lines = ["machine"]
    told = {name: value for name, value in result["machine"].items() if name != "packages" and value}
    lines += [f"  {name}: {value}" for name, value in told.items()]
    lines += ["libraries"]
    for need in result["requirements"]:
        lines.append(f"  {need['name']} {need['here'] or '-'}" + (f"  ({need['problem']})" if need["problem"] else ""))
    lines += [f"  {name} {version}" for name, version in result["optional"].items()]
    lines += ["attention kernels"]
    lines += [f"  {kernel}: {'no: ' + reason if reason else 'runs'}" for kernel, reason in result["attention"].items()]
    return "\n".join(lines)
