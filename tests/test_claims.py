"""The ledger as it stands, and every way a row of it can be wrong."""

import json
import re

import pytest

from dax.bench import claims
from dax.errors import DaxError

GOOD = {
    "id": "block.eager.wan14b-720p.ms",
    "value": 309.3,
    "unit": "ms",
    "hardware": "1 x NVIDIA H200",
    "command": "dax bench block --model wan2.1-t2v-14b --rows eager --json",
    "date": "2026-11-23",
    "versions": {"torch": "2.11.0"},
    "evidence": "benchmarks/block.json",
}


def write(tmp_path, entries):
    folder = tmp_path / "benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / "block.json").write_text("{}")
    (tmp_path / "outside.json").write_text("{}")
    path = folder / "claims.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def test_the_ledger_in_the_repository_is_sound():
    assert isinstance(claims.read(), list)


def test_the_readme_states_only_what_the_ledger_holds():
    readme = (claims.ledger().parents[1] / "README.md").read_text()
    measured = readme.split("## Measured")[1].split("\n## ")[0]
    cells = [line.rstrip("|").rpartition("|")[2] for line in measured.splitlines() if line.startswith("| ")]
    stated = re.findall(r"\d+(?:\.\d+)?", " ".join(cells))
    known = [entry["value"] for entry in claims.read()]
    assert len(stated) >= 5
    for figure in stated:
        digits = len(figure.partition(".")[2])
        assert float(figure) in [round(value, digits) for value in known], figure


def test_the_contract_fixes_35_ids():
    assert len(claims.IDS) == 35


def test_a_good_row_is_read(tmp_path):
    assert claims.read(write(tmp_path, [GOOD])) == [GOOD]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"id": "block.eagre.wan14b-720p.ms"}, "did you mean 'block.eager.wan14b-720p.ms'"),
        ({"value": "309"}, "finite number"),
        ({"value": True}, "finite number"),
        ({"value": float("nan")}, "finite number"),
        ({"id": "tiny.judge_all", "value": 0.95}, "95, not .95"),
        ({"unit": ""}, "unit"),
        ({"command": None}, "command"),
        ({"date": "yesterday"}, "2026-11-24"),
        ({"versions": {}}, "versions"),
        ({"evidence": "benchmarks/gone.json"}, "not a file under benchmarks"),
        ({"evidence": "outside.json"}, "not a file under benchmarks"),
        ({"note": "x"}, "unknown note"),
    ],
)
def test_a_bad_row_is_refused_by_name(tmp_path, change, named):
    with pytest.raises(DaxError, match="row 1") as caught:
        claims.read(write(tmp_path, [GOOD | change]))
    assert named in str(caught.value)


def test_a_missing_part_is_named(tmp_path):
    entry = {key: value for key, value in GOOD.items() if key != "evidence"}
    with pytest.raises(DaxError, match="missing evidence"):
        claims.read(write(tmp_path, [entry]))


@pytest.mark.parametrize("entries", ["{}", "not json", "[1]", [GOOD, GOOD]])
def test_a_broken_ledger_is_refused(tmp_path, entries):
    with pytest.raises(DaxError):
        claims.read(write(tmp_path, entries))


def test_a_missing_ledger_is_refused(tmp_path):
    with pytest.raises(DaxError, match="no such file"):
        claims.read(tmp_path / "claims.json")
