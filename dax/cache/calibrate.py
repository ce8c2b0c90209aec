"""Calibrating a step cache: from a few prompts' exact runs to step plans for a ladder of budgets, in one artifact.

Record exact runs with the kernels that will be used, measure how errors made at a few places have grown at the end,
find the best mask for each predictor by dynamic programming, let a hill climb on real cached runs correct what the
model of errors got wrong, and keep what is best on prompts none of that has seen.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dax.cache import magcache, teacache
from dax.cache.artifact import Artifact, Rung
from dax.cache.optimal import LONGEST, PREDICTORS, Trajectory, best_masks, counts, neighbours, row
from dax.cache.record import Clips, Recording, fidelity, gated, latent_psnr, record, run, told
from dax.cache.step_plan import COMPUTE, REUSE, Setting, StepPlan
from dax.errors import DaxError

BUDGETS = (0.5, 0.4, 0.33, 0.25)
FINALISTS = 3  # plans of a budget that are judged on held-out prompts
HARMLESS = 1e-5  # a change of the first noise too small to matter, but for the rounding it sets off
PROBES = (0.04, 0.1, 0.2, 0.4, 0.7, 0.95)  # where along the run amplification is measured


@dataclass(frozen=True)
class Effort:
    """How much to spend. Counted in runs of the calibration clips: exact ones cost all steps, cached ones their share.

    budgets  shares of the forwards to make plans for
    probes   of amplification: an almost exact run each
    climb    cached runs of the hill climb, for each budget
    batch    clips at a time
    """

    budgets: tuple[float, ...] = BUDGETS
    probes: int = len(PROBES)
    climb: int = 40
    batch: int = 1
    seed: int = 0

    def computed(self, steps: int) -> list[int]:
        """Computed steps of each budget, most first. DaxError("bad_request") for one that leaves nothing to choose."""
        possible, found = counts(steps), []
        for budget in sorted(self.budgets, reverse=True):
            if not (0 < budget <= 1 and int(budget * steps + 1e-9) in possible):
                least = f"{possible[0]} of {steps} steps are the least, budget {possible[0] / steps:.2g}"
                raise DaxError("bad_request", f"budget {budget:g}: {least}; the most is 1")
            found.append(int(budget * steps + 1e-9))
        return found


@dataclass(frozen=True)
class Study:
    """What the search for plans goes by: the pipeline, the recorded clips, and unseen ones with their exact latents."""

    pipe: object
    clips: Clips
    recording: Recording
    held_out: Clips
    reference: torch.Tensor
    trajectory: Trajectory
    setting: Setting
    effort: Effort

    def plan(self, mask: str, predictor: str) -> StepPlan:
        actions = row(self.trajectory, mask, PREDICTORS[predictor])
        name = f"calibrated {predictor} plan, {mask.count('1')} of {len(mask)} steps"
        return StepPlan(actions, actions, name, self.setting, sigmas=tuple(map(float, self.trajectory.sigmas)))

    def seen(self, mask: str, predictor: str) -> float:
        """Mean latent PSNR in dB on the recorded clips."""
        plan = self.plan(mask, predictor)
        return float(fidelity(self.pipe, plan, self.clips, self.recording.latents, self.effort.batch).mean())

    def unseen(self, mask: str, predictor: str) -> Rung:
        """The plan with its latent PSNR on the held-out clips."""
        plan = self.plan(mask, predictor)
        db = fidelity(self.pipe, plan, self.held_out, self.reference, self.effort.batch)
        return Rung(plan, predictor, float(db.mean()), float(np.percentile(db, 10)))

    def rung(self, count: int, masks: dict[str, str], log: Callable, bar: bool) -> Rung:
        """The best plan of `count` computed steps, from each predictor's mask of least predicted error."""
        batch, runs = self.effort.batch, len(masks) + self.effort.climb
        with told(self.pipe, f"{count} steps, search", self.clips, batch, log, bar, runs):
            start = {predictor: self.seen(mask, predictor) for predictor, mask in masks.items()}
            by_score = sorted(start, key=start.get, reverse=True)
            best = by_score[0]
            generator = random.Random(self.effort.seed + count)
            score, mask = climb(start[best], masks[best], lambda m: self.seen(m, best), self.effort.climb, generator)
        candidates = dict.fromkeys([(best, mask), *((predictor, masks[predictor]) for predictor in by_score)])
        judged = list(candidates)[:FINALISTS]
        with told(self.pipe, f"{count} steps, held-out prompts", self.held_out, batch, log, bar, len(judged)):
            finalists = [self.unseen(mask, predictor) for predictor, mask in judged]
        rung = max(finalists, key=lambda rung: rung.psnr_db)
        log(
            f"{count} steps: {', '.join(f'{p} {db:.1f} dB' for p, db in start.items())}, climbed {score:.1f}; "
            f"{rung.predictor} holds {rung.psnr_db:.1f} on {len(self.held_out)} held-out prompts"
        )
        return rung


def calibrate(
    pipe,
    clips: Clips,
    held_out: Clips,
    setting: Setting,
    model: str,
    moved: list[float],
    effort: Effort,
    log: Callable = print,
    bar: bool = False,
) -> Artifact:
    """Make the artifact of the pipeline as it is.

    clips     to record and to climb on; `held_out` only judges and chooses
    setting   what to tie the plans to
    moved     relative change of the projected time embedding between steps, see teacache.changes
    bar       runs are shown as bars on stderr; else each is a line of `log`
    DaxError("bad_request") for budgets that leave nothing to choose.
    """
    budgets = effort.computed(clips.steps)
    log(f"recording {len(clips)} + {len(held_out)} exact runs of {clips.steps} steps")
    with told(pipe, "recording", clips, effort.batch, log, bar):
        recording = record(pipe, clips, effort.batch)
    with told(pipe, "noise floor", clips, effort.batch, log, bar):
        floor = noise_floor(pipe, clips, recording, effort.batch)
    log(f"a harmless change moves the clips by {floor:.2g}, {floor_db(recording, floor):.1f} dB")
    grown = amplification(pipe, clips, recording, floor, effort, log, bar)
    trajectory = Trajectory(recording.sigmas, recording.gram, grown)
    with told(pipe, "held-out prompts", held_out, effort.batch, log, bar):
        reference = run(pipe, held_out, effort.batch)
    study = Study(pipe, clips, recording, held_out, reference, trajectory, setting, effort)
    said = notes(trajectory)
    tried = {name: how for name, how in PREDICTORS.items() if not said or how.kind != "linear"}
    masks = {name: best_masks(trajectory.noisy(how.noise), how.kind) for name, how in tried.items()}
    rungs = [study.rung(n, {predictor: found[n] for predictor, found in masks.items()}, log, bar) for n in budgets]
    ratios = {branch: tuple(found.tolist()) for branch, found in recording.ratios.items()}
    return Artifact(
        model=model,
        setting=setting,
        sigmas=tuple(map(float, recording.sigmas)),
        rungs=tuple(rungs),
        moved=tuple(moved),
        teacache=teacache.fit(moved, recording.changes, replace(setting, kernels=None)),
        magcache=magcache.Ratios(**ratios, flow_shift=setting.flow_shift),
        floor_db=floor_db(recording, floor),
        notes=tuple(said),
    )


def noise_floor(pipe, clips: Clips, recording: Recording, batch: int) -> float:
    """Root mean square difference of the final latents after a change of the noise that only rounding can amplify."""
    return distance(run(pipe, replace(clips, noise=clips.noise * (1 + HARMLESS)), batch), recording)


def floor_db(recording: Recording, floor: float) -> float:
    """The noise floor as latent PSNR: two exact runs are no closer than that."""
    return float(latent_psnr(recording.latents + floor, recording.latents).mean())


def amplification(
    pipe, clips: Clips, recording: Recording, floor: float, effort: Effort, log: Callable, bar: bool = False
) -> np.ndarray:
    """[n] how much an error in the velocity at each step, times the step's length, has grown in the final latents.

    Measured at a few places, by leaving out a stretch that is heard above the noise floor, and interpolated between in
    the logarithm. What rounding does anyway is taken off; a probe that does not rise above it has not grown.
    """
    n, found = clips.steps, {}
    trajectory = Trajectory(recording.sigmas, recording.gram, np.ones(n))
    probed = sorted({min(n - 1, max(2, round(part * n))) for part in PROBES[: effort.probes]})
    if not probed:
        return np.ones(n)
    with told(pipe, "how errors grow", clips, effort.batch, log, bar, len(probed)):
        for step in probed:
            left_out, made, middle = audible(trajectory, step, floor)
            actions = tuple(REUSE if i in left_out else COMPUTE for i in range(n))
            with gated(pipe, StepPlan(actions, actions, "probe")):
                error = distance(run(pipe, clips, effort.batch), recording)
            found[middle] = float(np.sqrt(error**2 - floor**2) / made) if error > 1.5 * floor else 1.0
    found = dict(sorted(found.items()))
    log("errors grow by " + ", ".join(f"{value:.2f} from step {step}" for step, value in found.items()))
    return np.exp(np.interp(np.arange(n), list(found), np.log(list(found.values()))))


def audible(trajectory: Trajectory, step: int, floor: float) -> tuple[range, float, int]:
    """(steps to leave out from `step` on, the error in the latents that reuse makes there, where it lies on average).

    As many as it takes for that error to reach the floor, ungrown. One step of a bf16 run does not: its growth would
    be taken for rounding, and a mask would leave out the early steps, where errors grow most.
    """
    error, shares = np.zeros(trajectory.steps), []
    for last in range(step, min(step + LONGEST - 1, trajectory.steps)):
        missed = trajectory.ahead()[last] * trajectory.error(last, REUSE, (step - 1,))
        error, shares = error + missed, [*shares, trajectory.rms(missed)]
        if trajectory.rms(error) >= floor:
            break
    left_out = range(step, step + len(shares))
    return left_out, trajectory.rms(error), round(float(np.average(left_out, weights=shares)))


def distance(latents: torch.Tensor, recording: Recording) -> float:
    """Root mean square difference from where the recorded runs ended."""
    return float((latents.double() - recording.latents.double()).square().mean().sqrt())


def climb(score: float, mask: str, evaluate: Callable[[str], float], tries: int, generator) -> tuple[float, str]:
    """(score, mask) after `tries` evaluations of masks near the best so far, each better one kept."""
    seen = {mask}
    for _ in range(tries):
        near = neighbours(mask, generator)
        if near in seen:
            continue
        seen.add(near)
        found = evaluate(near)
        if found > score:
            score, mask = found, near
    return score, mask


def notes(trajectory: Trajectory) -> list[str]:
    """What a user of the artifact should know: that the line is not tried, for the noise it would extrapolate."""
    reuse, line = (100 * float(np.median(trajectory.change(kind))) for kind in ("reuse", "linear"))
    if line < reuse:
        return []
    return [
        f"linear extrapolation is off: the velocity's noise exceeds its change from step to step (reuse misses by "
        f"{reuse:.1f} %, the line by {line:.1f} %)"
    ]
