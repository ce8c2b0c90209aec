"""`dax tune`: from a fidelity that must hold to the cheapest plan that does, with the proof in the plan's own file.

Measure each knob alone on a few prompts, search combinations on all calibration prompts, verify what was found on
prompts that no decision has seen, and only then write. Finished clips are kept and never run twice.
"""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dax.bench import costs, quality
from dax.bench.compare_cells import Cells, write_atomically
from dax.bench.compare_run import Runner, keys_of, versions
from dax.bench.compare_variants import Arrangement, floor
from dax.bench.plots import scatter
from dax.bench.prompts import default_prompts, read_prompts
from dax.errors import DaxError
from dax.generate import run
from dax.generate.request import check_memory, check_real, make_request
from dax.generate.steps import checkpoint_of, schedule
from dax.plan import Plan
from dax.provenance import Measured, computes, save
from dax.tune import sensitivity
from dax.tune.knobs import BUDGETS, knobs, plan_of
from dax.tune.search import Option, Point, Search, begin, climb, held

STATES = (0.1, 0.5, 0.9)  # where along a run sensitivity is measured
VERIFIED = 3  # plans that may be tried on the held-out prompts
CHECKED = ("height", "width", "num_frames", "steps", "guidance_scale", "flow_shift", "negative_prompt")


@dataclass(frozen=True)
class Job:
    """What `dax tune` was asked for. `few`: prompts on which knobs are measured alone; `max_runs`: whole runs."""

    min_psnr: float
    output: Path
    given: dict
    model: str | None = None
    prompts: str | None = None
    held_out: str | None = None
    calibration: str = "auto"
    few: int = 3
    max_runs: int = 10
    device: str | None = None
    overwrite: bool = False
    command: str = "dax tune"


@dataclass(frozen=True)
class Tuned:
    """The plan found and how: `point` on the calibration prompts, `measured` on the held-out ones."""

    plan: Plan
    point: Point
    measured: Measured
    front: list[Point]
    search: Search
    errors: dict[str, float]
    left_out: list[str] = field(default_factory=list)


class Bench:
    """Measures plans in dB against exact, on given prompts, through the cells of a folder."""

    def __init__(self, job: Job, log):
        self.checked = run.check_model(job.model)
        self.facts, self.log = self.checked.facts, log
        import torch

        from dax.hardware import machine

        self.here = machine(job.device)
        dtype = torch.bfloat16 if self.here.device == "cuda" else torch.float32
        self.dtype = str(dtype).removeprefix("torch.")
        name, seed = job.model or "tiny", job.given.get("seed") or 0
        calibration = read_prompts(job.prompts or default_prompts(name))
        held_out = read_prompts(job.held_out or default_prompts(name, held_out=True))
        self.requests, self.held_out = (
            [make_request(self.facts, {**job.given, "prompt": p, "seed": first + i})[0] for i, p in enumerate(prompts)]
            for prompts, first in ((calibration, seed), (held_out, seed + len(calibration)))
        )
        if shared := {request.prompt for request in self.requests} & {request.prompt for request in self.held_out}:
            raise DaxError("bad_request", f"held-out prompts must be others than those tuned on: {sorted(shared)[0]!r}")
        self.request = self.requests[0]
        check_memory(
            self.facts, self.request, self.checked.parameters * dtype.itemsize, dtype.itemsize, self.here.memory_gib
        )
        self.checkpoint = checkpoint_of(self.checked.folder, self.facts)
        self.exact = self.arrange("exact", Plan.load("exact"))
        self.store = Cells(job.output.with_suffix(".cells"))
        self.common = {"model": self.checked.digest, "device": self.here.name, "dtype": self.dtype}
        self.common["versions"] = versions(self.here)
        self.runner = Runner(self.checked, self.here.device, dtype, log=log)

    def arrange(self, name: str, asked: Plan, rounded: bool = False) -> Arrangement:
        from dax.resolve import resolve

        resolved = resolve(asked, self.facts, self.here, dtype=self.dtype, checkpoint=self.checkpoint)
        return Arrangement(name, "plan", name, asked, resolved, rounded)

    def forwards(self, each: Arrangement) -> int:
        """Forwards of one clip, from the step plan alone."""
        branches = 2 if self.request.guidance_scale > 1 else 1
        found = each.resolved
        plan = schedule(found.plan.cache, found.calibration, self.facts, self.request, self.checkpoint)
        return branches * self.request.steps if plan is None else sum(plan.computed.values())

    def cost(self, each: Arrangement) -> float:
        here, exact = self.forwards(each), self.forwards(self.exact)
        return costs.cost(each.plan, here, self.exact.plan, exact, self.facts.num_layers)

    def cells(self, each: Arrangement, requests: list) -> list:
        """The finished cells of an arrangement, run where they are missing; exact's come first."""
        exact = keys_of(self.exact, self.exact, requests, self.common)
        keys = keys_of(each, self.exact, requests, self.common)
        self.runner.run_missing(self.store, self.exact, requests, exact, exact)
        self.runner.run_missing(self.store, each, requests, keys, exact)
        return [self.store.read(key) for key in keys]

    def psnr(self, each: Arrangement, requests: list) -> tuple[float, float]:
        """(mean, p10) in dB over the requests."""
        values = [cell.psnr_db for cell in self.cells(each, requests)]
        return sum(values) / len(values), quality.p10(values)

    def sensitivity(self, scheme: str) -> dict[str, float]:
        """Errors of every group of linears, on latents of the exact run of the first prompt."""
        import torch

        self.cells(self.exact, [self.request])
        (key,) = keys_of(self.exact, self.exact, [self.request], self.common)
        trajectory, (embeds, _, _) = self.store.array(key, "trajectory"), self.runner.text(self.request)
        pipe = self.runner.pipe(self.request.flow_shift)
        pipe.scheduler.set_timesteps(self.request.steps, device=pipe._execution_device)
        states = []
        for share in STATES:
            step = max(1, round(share * (self.request.steps - 1)))
            x = torch.from_numpy(trajectory[step - 1].copy())[None].to(embeds[0])
            t = pipe.scheduler.timesteps[min(step, self.request.steps - 1)][None]
            states.append((x, t, embeds[0]))
        return sensitivity.measure(pipe.transformer, states, scheme, self.facts.num_layers)


def tune(job: Job, log=lambda text: None) -> Tuned:
    """Find, verify and write. DaxError("bad_request") for what cannot be asked, ("check_failed") where nothing cheaper
    than exact holds the target, on the calibration prompts or on the held-out ones: then nothing is written.
    """
    check_real("min_psnr", job.min_psnr, 0, quality.CAP_DB)
    check_output(job)
    bench = Bench(job, log)
    request, exact = bench.request, Plan.load("exact")
    few = bench.requests[: job.few]
    floor_db, _ = bench.psnr(floor_of(bench, exact), few)
    log(f"noise floor: {floor_db:.1f} dB")
    budgets = held_budgets(bench, exact, job.calibration)
    errors = bench.sensitivity("int8")
    rule_lists = {"int8": sensitivity.rules(errors, bench.facts.num_layers)}
    every, left_out = knobs(
        bench.here, bench.dtype, bench.facts.head_dim, request.steps, budgets, job.calibration, rule_lists
    )
    for text in left_out:
        log(f"left out: {text}")
    arranged: dict[tuple, Arrangement] = {}

    def arrangement(options: tuple[Option, ...]) -> Arrangement:
        if options not in arranged:
            name = Point(options, 0).name
            arranged[options] = bench.arrange(name, plan_of(options, exact, request.steps))
        return arranged[options]

    search = begin(
        every, lambda option: bench.psnr(arrangement((option,)), few), lambda each: bench.cost(arrangement(each))
    )
    log(f"{len(search.points)} combinations of {len(search.alone)} settings")
    point, measured = settle(bench, search, arrangement, job, floor_db, log)
    tuned = Tuned(arrangement(point.options).asked, point, measured, search.front(), search, errors, left_out)
    save(job.output, tuned.plan, measured)
    plot = scatter(
        [(p.cost, p.psnr_db) for p in search.points.values() if p.psnr_db is not None],
        [(p.cost, p.psnr_db) for p in tuned.front], (point.cost, point.psnr_db), job.min_psnr,
        "share of exact's work", "PSNR in dB",
    )  # fmt: skip
    write_atomically(job.output.with_suffix(".svg"), plot.encode())
    return tuned


def settle(bench: Bench, search: Search, arrangement, job: Job, floor_db: float, log) -> tuple[Point, Measured]:
    """The cheapest point that also holds on the held-out prompts, and what was measured there.

    A point that falls short there raises the target of the next search by what was missing.
    """
    target = job.min_psnr

    def whole(options):
        return bench.psnr(arrangement(options), bench.requests)

    for more in range(VERIFIED):
        found = climb(search, target, whole, job.max_runs + more * job.max_runs // 2)
        if found is None or not any(option.values for option in found.options):
            break
        log(f"found {found.name}: {found.psnr_db:.1f} dB at {100 * found.cost:.0f} % of the work; verifying")
        each = arrangement(found.options)
        psnr_db, p10_db = bench.psnr(each, bench.held_out)
        if (holds := held(psnr_db, p10_db)) >= job.min_psnr:
            return found, measured(bench, each, job, psnr_db, p10_db, floor_db, found.cost)
        short = job.min_psnr - holds
        log(f"{psnr_db:.1f} dB (p10 {p10_db:.1f}) on the held-out prompts: {short:.1f} dB short")
        target = min(target + short, quality.CAP_DB)
    best = max(
        (point for point in search.points.values() if point.psnr_db is not None and point.cost < 1),
        key=lambda point: point.held_db,
        default=None,
    )
    shown = ""
    if best:
        psnr = f"{best.psnr_db:.1f} dB, p10 {best.p10_db:.1f}"
        shown = f"the closest was {best.name}: {psnr}, at {100 * best.cost:.0f} % of the work; "
    raise DaxError(
        "check_failed", f"--min-psnr {job.min_psnr:g}: nothing cheaper than exact holds it; {shown}nothing was written"
    )


def measured(bench: Bench, each: Arrangement, job: Job, psnr_db, p10_db, floor_db, cost: float) -> Measured:
    return Measured(
        psnr_db=round(psnr_db, 3),
        psnr_p10_db=round(p10_db, 3),
        floor_db=round(floor_db, 3),
        prompts=len(bench.held_out),
        cost=round(cost, 4),
        cost_of=costs.COST_OF,
        model=job.model or "tiny",
        model_digest=bench.checked.digest,
        device=bench.here.name,
        dtype=bench.dtype,
        request={key: asdict(bench.request)[key] for key in CHECKED},
        computes=computes(each.plan),
        versions=versions(bench.here),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=job.command,
    )


def floor_of(bench: Bench, exact: Plan) -> Arrangement:
    found = floor(exact, bench.here, bench.dtype, bench.facts.head_dim)
    return bench.arrange(found.name, found.asked, found.rounded)


def held_budgets(bench: Bench, exact: Plan, calibration: str) -> tuple[float, ...]:
    """The budgets for which the calibration has step plans of their own; () without a calibration."""
    found: dict[int, float] = {}
    for budget in BUDGETS:
        values = {"cache.policy": "calibrated", "cache.budget": budget, "cache.file": calibration}
        try:
            each = bench.arrange("", Plan.from_layers([("exact", exact.leaves()), ("tune", values)])[0])
            if each.plan.cache.policy == "calibrated":
                found.setdefault(bench.forwards(each), budget)
        except DaxError:
            if calibration != "auto":
                raise
    return tuple(found.values())


def check_output(job: Job) -> None:
    """DaxError("cannot_write") before anything runs, if the plan could not be written at the end."""
    path = job.output
    if path.suffix not in (".yaml", ".yml"):
        raise DaxError("cannot_write", f"{path}: a plan's file ends in .yaml")
    if not path.parent.is_dir():
        raise DaxError("cannot_write", f"{path}: there is no folder {path.parent}")
    if path.exists() and not job.overwrite:
        raise DaxError("cannot_write", f"{path}: exists; pass --overwrite or another name")
