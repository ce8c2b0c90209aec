"""The search on made-up knobs whose truth is known, the costs it goes by, and a whole tune of the tiny model."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dax.bench import claims, costs
from dax.errors import DaxError
from dax.generate.run import Job as Generate
from dax.generate.run import generate
from dax.plan import Plan
from dax.provenance import read_measured
from dax.tune import sensitivity
from dax.tune.job import Job
from dax.tune.knobs import even_mask, presets_among
from dax.tune.measure import Bench
from dax.tune.run import settle, tune
from dax.tune.search import Option, Point, Search, begin, climb, refine

NOISE = {"attention": {"int8": 4e-5}, "linear": {"int8": 2e-4}, "cache": {"50": 3e-4, "40": 1e-3, "25": 8e-3}}
WORK = {"attention": {"int8": 0.72}, "linear": {"int8": 0.91}, "cache": {"50": 0.5, "40": 0.4, "25": 0.25}}


class World:
    """Knobs whose squared errors add, times `together` for every pair of them at once."""

    def __init__(self, together: float = 1.0, noise=NOISE):
        self.together, self.noise, self.ran = together, noise, []
        self.knobs = [
            [Option(knob, "as exact", {}), *(Option(knob, f"{knob} {name}", {knob: name}) for name in options)]
            for knob, options in noise.items()
        ]

    def mse(self, options) -> float:
        errors = [self.noise[option.knob][option.values[option.knob]] for option in options if option.values]
        return sum(errors) * self.together ** max(len(errors) - 1, 0)

    def psnr(self, options) -> float:
        error = self.mse(options)
        return -10 * math.log10(error) if error else 100.0

    def cost(self, options) -> float:
        return math.prod(WORK[option.knob][option.values[option.knob]] for option in options if option.values)

    def measure(self, options):
        self.ran.append(options)
        return self.psnr(options), self.psnr(options) - 1

    def tune(self, target: float, max_runs: int = 12):
        search = begin(self.knobs, lambda option: (self.psnr([option]), self.psnr([option]) - 1), self.cost)
        return search, climb(search, target, self.measure, max_runs)

    def refine(self, limit: float, max_runs: int = 12):
        search = begin(self.knobs, lambda option: (self.psnr([option]), self.psnr([option]) - 1), self.cost)
        return search, refine(search, limit, self.measure, max_runs)

    def truth(self, target: float) -> float:
        """The least cost of any combination that holds the target, by brute force."""
        search = begin(self.knobs, lambda option: (self.psnr([option]),) * 2, self.cost)
        return min(self.cost(options) for options in search.points if self.psnr(options) >= target)


@pytest.mark.parametrize("together", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("target", [20.0, 28.0, 31.0, 35.0, 40.0, 50.0])
def test_it_finds_the_cheapest_that_holds_in_few_runs(together, target):
    world = World(together)
    search, found = world.tune(target)
    assert found.holds(target) and world.psnr(found.options) >= target
    assert world.cost(found.options) == pytest.approx(world.truth(target))
    assert len(world.ran) == len(set(world.ran)) <= 9 < len(search.points)


@pytest.mark.parametrize("together", [1.0, 2.5])
@pytest.mark.parametrize("limit", [0.2, 0.3, 0.4, 0.5, 0.95])
def test_it_finds_the_truest_within_a_cost_in_few_runs(together, limit):
    world = World(together)
    search, found = world.refine(limit)
    within = [options for options in search.points if world.cost(options) <= limit]
    assert found.cost <= limit and world.psnr(found.options) == max(world.psnr(options) for options in within)
    assert len(world.ran) == len(set(world.ran)) < len(within) or len(within) == 1
    assert World().refine(0.1) == (World().refine(0.1)[0], None)


def test_a_fidelity_within_a_cost_runs_nothing_that_costs_more():
    world = World()
    search = begin(world.knobs, lambda option: (world.psnr([option]),) * 2, world.cost)
    assert climb(search, 28.0, world.measure, 12, limit=0.3) is not None
    assert climb(search, 35.0, world.measure, 12, limit=0.3) is None
    assert all(world.cost(options) <= 0.3 for options in world.ran)


def test_combinations_that_cannot_be_had_are_left_out():
    world = World()

    def cost(options):
        names = {option.name for option in options}
        return None if {"linear int8", "cache 25"} <= names or "cache 50" in names else world.cost(options)

    search = begin(world.knobs, lambda option: (world.psnr([option]),) * 2, cost)
    names = [{option.name for option in options} for options in search.points]
    assert any("cache 25" in each for each in names) and any("linear int8" in each for each in names)
    assert not any({"linear int8", "cache 25"} <= each or "cache 50" in each for each in names)


def test_interaction_is_learnt_not_assumed_away():
    world = World(together=4.0)
    search, found = world.tune(30.0)
    assert found.holds(30.0)
    assert any(not point.holds(30.0) for point in search.points.values() if point.psnr_db)
    assert search.bias() < -3


def test_one_bad_pair_does_not_end_the_search():
    """8-bit linears and a sparse step plan ruin each other and were tried first; the pair without them is still run."""
    world = World()
    friendly, ruined = world.psnr, {"linear int8", "cache 25"}
    world.psnr = lambda options: friendly(options) - 12 * (ruined <= {option.name for option in options})
    search, found = world.tune(20.0)
    assert ruined <= {option.name for option in world.ran[0]} and found.name == "attention int8 + cache 25"


def test_a_whole_run_of_one_option_corrects_what_few_prompts_said():
    world = World()
    search = begin(world.knobs, lambda option: (world.psnr([option]) + 5, 99.0), world.cost)
    found = climb(search, 28.0, world.measure, 12)
    corrected = [option for option, db in search.alone.items() if option.values and db == world.psnr([option])]
    assert found.holds(28.0) and len(corrected) == sum(len([o for o in each if o.values]) == 1 for each in world.ran)


def test_an_option_that_another_beats_is_not_combined():
    noise = {**NOISE, "cache": {**NOISE["cache"], "bad": 9e-3}}
    WORK["cache"]["bad"] = 0.45
    world = World(noise=noise)
    search = begin(world.knobs, lambda option: (world.psnr([option]),) * 2, world.cost)
    names = {option.name for options in search.points for option in options}
    assert "cache bad" not in names and {"cache 50", "cache 40", "cache 25"} <= names


def test_a_target_nothing_holds_leaves_exact_alone_and_p10_counts():
    world = World()
    _, found = world.tune(60.0)
    assert found.name == "exact"
    world.measure = lambda options: (world.psnr(options), world.psnr(options) - 4)
    _, found = world.tune(28.0)
    assert found.psnr_db >= 29.0 and found.p10_db >= 25.0


def test_a_plan_that_loses_a_held_out_prompt_gives_way_to_the_next_not_to_a_far_better_one():
    world = World()
    search = begin(world.knobs, lambda option: (world.psnr([option]),) * 2, world.cost)
    first = climb(search, 28.0, world.measure, 12)

    def psnr(options, requests):
        mean, p10 = world.measure(options)
        return (mean, p10 - 20) if requests == "held-out" and options == first.options else (mean, p10)

    bench = SimpleNamespace(psnr=psnr, combined=lambda each: each, requests="calibration", held_out="held-out")
    found, psnr_db, _ = settle(bench, search, Job(28.0, Path("a.yaml"), {}), 1.0, print)
    truth = sorted(world.cost(each) for each in search.points if world.psnr(each) > first.psnr_db)
    assert psnr_db >= 28 and found.options != first.options and found.cost == pytest.approx(truth[0], rel=0.5)


@pytest.mark.parametrize("between_holds", [True, False])
def test_what_a_failure_passed_over_is_tried_with_the_tries_left(between_holds, monkeypatch):
    """One that fell short by much asks much of the next; a cheaper one between the two is not forgotten."""
    cheap, between, dear = points = [
        Point((Option("cache", name, {"cache.policy": name}),), cost, psnr_db=db, p10_db=db)
        for name, cost, db in (("cheap", 0.2, 28.6), ("between", 0.23, 30.0), ("dear", 0.29, 33.0))
    ]
    held_out = {cheap: 24.0, between: 29.0 if between_holds else 27.0, dear: 32.0}
    search = Search({}, {point.options: point for point in points})
    climbed = iter((cheap, dear))
    monkeypatch.setattr("dax.tune.run.climb", lambda *given: next(climbed))
    measured = {point.options: (held_out[point],) * 2 for point in points}
    bench = SimpleNamespace(
        psnr=lambda options, requests: measured[options], combined=lambda each: each, requests=(), held_out=()
    )
    found, psnr_db, _ = settle(bench, search, Job(28.0, Path("a.yaml"), {}), 1.0, print)
    assert (found, psnr_db) == ((between, 29.0) if between_holds else (dear, 32.0))


def test_the_front_only_rises():
    search, _ = World().tune(28.0)
    front = search.front()
    assert all(a.cost < b.cost and a.psnr_db < b.psnr_db for a, b in zip(front, front[1:]))
    assert all(point.psnr_db is not None for point in front)


def plan(**values) -> Plan:
    values = {key.replace("__", "."): value for key, value in values.items()}
    return Plan.from_layers([("test", {"attention.kernel": "sdpa", **values})])[0]


def test_presets_are_found_among_the_combinations():
    attention = Option("attention", "a", {"attention.kernel": "int8"})
    linear, spared = (
        Option("linear", "l", {"linear.scheme": "int8"}),
        {"linear.scheme": "int8", "linear.rules": {"x": "none"}},
    )
    cache = {"cache.policy": "calibrated", "cache.file": "my.json"}
    steps, fewer = (
        Option("cache", "40", {**cache, "cache.budget": 0.4}),
        Option("cache", "25", {**cache, "cache.budget": 0.25}),
    )
    none = Option("linear", "none", {})
    combinations = [
        (attention, linear), (attention, none), (attention, Option("linear", "s", spared)), (attention, linear, steps),
        (attention, linear, fewer),
    ]  # fmt: skip
    found = presets_among(combinations, Plan.load("exact"))
    assert found == [combinations[0], combinations[3]], "balanced and fast"


def test_costs_are_shares_of_exact():
    exact = plan()
    assert costs.cost(exact, 100, exact, 100, 4) == 1
    assert costs.cost(exact, 36, exact, 100, 4) == pytest.approx(0.36)
    whole = costs.block_ms("none", "bf16", "none", True)  # what auto means on the card that is counted for
    assert costs.cost(plan(attention__kernel="sage"), 100, exact, 100, 4) == pytest.approx(1 - 30.7 / whole, abs=2e-3)
    int8 = costs.cost(plan(linear__scheme="int8"), 100, exact, 100, 4)
    assert int8 == pytest.approx(1 - 30.7 / whole, abs=2e-3)
    spared = plan(linear__scheme="int8", linear__rules={"blocks.0": "none", "blocks.1.ffn": "none"})
    kept = (1 + 2 * 13824 / (6 * 5120 + 2 * 13824)) / 4
    assert costs.cost(spared, 100, exact, 100, 4) == pytest.approx(1 - (1 - int8) * (1 - kept))


def test_costs_are_near_the_measured_blocks():
    """The rates are fitted to whole blocks: what comes out stays near what that bench measured."""
    measured = {}
    for name in ("block.h100.json", "block_attention.h100.json"):  # the latter has the kernels that are delivered
        record = json.loads((claims.ledger().parent / name).read_text())
        measured |= {row["row"]: row["ms_per_layer"] for row in record["rows"]}
    ways = {
        "eager": ("none", "cudnn", "none", False),
        "dax exact": ("none", "cudnn", "none", True),
        "dax balanced": ("int8", "int8", "none", True),
    }
    for row, way in ways.items():
        assert costs.block_ms(*way) == pytest.approx(measured[row], rel=0.03), row


def test_rules_spare_what_hurts_most_for_the_least_work():
    errors = dict.fromkeys(sensitivity.groups(4), 0.001)
    assert sum(sensitivity.groups(4).values()) == pytest.approx(1)
    errors |= {"blocks.2.attn2": 0.03, "blocks.0.ffn.net.2": 0.02}
    half, most = sensitivity.rules(errors, 4)
    assert half == {"blocks.2.attn2": "none"}
    assert most == {"blocks.2.attn2": "none", "blocks.0.ffn.net.2": "none"}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_half_the_steps_are_half_the_work_with_guidance_and_without(tmp_path, guidance_scale):
    bench = Bench(Job(30.0, tmp_path / "plan.yaml", {**SIZE, "steps": 4, "guidance_scale": guidance_scale}), print)
    half = bench.arrange("half", plan(cache__policy="mask", cache__mask="1010"))
    assert bench.cost(half) == pytest.approx(0.5) and bench.cost(bench.exact) == 1


def test_even_masks_begin_and_end_computed():
    for steps in (1, 2, 6, 50):
        for period in (2, 3, 4):
            mask = even_mask(steps, period)
            assert len(mask) == steps and mask[0] == mask[-1] == "1"
    assert [even_mask(50, n).count("1") for n in (2, 3, 4)] == [30, 24, 20]


SIZE = {"height": 32, "width": 48, "num_frames": 5, "steps": 5}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    (folder / "tune.txt").write_text("a large green square moves up over a gray background\n")
    (folder / "held.txt").write_text("a medium white square bounces over a gray background\n")
    return Job(15.0, folder / "plan.yaml", SIZE, None, str(folder / "tune.txt"), str(folder / "held.txt"), few=1)


@pytest.fixture(scope="module")
def tuned(job):
    return tune(job)


def test_the_plan_found_is_cheaper_holds_on_held_out_prompts_and_says_so(job, tuned):
    assert tuned.point.cost < 1 and tuned.measured.psnr_db >= 15 and tuned.measured.prompts == 1
    assert Plan.load(job.output) == tuned.plan and read_measured(job.output) == tuned.measured
    assert max(tuned.errors.values()) > min(tuned.errors.values()) > 0
    assert job.output.with_suffix(".svg").read_text().startswith("<svg")
    record = generate(Generate(
        {"prompt": "a medium white square bounces over a gray background", "seed": 1, **SIZE},
        str(job.output.parent / "clip.npz"), plan=str(job.output), min_psnr=15.0,
    ))  # fmt: skip
    assert record["plan"] == {**tuned.plan.model_dump(), **record["plan"]}
    assert record["warnings"] == []


def test_an_unreachable_target_shows_the_best_and_writes_nothing(job, tuned):
    with pytest.raises(
        DaxError, match="nothing cheaper than exact holds it; the closest .*nothing was written"
    ) as refusal:
        tune(beside(job, min_psnr=99.0))
    assert refusal.value.exit_code == 8 and not job.output.with_name("plan.yml").exists()


def beside(job, **changes):
    """The same job to another file beside plan.cells: nothing runs twice."""
    return replace(job, output=job.output.with_name("plan.yml"), overwrite=True, **changes)


def test_the_truest_plan_within_a_time_and_what_presets_do(job, tuned):
    exact_s = tuned.measured.seconds / tuned.measured.cost
    found = tune(beside(job, min_psnr=None, max_seconds=0.7 * exact_s, presets=True))
    within = [point for point in found.search.points.values() if point.cost <= 0.7]
    assert found.point.cost <= 0.7 and found.measured.seconds <= 0.7 * exact_s + 1e-3
    assert found.point.held_db >= max(point.held_db for point in within)
    assert found.presets["exact"] == {"cost": 1, "psnr_db": 100, "p10_db": 100, "holds": True}
    assert set(found.presets) == {"exact", "balanced"}, "fast has no calibration for five steps"
    assert found.speedup == pytest.approx(
        min(p["cost"] for p in found.presets.values() if p["holds"]) / found.point.cost
    )


def test_what_cannot_be_held_in_that_time_shows_the_closest_and_writes_nothing(job, tuned):
    job.output.with_name("plan.yml").unlink(missing_ok=True)
    exact_s = tuned.measured.seconds / tuned.measured.cost
    for wanted, says in (
        ({"min_psnr": 90.0, "max_seconds": 0.7 * exact_s}, "nothing within that time holds it; the closest was .* dB"),
        ({"min_psnr": None, "max_seconds": 1e-3 * exact_s}, "no combination is so fast; the fastest, .* takes"),
        ({"min_psnr": None, "max_seconds": 2 * exact_s}, "exact itself takes"),
    ):
        with pytest.raises(DaxError, match=f"--max-seconds .*{says}.*nothing was written") as refusal:
            tune(beside(job, **wanted))
        assert refusal.value.exit_code == 8 and not job.output.with_name("plan.yml").exists()


def test_bad_input_is_refused_before_anything_runs(job, tuned, monkeypatch):
    monkeypatch.setattr("dax.generate.run.load", lambda *_, **__: pytest.fail("a model was loaded"))
    for changes, says in (
        ({}, "exists; pass --overwrite"),
        ({"output": job.output.with_name("plan.txt")}, "unknown suffix '.txt'; known: .yaml"),
        ({"output": job.output.parent / "no" / "no" / "plan.yaml"}, "there is no folder"),
        ({"output": Path("/proc/plan.yaml")}, "/proc/plan.yaml: "),
        ({"output": job.output.with_name("new.yaml"), "few": 0}, "few 0 must lie from 1"),
        ({"output": job.output.with_name("new.yaml"), "max_runs": 0}, "max_runs 0 must lie from 1"),
        ({"min_psnr": float("nan"), "overwrite": True}, "min_psnr"),
        ({"min_psnr": None, "max_seconds": -1.0, "overwrite": True}, "max_seconds"),
        ({"min_psnr": None, "overwrite": True}, "--min-psnr DB, --max-seconds S or both"),
        ({"held_out": job.prompts, "overwrite": True}, "held-out prompts must be others"),
    ):
        with pytest.raises(DaxError, match=says):
            tune(replace(job, **changes))
