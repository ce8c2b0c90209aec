"""What a tune measures: fidelity of plans in dB against exact, work, errors of groups of linears, seconds of exact."""

from statistics import median

from dax.bench import costs, quality
from dax.bench.compare_cells import Cells
from dax.bench.compare_run import Runner, keys_of, versions
from dax.bench.compare_variants import Arrangement, floor
from dax.bench.prompts import default_prompts, read_prompts
from dax.cache.step_plan import BRANCHES
from dax.errors import DaxError
from dax.generate import settle
from dax.generate.request import check_memory, make_request
from dax.generate.steps import checkpoint_of, schedule
from dax.plan import Plan
from dax.tune import sensitivity
from dax.tune.knobs import plan_of
from dax.tune.search import Option, Point

STATES = (0.1, 0.5, 0.9)  # where along a run sensitivity is measured


class Bench:
    """Measures plans against exact, on the prompts of a job, through the cells beside its output."""

    def __init__(self, job, log):
        self.checked = settle.check_model(job.model)
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
        self.arranged: dict[tuple[Option, ...], Arrangement] = {}

    def arrange(self, name: str, asked: Plan, rounded: bool = False) -> Arrangement:
        from dax.resolve import resolve

        resolved = resolve(asked, self.facts, self.here, dtype=self.dtype, checkpoint=self.checkpoint)
        return Arrangement(name, "plan", name, asked, resolved, rounded)

    def combined(self, options: tuple[Option, ...]) -> Arrangement:
        """The plan of a combination, on top of exact; DaxError if it cannot be had."""
        if options not in self.arranged:
            asked = plan_of(options, self.exact.asked, self.request.steps)
            self.arranged[options] = self.arrange(Point(options, 0).name, asked)
        return self.arranged[options]

    def forwards(self, each: Arrangement) -> int:
        """Forwards of one clip, from the step plan alone."""
        branches = BRANCHES if self.request.guidance_scale > 1 else BRANCHES[:1]
        found = each.resolved
        plan = schedule(found.plan.cache, found.calibration, self.facts, self.request, self.checkpoint)
        return sum(self.request.steps if plan is None else plan.computed[branch] for branch in branches)

    def cost(self, each: Arrangement) -> float:
        here, exact = self.forwards(each), self.forwards(self.exact)
        return costs.cost(each.plan, here, self.exact.plan, exact, self.facts.num_layers)

    def floor(self, requests: list) -> float:
        """PSNR of the noise floor in dB."""
        found = floor(self.exact.asked, self.here, self.dtype, self.facts.head_dim)
        return self.psnr(self.arrange(found.name, found.asked, found.rounded), requests)[0]

    def budgets(self, calibration: str) -> tuple[tuple[float, ...], str]:
        """(budgets of the step plans that the calibration for exact kernels holds, why there are none).

        DaxError if a calibration was named that does not fit.
        """
        values = {"cache.policy": "calibrated", "cache.budget": 1.0, "cache.file": calibration}
        try:
            each = self.arrange("", Plan.from_layers([("exact", self.exact.asked.leaves()), ("tune", values)])[0])
            if each.plan.cache.policy != "calibrated":
                return (), "no calibration of this model"
            self.forwards(each)
        except DaxError as error:
            if calibration != "auto":
                raise
            return (), str(error)
        found = each.resolved.calibration
        counts = {sum(rung.plan.computed.values()) for rung in found.rungs}
        return tuple(count / (2 * len(found.sigmas)) for count in sorted(counts, reverse=True)), ""

    def exact_seconds(self) -> float:
        """Seconds of exact's denoising loop here, the median of the prompts that are tuned on."""
        return median(cell.seconds["denoise"] for cell in self.cells(self.exact, self.requests))

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
