"""dax compare: the same noise for every plan, nothing run twice, and a report that fits its schema and its browser."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import ImageDraw

from dax.bench import compare_run
from dax.bench.compare import Job, compare
from dax.bench.compare_files import check_folder, write_report
from dax.bench.compare_page import error_map, page, shrink
from dax.bench.compare_record import Comparison
from dax.bench.compare_run import keys_of
from dax.bench.compare_sheet import glyph, sheet
from dax.bench.compare_variants import FLOOR, Arrangement, arrangements
from dax.bench.plots import Series, bars, curves
from dax.bench.prompts import default_prompts, read_prompts
from dax.errors import DaxError
from dax.generate.request import make_request
from dax.generate.settle import check_model
from dax.hardware import MACHINES, machine
from dax.plan import Plan
from dax.resolve import Resolved
from tests.browser import browser, needs_browser

SCHEMA = Path(__file__).parents[1] / "docs" / "schema" / "compare.json"
HOSTILE = "</script><script>document.title='stolen'</script><img src=x onerror=alert(1)> \"quoted\" & 'more'"
SMALL = {"height": 32, "width": 48, "num_frames": 9, "steps": 4}


def plan_file(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.txt").write_text(f"# two\n\na red circle moves right over a black background\n{HOSTILE}\n")
    skip = plan_file(folder, "skip", "cache:\n  policy: mask\n  mask: '1101'\n")
    return Job(("exact", skip), folder / "report", SMALL, str(folder / "prompts.txt"), attribute=1)


@pytest.fixture(scope="module")
def report(job):
    """(Comparison, clips), written to the job's folder."""
    check_folder(job.output)
    comparison, clips = compare(job)
    write_report(job.output, comparison, clips)
    return comparison, clips


def test_the_reference_is_itself_the_floor_is_near_and_a_skipped_step_is_farther(report):
    comparison, clips = report
    exact, floor, skip = (comparison.variant(name) for name in ("exact", FLOOR, "skip"))
    assert exact.fidelity.psnr_worst_db == 100 and exact.fidelity.latent_error == 0
    assert 0 < floor.fidelity.latent_error < skip.fidelity.latent_error
    assert 100 > floor.fidelity.psnr_db > skip.fidelity.psnr_db > 5
    assert exact.computed == {"cond": 4, "uncond": 4} and skip.computed == {"cond": 3, "uncond": 3}
    assert skip.work == pytest.approx(0.75) and exact.work == 1 and skip.speedup > 0
    assert skip.differs == {"cache.policy": "mask", "cache.mask": "1101"}
    assert all(len(cell.latent_error) == 4 and len(cell.frame_psnr_db) == 9 for cell in skip.cells)
    # the same noise: until the first predicted step the latents are the reference's, bit for bit
    assert [cell.latent_error[:2] for cell in skip.cells] == [[0, 0], [0, 0]]
    assert all(cell.latent_error[2] > 0 for cell in skip.cells)
    worst = skip.fidelity.worst_frame
    frames = [np.asarray(clips[name][worst.prompt][worst.frame], float) for name in ("exact", "skip")]
    assert worst.psnr_db == pytest.approx(10 * np.log10(255**2 / np.mean((frames[0] - frames[1]) ** 2)))
    assert not np.array_equal(clips["exact"][0], clips["exact"][1])


def test_the_record_fits_the_published_schema(report, job):
    published = json.loads(SCHEMA.read_text())
    assert published == Comparison.model_json_schema(), "docs/schema/compare.json is not of this version"
    record = json.loads((job.output / "report.json").read_text())
    jsonschema.validate(record, published)
    del record["variants"][1]["fidelity"]["psnr_db"]
    with pytest.raises(jsonschema.ValidationError, match="psnr_db"):
        jsonschema.validate(record, published)


@pytest.mark.fault(59)
def test_a_comparison_that_was_cut_off_goes_on_where_it_stopped(job, tmp_path, monkeypatch):
    job = replace(job, output=tmp_path / "report", given={**SMALL, "steps": 2}, plans=("exact",), attribute=0)
    ran, whole = [], compare_run.Runner.clip

    def clip(self, pipe, index, request, reference=None):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(index)
        return whole(self, pipe, index, request, reference)

    monkeypatch.setattr(compare_run.Runner, "clip", clip)
    with pytest.raises(KeyboardInterrupt):
        compare(job)
    ran.clear()
    first, _ = compare(job)
    assert ran == [1]
    for damaged in ("cell.json", "frames.npy", "trajectory.npy"):
        torn = next((job.output / "cells").glob(f"*/{damaged}"))
        torn.write_bytes(torn.read_bytes()[:100])
        ran.clear()
        compare(job)
        assert len(ran) == 1, damaged

    def never(*_, **__):
        raise AssertionError("a finished comparison loads no model")

    monkeypatch.setattr(compare_run.stages, "load", never)
    again, _ = compare(job)
    assert [each.fidelity for each in again.variants] == [each.fidelity for each in first.variants]
    second = tmp_path / "second.txt"
    second.write_text(again.prompts[1])
    one, _ = compare(replace(job, prompts=str(second), given={**job.given, "seed": 1}))
    assert [cell.prompt for each in one.variants for cell in each.cells] == [0, 0]  # its place in this comparison
    with pytest.raises(AssertionError, match="loads no model"):  # another seed is another clip
        compare(replace(job, given={**job.given, "seed": 9}))


def test_bad_input_is_refused_before_a_model_is_loaded(job, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_run.stages, "load", lambda *_: pytest.fail("loaded"))
    short = plan_file(tmp_path, "short", "cache:\n  policy: mask\n  mask: '11'\n")
    for plans, says in (
        (("exact", "exact"), "given already"),
        (("exat",), "did you mean 'exact'"),
        ((plan_file(tmp_path, "exact", "compile: blocks"),), "'exact' is what plans are held against"),
        ((short,), "cache.mask has 2 letters, the run has 4 steps"),
    ):
        with pytest.raises(DaxError, match=says):
            compare(replace(job, plans=plans, output=tmp_path / "none"))
    with pytest.raises(DaxError, match="height 33 must be a multiple of 16"):
        compare(replace(job, given={"height": 33}, output=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a red circle\nbad \xff\xfe\nfine\nnul \0\n", r"line 2 is not UTF-8; line 4: the prompt holds a NUL"),
        (b"# only a remark\n\n", "0 prompts"),
        (b"x" * 10_001, "line 1: the prompt has 10001 characters"),
    ],
)
def test_every_bad_line_of_a_prompts_file_is_named(tmp_path, content, says):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DaxError, match=says):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(DaxError, match="No such file"):
        read_prompts(tmp_path / "none.txt")


def test_the_prompts_that_ship():
    tuned, held_out = read_prompts(default_prompts("tiny")), read_prompts(default_prompts("tiny", held_out=True))
    assert (len(tuned), len(held_out)) == (8, 16) and not set(tuned) & set(held_out)
    assert len(read_prompts(default_prompts("some/model"))) == 8


def test_a_folder_of_other_things_or_with_a_report_is_left_alone(report, job, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    for folder, says in (
        (tmp_path, "holds 'letter.txt' and no report of DAX"),
        (tmp_path / "letter.txt", "is not a folder"),
        (tmp_path / "a" / "b", "there is no folder"),
        (job.output, "holds a report; pass --overwrite"),
    ):
        with pytest.raises(DaxError, match=says):
            check_folder(folder)
    check_folder(job.output, overwrite=True)


def test_each_knob_stands_alone_once_and_what_cannot_is_named(tmp_path):
    def resolve(plan):
        if plan.compile == "blocks" and plan.cache.policy == "none":
            raise DaxError("unsupported", "not alone")
        kernel = "bf16" if plan.attention.kernel == "auto" else plan.attention.kernel
        return Resolved(plan.model_copy(update={"attention": plan.attention.model_copy(update={"kernel": kernel})}))

    skip = "cache: {policy: mask, mask: '10'}\n"
    both = plan_file(tmp_path, "both", skip + "attention: {kernel: sage}\n")
    every = plan_file(tmp_path, "every", skip + "attention: {kernel: sage}\ncompile: blocks\n")
    found, splits = arrangements(["exact", both, every], resolve, MACHINES["h200"], "bfloat16", 128)
    assert [each.name for each in found] == ["exact", FLOOR, "both", "every", "attention", "cache", "blocks"]
    assert splits[0].knobs == {"attention": "attention", "cache": "cache"} and splits[0].refused == {}
    assert splits[1].knobs == {**splits[0].knobs, "blocks": "blocks"}  # run once for both plans
    assert splits[1].refused == {"compile": "not alone"}
    plans = {each.name: each.plan for each in found}
    assert (plans["cache"].cache.mask, plans["cache"].attention.kernel) == ("10", "bf16")
    assert plans[FLOOR].attention.kernel == "cudnn" and not found[1].rounded
    cpu, none = arrangements(["exact"], resolve, machine("cpu"), "float32", 128)
    assert cpu[1].rounded and "rounded to bf16" in cpu[1].description and none == []


def test_error_maps_and_large_clips():
    clip = np.zeros((2, 40, 960, 3), np.uint8)
    other = clip.copy()
    other[1, 3, 5] = 255
    heat = error_map(clip, other)
    assert (heat[0] == heat[0, 0, 0]).all() and tuple(heat[1, 3, 5]) == (252, 255, 164)
    assert shrink(other).shape == (2, 20, 480, 3) and shrink(other)[1, 1, 2].max() == 64
    assert shrink(clip[:, :, :48]) is not None and shrink(clip[:, :, :48]).shape == (2, 40, 48, 3)


def test_plots_show_every_series_and_no_label_covers_another():
    series = [Series(f"plan <{i}>", f"c{i}", [0.0, 0.1 + 0.001 * i, 0.2]) for i in range(4)]
    drawn = curves(series, ([0.01] * 3, [0.02] * 3), "step", "error", log=True)
    assert drawn.count("<polyline") == 4 and 'class="band"' in drawn and "plan &lt;3&gt;" in drawn
    heights = sorted(float(part.split('y="')[1].split('"')[0]) for part in drawn.split("<text")[1:] if "name" in part)
    assert min(b - a for a, b in zip(heights, heights[1:])) >= 14
    assert "nan" not in bars([("a", "c1", 0.0, "0 %")], (0.0, 0.0), "zero").lower()
    assert curves([Series("flat", "c1", [100.0, 100.0])], None, "x", "y").count("<polyline") == 1


def test_the_page_escapes_what_people_typed(report):
    html = page(*report)
    assert HOSTILE not in html and "&lt;/script&gt;&lt;script&gt;" in html
    assert html.count("<script>") == 1 and "http" not in html.replace("http-equiv", "")


@needs_browser
def test_in_a_browser_the_clips_play_in_step_and_nothing_leaves_the_page(report, job):
    with browser() as window:
        window.open((job.output / "report.html").as_uri())
        ready = "return shown().length == 5 && shown().every(v => v.readyState >= 3)"
        window.wait_for(ready)
        window.run("play(true)")
        times = []
        for _ in range(8):
            window.wait_for("return new Promise(done => setTimeout(() => done(true), 150))")
            times.append(window.run("return shown().map(v => v.currentTime)"))
        frame = 1 / float(window.run("return fps"))
        assert max(max(now) - min(now) for now in times) <= 1.5 * frame, times
        assert len({round(now[0], 3) for now in times}) > 3, "the clock does not run"
        window.run("document.querySelector('#next').click()")
        window.wait_for("return shown().every(v => v.paused && Math.abs(v.currentTime - shown()[0].currentTime) < .01)")
        other = window.run("const s = document.querySelector('#prompt'); s.value = s.value == '0' ? '1' : '0';"
                           "s.dispatchEvent(new Event('change')); return shown()[0].src")  # fmt: skip
        assert other.startswith("data:video/mp4")
        window.wait_for(ready)
        assert window.run("return shown().map(v => v.error)") == [None] * 5
        assert window.run("return document.title") == "DAX compare: tiny"
        assert window.requests() == [(job.output / "report.html").as_uri()]
        assert [entry["message"] for entry in window.log("browser")] == []


@needs_browser
def test_the_browser_test_can_fail(report, job, tmp_path):
    """A page that reaches out, or breaks its policy, is seen by the very checks above."""
    html = (job.output / "report.html").read_text()
    policy = html[html.index("<meta http-equiv") : html.index("<meta name")]
    (tmp_path / "leaky.html").write_text(
        html.replace(policy, "").replace("<main>", '<main><img src="file:///nowhere.png">')
    )
    (tmp_path / "bad.html").write_text(html.replace("<main>", "<main><script>document.title='stolen'</script>"))
    with browser() as window:
        window.open((tmp_path / "leaky.html").as_uri())
        assert "file:///nowhere.png" in window.requests()
        window.log("browser")
        window.open((tmp_path / "bad.html").as_uri())
        assert window.run("return document.title") == "DAX compare: tiny"
        assert any("Content Security Policy" in entry["message"] for entry in window.log("browser"))


def test_the_sheet_shows_every_plan(report, job):
    from PIL import Image

    with Image.open(job.output / "report.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    rows = [r for r in np.abs(pixels[46:, 230:].astype(int) - 255).sum((1, 2)).nonzero()[0]]
    assert len(rows) >= 2 * 128 - 2


def test_the_sheet_writes_nothing_that_its_font_lacks(report, monkeypatch):
    """Prompts and plans' names are the user's: a box in their place would say nothing."""
    comparison, clips = report
    plan = comparison.variant("skip")
    variants = [*comparison.variants[:-1], plan.model_copy(update={"name": "schnell-für-★"})]
    prompts = ["a ★ étoile –\tfilante “plus” vit\u00e9 vite\u0301…", "一只猫 हिन्दी runs"]
    starry = comparison.model_copy(update={"prompts": prompts, "variants": variants})
    written, draw = [], ImageDraw.ImageDraw.text

    def text(self, at, words, ink, font):
        written.append(words)
        box = glyph("\U0010ffff", font)
        assert [letter for letter in words if glyph(letter, font) == box] == []
        draw(self, at, words, ink, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    for prompt in range(2):
        sheet(starry, {**clips, "schnell-für-★": clips["skip"]}, prompt)
    first, second = [words for words in written if words[0] in "12"]
    assert first == "1. “a \\u2605 etoile \\u2013 filante “plus” vite vite…”"
    assert second == f"2. “{json.dumps(prompts[1])[1:-1]}”"
    assert "schnell-fur-\\u2605" in written and "exact" in written
    sheet(comparison, clips, 0)
    assert "“a red circle moves right over a black background”" in written


def test_the_command_line_ends_in_one_line_and_a_code(job, tmp_path):
    def dax(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(SCHEMA.parents[2])}
        ended = subprocess.run(
            [sys.executable, "-m", "dax", *map(str, arguments)], capture_output=True, text=True, env=environment,
            timeout=120,
        )  # fmt: skip
        lines = [line for line in ended.stderr.splitlines() if not line.startswith("no --model")]
        assert len(lines) == 1 and ended.stdout == "", ended.stderr
        return ended.returncode, lines[0]

    (tmp_path / "mine.txt").write_text("keep me")
    code, line = dax("compare", "--plan", "exact", "-o", tmp_path, "--prompts", job.prompts)
    assert code == 6 and "holds 'mine.txt' and no report of DAX" in line
    code, line = dax("tune", "--min-psnr", "200", "-o", tmp_path / "plan.yaml")
    assert code == 2 and "min_psnr 200.0 must be a number from 0 to 100" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_cell_is_known_by_all_it_depends_on():
    plan = Plan()
    request = make_request(check_model(None).facts, {"prompt": "x"})[0]

    class Calibration:
        def __init__(self, text):
            self.digest = lambda: text

    def key(each, requests=(request,), **common):
        return keys_of(each, exact, list(requests), {"model": "m", "versions": {"torch": "1"}, **common})[0]

    exact = Arrangement("exact", "reference", "", plan, Resolved(plan))
    skips = Plan.from_layers([("test", {"cache.policy": "mask", "cache.mask": "10"})])[0]
    plain = Arrangement("a", "plan", "", skips, Resolved(skips))
    others = [
        key(exact),
        key(replace(exact, rounded=True)),
        key(plain),
        key(replace(plain, resolved=Resolved(skips, calibration=Calibration("one")))),
        key(replace(plain, resolved=Resolved(skips, calibration=Calibration("two")))),
        key(plain, [replace(request, seed=1)]),
        key(plain, model="n"),
        key(plain, versions={"torch": "2"}),
    ]
    assert len(set(others)) == len(others)
    assert key(replace(plain, name="b", role="knob", description="other words")) == key(plain)
