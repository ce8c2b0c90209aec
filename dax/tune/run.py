"""`dax tune`: from a fidelity or a time that must hold to the plan that does, with the proof in the plan's own file.

Measure each knob alone on a few prompts, search combinations on all calibration prompts, verify what was found on
prompts that no decision has seen, and only then write. Finished clips are kept and never run twice.
"""

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime

from dax.bench import costs, quality
from dax.bench.compare_cells import write_atomically
from dax.bench.compare_run import versions
from dax.bench.plots import scatter
from dax.errors import DaxError
from dax.plan import Plan
from dax.provenance import Measured, computes, held, to_yaml
from dax.tune import sensitivity
from dax.tune.job import Job, check
from dax.tune.knobs import PRESETS, knobs, presets_among
from dax.tune.measure import Bench
from dax.tune.search import Option, Point, Search, begin, climb, refine

VERIFIED = 3  # plans that may be tried on the held-out prompts
RAISE_DB = 3.0  # at most, from one try to the next: a p10 says how bad the worst are, not how much better all must be
CHECKED = ("height", "width", "num_frames", "steps", "guidance_scale", "flow_shift", "negative_prompt")


@dataclass(frozen=True)
class Tuned:
    """The plan found and how: `point` on the calibration prompts, `measured` on the held-out ones.

    presets   {preset: cost, psnr_db, p10_db on the held-out prompts, whether it holds the same}, if asked for
    """

    plan: Plan
    point: Point
    measured: Measured
    front: list[Point]
    search: Search
    errors: dict[str, float]
    left_out: list[str] = field(default_factory=list)
    presets: dict[str, dict] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Work of the cheapest preset that holds the same, over the plan's."""
        holding = [preset["cost"] for preset in self.presets.values() if preset["holds"]]
        return min(holding) / self.point.cost if holding else None


def tune(job: Job, log=lambda text: None) -> Tuned:
    """Find, verify and write. DaxError("bad_request") for what cannot be asked, ("check_failed") where nothing cheaper
    than exact holds it, on the calibration prompts or on the held-out ones: then nothing is written.
    """
    check(job)
    bench = Bench(job, log)
    few = bench.requests[: job.few]
    exact_s, floor_db = bench.exact_seconds(), bench.floor(few)
    log(f"exact denoises in {exact_s:.1f} s; noise floor: {floor_db:.1f} dB")
    errors = bench.sensitivity("int8")
    search, left_out = explore(bench, job, few, errors, log)
    point, psnr_db, p10_db = settle(bench, search, job, exact_s, log)
    found = bench.combined(point.options)
    figures = {"psnr_db": psnr_db, "psnr_p10_db": p10_db, "floor_db": floor_db, "seconds": point.cost * exact_s}
    measured = proof(bench, job, found.plan, point.cost, **figures)
    target = held(psnr_db, p10_db) if job.min_psnr is None else job.min_psnr
    presets = measure_presets(bench, target, log) if job.presets else {}
    write_atomically(job.output, to_yaml(found.asked, measured).encode())
    write_atomically(job.output.with_suffix(".svg"), drawn(search, point, target).encode())
    return Tuned(found.asked, point, measured, search.front(), search, errors, left_out, presets)


def explore(bench: Bench, job: Job, few: list, errors: dict, log) -> tuple[Search, list[str]]:
    """(all combinations with their costs, their settings measured alone, presets run whole; what is left out and why).

    few      requests on which a setting is measured alone
    errors   of groups of linears, see sensitivity.measure
    """
    facts, refused = bench.facts, {}
    rule_lists = {"int8": sensitivity.rules(errors, facts.num_layers)}
    budgets = bench.budgets(job.calibration)
    every, left_out = knobs(
        bench.here, bench.dtype, facts.head_dim, bench.request.steps, budgets, job.calibration, rule_lists
    )

    def cost(options: tuple[Option, ...]) -> float | None:
        try:
            return bench.cost(bench.combined(options))
        except DaxError as error:
            refused[Point(options, 0).name] = error
            return None

    search = begin(every, lambda option: bench.psnr(bench.combined((option,)), few), cost)
    if refused:
        name, error = next(iter(refused.items()))
        left_out.append(f"{len(refused)} combinations such as {name}: {error}")
    for text in left_out:
        log(f"left out: {text}")
    log(f"{len(search.points)} combinations of {len(search.alone)} settings")
    for options in presets_among(search.points, bench.exact.asked):
        search.run(search.points[options], lambda each: bench.psnr(bench.combined(each), bench.requests))
    return search, left_out


def settle(bench: Bench, search: Search, job: Job, exact_s: float, log) -> tuple[Point, float, float]:
    """(the point that also holds on the held-out prompts, its mean PSNR and p10 in dB there).

    With a fidelity the cheapest that holds it, within the time if there is one. Where one falls short on the held-out
    prompts, the next must hold more than it did on the calibration prompts; tries left then go to what that passed
    over, the truest of what is cheaper first. With a time alone, the truest within it.
    """
    limit = math.inf if job.max_seconds is None else job.max_seconds / exact_s
    target = job.min_psnr
    if target is None and limit >= 1:
        raise DaxError("check_failed", f"{job.wanted}: exact itself takes {exact_s:.3g} s; nothing was written")

    def whole(options):
        return bench.psnr(bench.combined(options), bench.requests)

    fell, best = -math.inf, None  # what fell short held so much on the calibration prompts; what held, and by how much
    for more in range(VERIFIED):
        runs = job.max_runs + more * job.max_runs // 2
        if best is not None:
            found = search.truest(math.nextafter(best[0].cost, 0))
            if found is None or found.held_db <= max(fell, job.min_psnr):
                break
        elif target is None:
            found = refine(search, limit, whole, runs)
        else:
            found = climb(search, target, whole, runs, limit)
        if found is None or found.name == "exact":
            break
        log(f"found {found.name}: {found.psnr_db:.1f} dB at {100 * found.cost:.0f} % of the work; verifying")
        psnr_db, p10_db = bench.psnr(bench.combined(found.options), bench.held_out)
        if target is None or (holds := held(psnr_db, p10_db)) >= job.min_psnr:
            best = found, psnr_db, p10_db
            if fell == -math.inf:
                break
            continue
        short = job.min_psnr - holds
        log(f"{psnr_db:.1f} dB (p10 {p10_db:.1f}) on the held-out prompts: {short:.1f} dB short")
        fell = max(fell, found.held_db)
        target = min(found.held_db + min(short, RAISE_DB), quality.CAP_DB)
    if best is not None:
        return best
    raise DaxError("check_failed", f"{job.wanted}: {closest(search, limit, exact_s, whole)}; nothing was written")


def closest(search: Search, limit: float, exact_s: float, whole) -> str:
    """Why nothing was found, in words: the truest that is cheaper than exact and within the limit, run if none was."""
    cheaper = [point.cost for point in search.points.values() if point.cost < min(limit, 1)]
    if not cheaper:
        least = min(search.points.values(), key=lambda point: point.cost)
        return f"no combination is so fast; the fastest, {least.name}, takes {least.cost * exact_s:.3g} s"
    below = max(cheaper)
    best = search.truest(below) or refine(search, below, whole, search.runs + 1)
    within = "nothing cheaper than exact holds it" if limit >= 1 else "nothing within that time holds it"
    return (
        f"{within}; the closest was {best.name}: {best.psnr_db:.1f} dB, p10 {best.p10_db:.1f}, at "
        f"{100 * best.cost:.0f} % of the work, {best.cost * exact_s:.3g} s"
    )


def measure_presets(bench: Bench, target: float, log) -> dict[str, dict]:
    """{preset: what it costs and holds on the held-out prompts}; one this model cannot have is named and left out."""
    found = {}
    for name in ("exact", *PRESETS):
        try:
            each = bench.arrange(name, Plan.load(name))
            cost = bench.cost(each)
        except DaxError as error:
            log(f"left out: {name}: {error}")
            continue
        psnr_db, p10_db = bench.psnr(each, bench.held_out)
        holds = held(psnr_db, p10_db) >= target
        found[name] = {"cost": cost, "psnr_db": psnr_db, "p10_db": p10_db, "holds": holds}
    return found


def proof(bench: Bench, job: Job, plan: Plan, cost: float, **figures: float) -> Measured:
    """What stands in the plan's file: its cost and `figures`, in dB and seconds, and where they were measured."""
    return Measured(
        **{name: round(value, 3) for name, value in figures.items()},
        prompts=len(bench.held_out),
        cost=round(cost, 4),
        cost_of=costs.COST_OF,
        model=job.model or "tiny",
        model_digest=bench.checked.digest,
        device=bench.here.name,
        dtype=bench.dtype,
        request={key: getattr(bench.request, key) for key in CHECKED},
        computes=computes(plan),
        versions=versions(bench.here),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=job.command,
    )


def drawn(search: Search, found: Point, target: float) -> str:
    """SVG of every measured combination's cost and PSNR, the front, the one found and what had to hold."""
    measured = [(point.cost, point.psnr_db) for point in search.points.values() if point.psnr_db is not None]
    front = [(point.cost, point.psnr_db) for point in search.front()]
    labels = "share of exact's work", "PSNR in dB"
    return scatter(measured, front, (found.cost, found.psnr_db), target, *labels)
