"""`dax bench load`: what is timed is what was written, read from where the record says."""

import json
from types import SimpleNamespace

import jsonschema
import pytest

from dax.bench import load
from dax.errors import DaxError
from tests.test_schema import BENCH

QUIET = {"device": "cpu", "log": lambda text: None}


@pytest.fixture
def here(monkeypatch):
    """Loads in this process: the same function, without seconds of imports."""
    monkeypatch.setattr(load, "started", lambda arguments: load.loaded(*arguments))


def test_both_are_written_loaded_and_held_to_what_was_written(here, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dax", "bench", "load"])
    result = load.bench("tiny", 2, None, **QUIET)
    jsonschema.validate(json.loads(json.dumps(result)), BENCH)
    plain, codes = result["rows"]
    assert (plain["weights"], codes["weights"], result["num_blocks"]) == ("bf16", "int8", 2)
    assert 0.5 < codes["gib"] / plain["gib"] < 0.8  # of two small blocks; embedders stay as they are
    assert plain["quantise_s"] is None and codes["quantise_s"] > 0
    for row in result["rows"]:
        assert sorted(row["cold_each_s"])[1] == row["cold_s"] and len(row["warm_each_s"]) == 3
        assert row["all_layers_gib"] > row["gib"]
        scale = row["all_layers_gib"] / row["gib"]
        assert row["all_layers_cold_s"] == pytest.approx(scale * row["cold_s"]) and row["warm_s"] > 0
    assert result["cold_ratio"] == pytest.approx(codes["cold_s"] / plain["cold_s"])
    assert "by bytes" in result["method"]["all_layers"]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_bytes_it_extrapolates_to_are_those_of_the_files(here, layers):
    """What check_room and all_layers_gib count by is what save_pretrained writes, headers aside."""
    result = load.bench("tiny", layers, None, **QUIET)
    facts = load.facts_of("tiny").cut(layers)
    for row in result["rows"]:
        on_paper = load.weight_bytes(facts, eight_bits=row["weights"] != "bf16") / load.GiB
        assert row["gib"] == pytest.approx(on_paper, rel=0.02)


def test_a_load_that_ends_with_other_bits_gives_no_time(monkeypatch):
    def damaged(arguments):
        found = load.loaded(*arguments)
        return found | {"warm": found["warm"] | {"digest": "0"}} if arguments[-1] == "int8" else found

    monkeypatch.setattr(load, "started", damaged)
    with pytest.raises(DaxError, match="bench load: int8: what was loaded is not what was written") as caught:
        load.bench("tiny", 1, None, **QUIET)
    assert caught.value.exit_code == 8


def test_a_scale_that_was_cast_changes_the_digest():
    import torch

    from dax import quant

    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    quant.quantize_(model, "int8")
    before = load.digest(model)
    model[0].weight_scale.mul_(1 + 2**-20)
    assert load.digest(model) != before


def test_a_fresh_process_loads_and_says_what_came_from_disk(tmp_path):
    from dax.plan import Linear

    facts = load.facts_of("tiny")
    (_, written), _ = load.write(facts, Linear(scheme="int8"), tmp_path / "bf16", tmp_path / "8bits", "cpu")
    load.forget(tmp_path / "8bits")
    found = load.started([str(tmp_path / "8bits"), "tiny", "cpu", "int8"])
    size = sum(map(load.size_of, load.files_of(tmp_path / "8bits")))
    assert list(found) == ["cold", "warm"]
    for visit in found.values():
        assert visit["digest"] == written and visit["seconds"] > 0
        assert visit["read"] is None or 0 <= visit["read"] < 2 * size  # nothing, where the folder lies in memory


@pytest.mark.parametrize(
    ("layers", "plan", "free", "says"),
    [
        (40, None, 10 * 2**30, r"writes 40.3 GiB to .*, where 10.0 are free: fewer --layers, or TMPDIR"),
        (0, None, 2**50, "--layers 0: wan2.1-t2v-14b has 1 to 40"),
        (41, None, 2**50, "--layers 41"),
        (4, "exact", 2**50, "plan exact quantises nothing"),
        (4, "no-such-plan", 2**50, "unknown plan"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(monkeypatch, layers, plan, free, says):
    monkeypatch.setattr(load, "write", lambda *_: pytest.fail("weights were made"))
    monkeypatch.setattr(load.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(DaxError, match=says):
        load.bench("wan2.1-t2v-14b", layers, plan, **QUIET)


def test_a_child_that_fails_is_named_in_one_line(monkeypatch):
    for does, says in (
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),  # as where memory ran out
    ):
        monkeypatch.setattr(load, "CHILD", does)
        with pytest.raises(DaxError, match=f"bench load: {says}") as caught:
            load.started([])
        assert caught.value.exit_code == 8


def test_a_folder_of_sizes_that_have_no_name(here, random_folder):
    result = load.bench(str(random_folder), 1, None, **QUIET)
    assert result["model"].startswith("wan-t2v-") and [row["weights"] for row in result["rows"]] == ["bf16", "int8"]
