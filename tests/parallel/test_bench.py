"""The bench of several GPUs: what it times, and what it makes of the times."""

import json
from functools import partial
from math import isfinite
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dax.bench.parallel import bench, wrong_in
from dax.bench.parallel_parts import clip_ways
from dax.bench.parallel_plot import UPPER, drawn
from dax.bench.parallel_ways import ONE, Way, beside_one, line, ways
from dax.cli.main import main
from dax.errors import DaxError
from dax.facts import FACTS
from dax.hardware import MACHINES
from dax.parallel.cost import cluster_of
from dax.parallel.planner import predictions
from dax.parallel.topology import complete, topologies
from tests.parallel import tasks

WAN14 = FACTS["wan2.1-t2v-14b"]


def test_every_way_uses_every_gpu():
    for gpus in (2, 3, 4, 6, 8):
        for way in ways(gpus, 40, chunks=5, eight_bits=True):
            degrees = [way.parallel[name] for name in ("cfg", "ulysses", "rows")]
            assert degrees[0] * degrees[1] * degrees[2] == gpus and way.branches == degrees[0]
    wires = {way.parallel.get("wire") for way in ways(2, 40, 5, eight_bits=False)}
    assert "8bit" not in wires, "only 8-bit attention has 8-bit operands"
    labels = [way.label for way in ways(2, 40, 5, eight_bits=True, window=True) if way.window]
    assert labels[0] == "ulysses 2, serial, window" and labels[3] == "ulysses 2, 5 head chunks, 8-bit wire, window"
    assert all(way.parallel["ulysses"] <= 3 for way in ways(8, 3, 5, eight_bits=True)), "a rank without a head"


@pytest.mark.parametrize("gpus", [4, 8])
def test_on_more_gpus_the_planners_choice_is_among_the_few_that_are_timed(gpus):
    """What the planner takes first, of two branches and of one."""
    timed = ways(gpus, WAN14.num_heads, 5, eight_bits=True, window=True)
    assert len(timed) == len({way.label for way in timed}) == 10
    half = gpus // 2
    through = "8-bit wire, window"
    assert [way.label for way in timed if "cfg" in way.label] == [
        f"cfg 2 x ulysses {half}, serial, 8-bit wire",
        f"cfg 2 x ulysses {half}, serial, {through}",
        f"cfg 2 x ulysses {half}, 5 head chunks, {through}",
    ]
    cluster = cluster_of(MACHINES["h200"], "int8", "8bit")
    for guided in (True, False):
        found = predictions(WAN14, 75600, topologies(gpus, WAN14.num_heads, guided), cluster, wire_bytes=1)
        chosen = found[0].topology
        assert f"{chosen}" in {"cfg {cfg} x ulysses {ulysses} x rows {rows}".format(**way.parallel) for way in timed}
    assert {way.parallel["rows"] for way in timed} == {1, 2, gpus}
    messages = ways(gpus, WAN14.num_heads, 5, eight_bits=False)
    assert not any(way.window for way in messages) and len(messages) == 8


def test_a_clip_on_any_number_of_gpus_has_ranks_for_all():
    """The tiny model's 3 heads divide few of them: the rest are rows."""
    for gpus in (2, 3, 4, 5, 6, 8):
        found = clip_ways(gpus)
        assert [way["cfg"] for way in found] == ([1, 2] if gpus % 2 == 0 else [1])
        for way in found:
            degrees = {name: way[name] for name in ("cfg", "ulysses", "rows")}
            assert len(complete(degrees, gpus, FACTS["tiny"].num_heads)) == 1
    assert clip_ways(8)[0]["ulysses"] == 2 and clip_ways(6)[1]["ulysses"] == 3


def test_a_row_is_what_blocks_add():
    row = line(Way("cfg 2", {}, branches=2), ms=340.0, around_ms=20.0, layers=4, facts=WAN14)
    assert row["ms_per_layer"] == 80 and row["layer_and_branch_ms"] == 40
    assert row["video_s"] == pytest.approx((40 * 40 + 10) * 100 / 1e3)


def test_rows_beside_one_gpu():
    """What is lost is counted from an even share; head chunks are credited against the serial row of the same wire."""
    named = {way.label: way for way in (ONE, *ways(2, 40, 5, eight_bits=True, window=True))}
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
    assert not wrong_in({"ways": [{"label": "a", "error": 0.01}], "clip": [floor | {"error": 2e-3}], "link": [{}]})
    assert "a: error inf, limit 0.03" in wrong_in({"ways": [{"label": "a", "error": float("inf")}]})
    assert "tiny clip: error 0.004, limit 0.003" in wrong_in({"clip": [floor | {"error": 4e-3}]})


def test_two_ranks_from_typing_to_record(tmp_path):
    """The whole bench on two CPU ranks: every way is near one rank, and what was heard on the way is in the record."""
    heard = tmp_path / "heard"
    result = bench("tiny", (64, 64, 33), 1, "balanced", 2, 0.01, 0.01, "cpu", partial(keep, heard), "ways,auto", 2)
    assert len(result["rows"]) == 7 and result["failed"] is None
    speedups = [row["speedup"] for row in result["rows"]]  # 10 ms each: a block may seem to take less than none
    assert all(map(isfinite, speedups)) and speedups[0] == 1 and result["auto"]
    assert {row["gpus"] for row in result["rows"] + result["auto"]} == {2}
    text = heard.read_text()
    assert all(f"{row['label']}: ms/layer" in text for row in result["rows"])


def test_four_ranks_time_every_way_through_windows_too(ranks):
    """Rows of all ways, each near one rank, and the exchanges of each went as its label says."""
    rows, through = ranks(4).run(tasks.bench_ways)[0]
    window = "8-bit wire, window"
    assert [row["label"] for row in rows] == [
        ONE.label,
        *(
            f"cfg 2 x ulysses 2, {rest}"
            for rest in ("serial, 8-bit wire", f"serial, {window}", f"2 head chunks, {window}")
        ),
        *(f"ulysses 2 x rows 2, {order}, {window}" for order in ("serial", "2 head chunks")),
        *(f"rows 4, {order}, {window}" for order in ("serial", "2 head chunks")),
    ], "the tiny model has 3 heads, too few for ulysses 4"
    assert all(row["error"] < 0.01 and isfinite(row["speedup"]) for row in rows)
    assert through == {row["label"] for row in rows if row["label"].endswith("window")}


@pytest.mark.parametrize("code", ["rank_failed", "interrupted"])
def test_ranks_that_fail_later_leave_what_was_measured(monkeypatch, code):
    """A stop is a stop; all else is told beside the figures of the numbers before."""
    rows = {"ways": [{"label": ONE.label, "parallel": {}, "error": 0.0}]}

    def run(task, args, count):
        if count == 4:
            raise DaxError(code, "rank 2 vanished")
        return rows

    monkeypatch.setattr("dax.bench.parallel.run_ranks", run)
    args = "tiny", (64, 64, 33), 1, "exact", "2,4", 0.01, 0.01, "cpu", lambda text: None, "ways"
    if code == "interrupted":
        with pytest.raises(DaxError, match="vanished"):
            bench(*args)
    else:
        result = bench(*args)
        assert result["failed"] == "4 GPUs: rank 2 vanished" and [row["gpus"] for row in result["rows"]] == [2]
    with pytest.raises(DaxError, match="vanished"):
        bench(*args[:4], "4,2", *args[5:])


def test_the_plot_shows_every_way_once():
    """Each timed way has a dot and, where it was predicted, a bar; nothing leaves the picture or covers other words."""
    rows = [{"gpus": 4, "label": ONE.label, "parallel": {}, "speedup": 1.0}]
    for gpus in (2, 4):
        for index, way in enumerate(ways(gpus, 40, 5, eight_bits=True, window=True)):
            speedup = gpus * (0.9 + 0.005 * index)
            rows.append({"gpus": gpus, "label": way.label, "parallel": way.parallel, "speedup": speedup})
            rows[-1]["predicted"] = speedup + 0.03 if index else None
    about = {"bench": "parallel", "model": "m", "device": "a card & another", "plan": "balanced", "gpus": [2, 4]}
    off = [
        {"label": "off", "parallel": {"cfg": 1}},
        rows[-1] | {"label": "a layer of less than no time", "speedup": -9.0},
    ]
    root = ElementTree.fromstring(drawn(about | {"rows": [*rows, *off]}))
    width, height = (float(root.get(name)) for name in ("width", "height"))
    found = {kind: root.findall(f"{{*}}{kind}") for kind in ("circle", "line", "text")}
    kinds, both = 5, 3 + 4  # kinds in the legend; the fastest of each at 2 and at 4
    assert len(found["circle"]) == 20 + both + kinds + 1
    bars = [line for line in found["line"] if line.get("class").startswith("bar")]
    assert len(bars) == 18 + both + 1
    slow = drawn(about | {"rows": [row | {"predicted": 0.5} for row in rows[1:]]})
    upper = [line for line in ElementTree.fromstring(slow).findall("{*}line") if line.get("class").startswith("bar")]
    assert max(float(bar.get("y1")) for bar in upper[:both]) <= UPPER - 44
    for text in found["text"]:
        assert 0 < float(text.get("x")) < width and 0 < float(text.get("y")) < height
    places = [(text.get("x"), text.get("y")) for text in found["text"]]
    assert len(places) == len(set(places))
    assert sum(text.text in {row["label"] for row in rows[1:]} for text in found["text"]) == 20
    with pytest.raises(DaxError, match="nothing to draw"):
        drawn(about | {"rows": rows[:1]})


def test_a_record_of_one_number_is_drawn_too():
    record = json.loads((Path(__file__).parents[2] / "benchmarks" / "parallel.2xh200.json").read_text())
    assert "2 GPUs" in drawn(record) and "1.949 (1.958)" in drawn(record)


def test_the_plot_is_a_file_beside_the_record(monkeypatch, tmp_path, capsys):
    """From the command line; where it cannot be drawn, the bench does not start."""
    rows = [{"label": "cfg 2", "parallel": {"cfg": 2, "ulysses": 1, "rows": 1}, "error": 0.0, "speedup": 1.9}]
    monkeypatch.setattr("dax.bench.parallel.run_ranks", lambda task, args, count: {"ways": rows})
    path = tmp_path / "ways.svg"

    def typed(*more) -> int:
        with pytest.raises(SystemExit) as caught:
            main(["bench", "parallel", "--device", "cpu", "--json", "--svg", str(path), *more])
        return caught.value.code

    assert typed("--rows", "ways") == 0 and path.read_text().startswith("<svg")
    record = json.loads(capsys.readouterr().out)
    assert record["gpus"] == [2] and record["rows"] == [{"gpus": 2} | rows[0]]
    for wrong in (["--rows", "link"], ["--svg", str(tmp_path / "none" / "ways.svg")]):
        assert typed(*wrong) == 2 and "--svg" in capsys.readouterr().err


def keep(path, text):
    with path.open("a") as file:
        file.write(text + "\n")


def test_more_gpus_than_there_are():
    with pytest.raises(DaxError, match="64 ranks need 64 GPUs") as caught:
        bench("tiny", (None,) * 3, None, "exact", 64, 0.1, 0.1)
    assert caught.value.exit_code == 4
    for gpus, told in ((1, "--gpus 1: 2 or more"), ("2,x", "2,x: 2 or more"), ("2,2", "each number once")):
        with pytest.raises(DaxError, match=told):
            bench("tiny", (None,) * 3, None, "exact", gpus, 0.1, 0.1)
    for layers, parts, told in ((None, "vea", "'vea', did you mean 'vae'"), (5, None, "--layers 5: tiny has 1 to 4")):
        with pytest.raises(DaxError, match=told):
            bench("tiny", (None,) * 3, layers, "exact", 2, 0.1, 0.1, parts=parts)
