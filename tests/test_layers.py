"""The one rule of the house: imports point down, and the front door needs neither torch nor diffusers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dax

DOORS = ("dax.quant.diffusers",)  # to a place of diffusers' that takes classes of ours; no model class
PACKAGE = Path(dax.__file__).parent
LAYERS = {
    **dict.fromkeys(
        ("plan", "plan_file", "provenance", "facts", "facts_config", "edits", "hardware", "errors", "imports"), 0
    ),
    "kernels": 1,
    **dict.fromkeys(("attention", "quant", "cache", "parallel", "compile", "offload"), 2),
    "models": 3,
    **dict.fromkeys(("resolve", "optimize"), 4),
    **dict.fromkeys(("bench", "tune", "generate"), 5),
    **dict.fromkeys(("cli", "__main__"), 6),
}


def imports(source: str, module: str) -> set[str]:
    """Every absolute module that `module` ("dax.a.b") imports, at its top or anywhere inside."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "dax" else {base}
    return found


def violations(source: str, module: str) -> list[str]:
    own = module.split(".")[1]
    found = []
    for name in imports(source, module):
        top, _, rest = name.partition(".")
        if top in ("diffusers", "transformers") and LAYERS[own] < 3 and module not in DOORS:
            found.append(f"{module} (layer {LAYERS[own]}) imports {top}")
        if top != "dax" or not rest or rest.startswith("__") or rest.split(".")[0] == own:
            continue
        other = rest.split(".")[0]
        if other not in LAYERS:
            found.append(f"{module} imports dax.{other}, which has no layer")
        elif LAYERS[other] > LAYERS[own] or LAYERS[other] == LAYERS[own] == 2:
            found.append(f"{module} (layer {LAYERS[own]}) imports dax.{other} (layer {LAYERS[other]})")
    return found


def modules() -> list:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found.append(pytest.param(path, ".".join(("dax", *parts)), id="/".join(parts)))
    return found


@pytest.mark.parametrize(("path", "module"), modules())
def test_imports_point_down(path, module):
    assert module.split(".")[1] in LAYERS, f"{module}: give it a layer"
    assert violations(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from dax.optimize import resolve", "dax.attention.backend"),
        ("import dax.cli.main", "dax.plan"),
        ("def f():\n    from dax import models", "dax.kernels.rope"),
        ("from ..quant import linear", "dax.attention.dense"),
        ("from diffusers import WanPipeline", "dax.compile"),
        ("import dax.whatever", "dax.generate.run"),
    ],
)
def test_a_wrong_import_is_seen(source, module):
    assert len(violations(source, module)) == 1


def test_the_page_lists_every_file():
    """docs/structure.md: a line begins with a file, and may name others of its folder after semicolons."""
    listed = set()
    for line in (PACKAGE.parent / "docs" / "structure.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"    dax/((?:\w+/)*)(\w+\.py) ", line):
            listed |= {found[1] + name for name in (found[2], *re.findall(r";  (\w+\.py)  ", line))}
    there = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    named = {
        name for name in there if not name.endswith(("__init__.py", "__main__.py")) and not name.startswith("cli/")
    }
    assert named - listed == set(), "not on the page"
    assert listed - there == set(), "on the page alone"


def test_front_door_needs_no_torch():
    code = (
        "import sys, dax; dir(dax); dax.Plan(); dax.DaxError; dax.optimize; dax.attention\n"
        "import dax.facts, dax.hardware, dax.edits, dax.compile, dax.imports, dax.models.tiny\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names():
    assert set(dax.__all__) <= set(dir(dax))
    for name in dax.__all__:
        assert getattr(dax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        dax.optimise  # noqa: B018


def test_optimize_is_one_name():
    from dax.optimize import optimize, resolve

    assert callable(dax.optimize) and dax.optimize.optimize is optimize and dax.optimize.resolve is resolve
