"""The search on made-up knobs whose truth is known, and the costs it goes by."""

import math

import pytest

from dax.plan import Plan
from dax.tune import costs
from dax.tune.search import Option, begin, climb

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


def test_interaction_is_learnt_not_assumed_away():
    world = World(together=4.0)
    search, found = world.tune(30.0)
    assert found.holds(30.0)
    assert any(not point.holds(30.0) for point in search.points.values() if point.psnr_db)
    assert search.bias() < -3


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


def test_the_front_only_rises():
    search, _ = World().tune(28.0)
    front = search.front()
    assert all(a.cost < b.cost and a.psnr_db < b.psnr_db for a, b in zip(front, front[1:]))
    assert all(point.psnr_db is not None for point in front)


def test_costs_are_shares_of_exact():
    exact, _ = Plan.from_layers([("test", {"attention.kernel": "sdpa"})])
    sage, _ = Plan.from_layers([("test", {"attention.kernel": "sage"})])
    assert costs.cost(exact, 100, exact, 100) == 1
    assert costs.cost(exact, 36, exact, 100) == pytest.approx(0.36)
    assert costs.cost(sage, 100, exact, 100) == pytest.approx((143.6 + 103.0) / 309.2)
