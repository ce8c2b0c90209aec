"""The search for the cheapest plan of a fidelity, or the truest within a cost: knobs alone first, then few whole runs.

Pure: it chooses which combination to run next and asks for the measurement. Squared errors of knobs are taken to add
up; what they do together beyond that is learnt from the whole runs, so interactions are seen, not assumed away.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

from dax.provenance import held

CAP_DB = 100.0  # of a combination that changes nothing
CURIOUS_DB = 1.5  # how far under the target a cheaper combination may be predicted and still be tried


@dataclass(frozen=True)
class Option:
    """One setting of a knob: plan keys and their values. No values: as exact has it."""

    knob: str
    name: str
    values: dict

    def __hash__(self):
        return hash((self.knob, self.name))


@dataclass(frozen=True)
class Point:
    """A combination: one Option of every knob. `cost` is its share of exact's work; PSNR in dB, None if not run.

    predicted_db   the highest target it should hold
    """

    options: tuple[Option, ...]
    cost: float
    predicted_db: float | None = None
    psnr_db: float | None = None
    p10_db: float | None = None

    @property
    def name(self) -> str:
        return " + ".join(option.name for option in self.options if option.values) or "exact"

    @property
    def held_db(self) -> float:
        """The highest target it holds."""
        return -math.inf if self.psnr_db is None else held(self.psnr_db, self.p10_db)

    def holds(self, target: float) -> bool:
        return self.held_db >= target

    def within(self, other: "Point") -> bool:
        """Whether `other` does all that this does, and more."""
        return all(mine == its or not mine.values for mine, its in zip(self.options, other.options))


@dataclass
class Search:
    """Everything found so far. `alone`: {Option: the target it holds by itself}; `points`: combinations, by options."""

    alone: dict[Option, float]
    points: dict[tuple[Option, ...], Point]
    runs: int = 0

    def bias(self) -> float:
        """dB by which whole runs differ from what their knobs predict: negative where knobs make each other worse."""
        found = [
            point.held_db - added_up(point.options, self.alone)
            for point in self.points.values()
            if point.psnr_db is not None and sum(bool(option.values) for option in point.options) > 1
        ]
        return sum(found) / len(found) if found else 0.0

    def hope(self, point: Point) -> float:
        """dB it may hold at best: the bias may be another combination's, but none holds more than a part of it did."""
        parts = [other.held_db for other in self.points.values() if other.psnr_db is not None and other.within(point)]
        return min([max(point.predicted_db, added_up(point.options, self.alone)), *parts])

    def predicted(self) -> list[Point]:
        """Every point with its prediction as of now, the cheapest first."""
        bias = self.bias()
        found = []
        for point in self.points.values():
            several = sum(bool(option.values) for option in point.options) > 1
            db = added_up(point.options, self.alone) + (bias if several else 0.0)
            found.append(replace(point, predicted_db=min(db, CAP_DB)))
        return sorted(found, key=lambda point: (point.cost, -point.predicted_db))

    def cheapest(self, target: float, limit: float = math.inf) -> Point | None:
        """The cheapest measured point that holds the target and costs no more than `limit`."""
        fit = [point for point in self.points.values() if point.holds(target) and point.cost <= limit]
        return min(fit, key=lambda point: point.cost, default=None)

    def truest(self, limit: float) -> Point | None:
        """The measured point that holds most of those that cost no more than `limit`."""
        fit = [point for point in self.points.values() if point.psnr_db is not None and point.cost <= limit]
        return max(fit, key=lambda point: (point.held_db, -point.cost), default=None)

    def run(self, point: Point, measure: Callable) -> None:
        """A whole run of a point, kept; of a single option it replaces what a few prompts said. exact needs no run."""
        changed = [option for option in point.options if option.values]
        psnr_db, p10_db = measure(point.options) if changed else (CAP_DB, CAP_DB)
        self.points[point.options] = replace(point, psnr_db=psnr_db, p10_db=p10_db)
        if len(changed) == 1:
            self.alone[changed[0]] = held(psnr_db, p10_db)
        self.runs += 1

    def front(self) -> list[Point]:
        """The measured points that no other beats in both cost and PSNR, the cheapest first."""
        measured = sorted(
            (point for point in self.points.values() if point.psnr_db is not None),
            key=lambda point: (point.cost, -point.psnr_db),
        )
        front: list[Point] = []
        for point in measured:
            if not front or point.psnr_db > front[-1].psnr_db:
                front.append(point)
        return front


def added_up(options: Iterable[Option], alone: dict[Option, float]) -> float:
    """dB that a combination holds if the squared errors of its options simply add."""
    total = sum(10 ** (-alone[option] / 10) for option in options if option.values)
    return -10 * math.log10(total) if total else CAP_DB


def begin(knobs: list[list[Option]], alone: Callable, cost: Callable) -> Search:
    """Measure every option by itself, leave out what another option of its knob beats, and lay out all combinations.

    alone   Option -> (mean PSNR, p10) in dB
    cost    tuple of Options -> share of exact's work; None for a combination that cannot be had
    """
    found: dict[Option, float] = {}
    kept: list[list[Option]] = []
    neutral = tuple(options[0] for options in knobs)
    for index, options in enumerate(knobs):
        priced = []
        for option in options:
            price = cost((*neutral[:index], option, *neutral[index + 1 :]))
            if price is None:
                continue
            found[option] = held(*alone(option)) if option.values else CAP_DB
            priced.append((price, -found[option], option))
        chosen, best = [], -math.inf
        for _, negative, option in sorted(priced, key=lambda each: each[:2]):
            if -negative > best:
                chosen.append(option)
                best = -negative
        kept.append(chosen)
    costs = {each: cost(each) for each in product(*kept)}
    return Search(found, {each: Point(each, price) for each, price in costs.items() if price is not None})


def climb(search: Search, target: float, measure: Callable, max_runs: int, limit: float = math.inf) -> Point | None:
    """Whole runs until the cheapest point that holds the target, and costs no more than `limit`, is known as well as
    `max_runs` allow; that point.

    measure   tuple of Options -> (mean PSNR, p10) in dB
    First the cheapest that is predicted to hold. Then cheaper ones that may come close, the most hopeful first.
    """
    while search.runs < max_runs:
        best = search.cheapest(target, limit)
        unrun = [point for point in search.predicted() if point.psnr_db is None and point.cost <= limit]
        cheaper = [point for point in unrun if best is None or point.cost < best.cost]
        likely = [point for point in cheaper if point.predicted_db >= target]
        close = [point for point in cheaper if search.hope(point) >= target - CURIOUS_DB]
        if not (likely or (best and close)):
            break
        search.run(likely[0] if likely else max(close, key=search.hope), measure)
    return search.cheapest(target, limit)


def refine(search: Search, limit: float, measure: Callable, max_runs: int) -> Point | None:
    """Whole runs of what costs no more than `limit`, the highest prediction first, until none that is left is predicted
    above the best so far, or `max_runs` are used up; that best, None if nothing is so cheap.
    """
    while search.runs < max_runs:
        best = search.truest(limit)
        unrun = [point for point in search.predicted() if point.psnr_db is None and point.cost <= limit]
        better = [point for point in unrun if best is None or point.predicted_db > best.held_db]
        if not better:
            break
        search.run(max(better, key=lambda point: point.predicted_db), measure)
    return search.truest(limit)
