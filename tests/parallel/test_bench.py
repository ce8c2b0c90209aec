"""The bench of several GPUs: what it times, and what it makes of the times."""

from functools import partial

import pytest

from dax.bench.parallel import bench, wrong_in
from dax.bench.parallel_ways import ONE, Way, beside_one, line, ways
from dax.errors import DaxError
from dax.facts import FACTS

WAN14 = FACTS["wan2.1-t2v-14b"]


def test_every_way_uses_every_gpu():
    for gpus in (2, 3, 4, 8):
        for way in ways(gpus, chunks=5, eight_bits=True):
            degrees = [way.parallel[name] for name in ("cfg", "ulysses", "rows")]
            assert degrees[0] * degrees[1] * degrees[2] == gpus and way.branches == degrees[0]
    wires = {way.parallel.get("wire") for way in ways(2, 5, eight_bits=False)}
    assert "8bit" not in wires, "only 8-bit attention has 8-bit operands"
    labels = [way.label for way in ways(2, 5, eight_bits=True, window=True) if way.window]
    assert labels[0] == "ulysses 2, serial, window" and labels[3] == "ulysses 2, 5 head chunks, 8-bit wire, window"


def test_a_row_is_what_blocks_add():
    row = line(Way("cfg 2", {}, branches=2), ms=340.0, around_ms=20.0, layers=4, facts=WAN14)
    assert row["ms_per_layer"] == 80 and row["layer_and_branch_ms"] == 40
    assert row["video_s"] == pytest.approx((40 * 40 + 10) * 100 / 1e3)


def test_rows_beside_one_gpu():
    """What is lost is counted from an even share; head chunks are credited against the serial row of the same wire."""
    named = {way.label: way for way in (ONE, *ways(2, 5, eight_bits=True, window=True))}
    times = {ONE.label: 100.0, "ulysses 2, serial": 60.0, "ulysses 2, 5 head chunks": 52.0, "cfg 2": 50.0}
    times |= {"ulysses 2, serial, window": 58.0, "ulysses 2, 5 head chunks, window": 54.0}
    times |= {"ulysses 2, serial, 8-bit wire": 55.0, "ulysses 2, 5 head chunks, 8-bit wire": 51.0}
    rows = [
        {"label": label, "parallel": named[label].parallel, "window": named[label].window, "layer_and_branch_ms": ms}
        for label, ms in times.items()
    ]
    rows = [row | {"ms_per_layer": row["layer_and_branch_ms"]} for row in rows]
    beside_one([*rows, wrong := {"label": "off", "parallel": {}, "error": 1.0}], 2)
    found = {row["label"]: row for row in rows}
    assert found["cfg 2"]["speedup"] == 2.0 and found["cfg 2"]["lost_ms"] == 0
    assert found["ulysses 2, 5 head chunks"]["hidden_pct"] == pytest.approx(80)
    assert found["ulysses 2, 5 head chunks, window"]["hidden_pct"] == pytest.approx(50)
    assert found["ulysses 2, 5 head chunks, 8-bit wire"]["hidden_pct"] == pytest.approx(80)
    assert "speedup" not in wrong


def test_what_is_off_is_told():
    floor = {"label": "tiny clip", "floor": 3e-3}
    assert wrong_in({"ways": [{"label": "a", "error": 0.01}], "clip": [floor | {"error": 2e-3}], "link": [{}]}) is None
    assert "a: error inf, limit 0.03" in wrong_in({"ways": [{"label": "a", "error": float("inf")}]})
    assert "tiny clip: error 0.004, limit 0.003" in wrong_in({"clip": [floor | {"error": 4e-3}]})


def test_two_ranks_from_typing_to_record(tmp_path):
    """The whole bench on two CPU ranks: every way is near one rank, and what was heard on the way is in the record."""
    heard = tmp_path / "heard"
    result = bench("tiny", (64, 64, 33), 1, "balanced", 2, 0.01, 0.01, "cpu", partial(keep, heard), "ways,auto", 2)
    assert len(result["rows"]) == 7 and result["failed"] is None
    assert all(row["speedup"] > 0 for row in result["rows"]) and result["auto"]
    text = heard.read_text()
    assert all(f"{row['label']}: ms/layer" in text for row in result["rows"])


def keep(path, text):
    with path.open("a") as file:
        file.write(text + "\n")


def test_more_gpus_than_there_are():
    with pytest.raises(DaxError, match="64 ranks need 64 GPUs") as caught:
        bench("tiny", (None,) * 3, None, "exact", 64, 0.1, 0.1)
    assert caught.value.exit_code == 4
    with pytest.raises(DaxError, match="--gpus 2 or more"):
        bench("tiny", (None,) * 3, None, "exact", 1, 0.1, 0.1)
    with pytest.raises(DaxError, match="no part 'vea', did you mean 'vae'"):
        bench("tiny", (None,) * 3, None, "exact", 2, 0.1, 0.1, parts="vea")
