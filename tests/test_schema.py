"""docs/schema: every record of a bench that is kept fits, and one that lacks what it takes to repeat it does not."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[1]
BENCH = json.loads((ROOT / "docs" / "schema" / "bench.json").read_text())


def kept() -> dict[str, dict]:
    """{file: record} of what a bench printed under benchmarks/; evidence gathered by hand names no command."""
    read = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks").glob("*.json"))}
    records = {name: record for name, record in read.items() if isinstance(record, dict)}  # the ledger is a list
    return {name: record for name, record in records.items() if {"bench", "command"} <= set(record)}


@pytest.mark.parametrize("name", kept())
def test_every_record_that_is_kept_fits(name):
    jsonschema.Draft202012Validator.check_schema(BENCH)
    jsonschema.validate(kept()[name], BENCH)


@pytest.mark.parametrize("key", ["command", "device", "versions", "date", "rows"])
def test_a_record_that_cannot_be_repeated_does_not_fit(key):
    record = copy.deepcopy(kept()["block.h200.json"])
    del record[key]
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(record, BENCH)


def test_a_bench_run_now_fits(monkeypatch):
    from dax.bench.contest import bench

    monkeypatch.setattr("sys.argv", ["dax", "bench", "block", "--rows", "eager"])
    record = bench("block", "tiny", (64, 64, 5), 1, "eager", [], 0.01, 0.02, "cpu", lambda text: None)
    jsonschema.validate(json.loads(json.dumps(record)), BENCH)
