"""`dax bench cache`: a calibrated step plan against TeaCache, MagCache and fewer steps, at equal numbers of forwards.

Everything is judged on prompts that no calibration saw, against the uncached run of the same kernels, by latent PSNR.
The rivals get what they need: both are calibrated for this model by their own procedure on the same recorded clips,
every retention and cap is tried with the threshold that gives just that number of computed steps, both forms of reuse
are tried, and the best is chosen on the very prompts that judge.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np

from dax.bench.prompts import HERE, default_prompts, read_prompts
from dax.cache.artifact import Artifact, find
from dax.cache.calibrate import Effort, calibrate
from dax.cache.magcache import magcache_mask
from dax.cache.policy import CALIBRATE
from dax.cache.record import Clips, fidelity, latent_psnr, make_clips, run, told
from dax.cache.step_plan import Setting, StepPlan
from dax.cache.teacache import changes, teacache_mask
from dax.errors import DaxError
from dax.plan import Plan

SHARES = (0.5, 0.4, 0.33)
EFFORT = Effort(budgets=SHARES, batch=16)
ENDS = (0, 1, 2, 3)  # steps TeaCache computes at the end
HEADS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)  # steps a rival computes at the start
CAPS = (1, 2, 3, 4, 6, 8, 10)  # MagCache's K
MOST_MASKS = 20  # of a rival, spread over all that its settings give
FINALISTS = 3  # of them, also tried in the residual form
COLUMNS = {
    "share": "share",
    "method": "method",
    "forwards": "forwards",
    "psnr_db": "latent PSNR dB",
    "p10_db": "p10",
    "tried": "masks tried",
    "detail": "which",
    "mask": "mask",
}


def bench(
    plan: str = "exact",
    effort: Effort = EFFORT,
    num_test: int = 16,
    steps: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    log: Callable = print,
    bar: bool = False,
) -> dict:
    """Calibrate the embedded model under a plan's kernels and hold the contest on it; the record, artifact included.

    Under a plan whose cache is calibrated, as `fast`, its calibration is judged, and none is made.
    Judged on combinations of colour, shape and motion that the tiny Wan was never trained on. `bar` as in calibrate.
    """
    import torch

    from dax.bench import report
    from dax.facts import FACTS
    from dax.hardware import machine
    from dax.models.tiny import load_tiny
    from dax.models.wan_steps import checkpoint_digest, time_embeddings
    from dax.optimize import optimize
    from dax.resolve import kernels_of

    here = machine(device)
    dtype = dtype or ("bfloat16" if here.device == "cuda" else "float32")
    pipe = load_tiny(here.device, getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    defaults = FACTS["tiny"].defaults
    steps = steps or defaults.steps
    seen, unseen = read_prompts(HERE / "tiny_trained.txt"), read_prompts(default_prompts("tiny", held_out=True))
    part, half = Plan.load(plan).cache, len(seen) // 2
    with optimize(pipe, plan, cache={"policy": "none"}) as engine, torch.no_grad():
        setting = Setting(
            steps,
            type(pipe.scheduler).__name__,
            defaults.flow_shift,
            defaults.guidance_scale,
            checkpoint_digest(pipe.transformer),
            kernels_of(engine.plan),
        )
        size = defaults.height, defaults.width, defaults.num_frames
        make = lambda prompts, seed: make_clips(pipe, prompts, size, steps, defaults.guidance_scale, seed)
        test = make(unseen[:num_test], 1000)
        if part.policy == "calibrated":
            artifact, spent = chosen(part, setting, effort), {"calibrated": part.file}
        else:
            clips = make(seen, 0)
            pipe.scheduler.set_timesteps(steps)
            moved = changes(time_embeddings(pipe.transformer, pipe.scheduler.timesteps, projected=True))
            artifact = calibrate(pipe, clips[:half], clips[half:], setting, "tiny", moved, effort, log, bar)
            prompts = {"calibration_prompts": half, "held_out_prompts": len(seen) - half}
            spent = {"calibrated": "in this run", **prompts, "effort": asdict(effort)}
        rows = contest(pipe, artifact, test, effort, log, bar)
    return report.record(
        "cache",
        here.device,
        model="tiny",
        **dict(zip(("height", "width", "num_frames"), size)),
        tokens=FACTS["tiny"].tokens(*size),
        dtype=dtype,
        setting=asdict(setting),
        **spent,
        test_prompts=len(test),
        rows=rows,
        artifact=artifact.to_json(),
    )


def chosen(part, setting: Setting, effort: Effort) -> Artifact:
    """The calibration that a plan's cache goes by, with the rungs of the contest's budgets. DaxError if none fits."""
    found = find(part.file, setting.checkpoint, setting.kernels)
    if found is None:
        raise DaxError("bad_request", f"bench cache: no calibration ships for this checkpoint; {CALIBRATE}")
    rungs = tuple(dict.fromkeys(found.rung(share, 0.0) for share in effort.budgets))
    for rung in rungs:
        rung.plan.check(setting)
    return replace(found, rungs=rungs)


def contest(pipe, artifact: Artifact, test: Clips, effort: Effort, log: Callable, bar: bool = False) -> list[dict]:
    """The rows of the table: every method at the number of computed steps of each rung of the artifact."""
    with told(pipe, "test prompts", test, effort.batch, log, bar):
        reference = run(pipe, test, effort.batch)
    rows = []

    def add(count: int, method: str, db: np.ndarray, tried: int, detail: str, mask: str = "") -> None:
        rows.append(
            {
                "share": count / test.steps,
                "method": method,
                "forwards": 2 * count,
                "psnr_db": float(db.mean()),
                "p10_db": float(np.percentile(db, 10)),
                "tried": tried,
                "detail": detail,
                "mask": mask,
                "clips_db": db.tolist(),
            }
        )
        log(f"{count} of {test.steps}: {method} {db.mean():.2f} dB, p10 {np.percentile(db, 10):.2f} ({detail})")

    for rung in artifact.rungs:
        mask, count = rung.plan.mask(), rung.plan.computed["cond"]
        add(count, "calibrated", fidelity(pipe, rung.plan, test, reference, effort.batch), 1, rung.predictor, mask)
        for method, settings in (("TeaCache", teacache_settings), ("MagCache", magcache_settings)):
            masks = settings(artifact, count)
            db, tried, name, best = sweep(pipe, masks, test, reference, effort.batch)
            add(count, method, db, tried, name, best)
        shorter = run(pipe, replace(test, steps=count), effort.batch)
        add(count, "fewer steps", latent_psnr(shorter, reference), 1, "UniPC")
        add(count, "same steps", on_subset(pipe, test, mask, reference, effort.batch), 1, "UniPC on the subset", mask)
    return rows


def sweep(pipe, masks: dict[str, str], test: Clips, reference, batch: int) -> tuple[np.ndarray, int, str, str]:
    """(dB of each clip, masks run, setting, mask) of the best, reusing velocities or, for the finalists, residuals.

    Settings that give one mask are run once.
    """
    found, names = {}, {mask: name for name, mask in reversed(masks.items())}
    spread = [list(names)[round(i)] for i in np.linspace(0, len(names) - 1, min(len(names), MOST_MASKS))]
    for mask in spread:
        plan = StepPlan.of_mask(mask, "velocity")
        found[names[mask]] = fidelity(pipe, plan, test, reference, batch), mask
    for name in sorted(found, key=lambda name: -found[name][0].mean())[:FINALISTS]:
        mask = found[name][1]
        plan = StepPlan.of_mask(mask, "residual", reuse="residual")
        found[f"{name}, residual"] = fidelity(pipe, plan, test, reference, batch), mask
    best = max(found, key=lambda name: found[name][0].mean())
    return found[best][0], len(spread), best, found[best][1]


def teacache_settings(artifact: Artifact, count: int) -> dict[str, str]:
    """{setting: mask} of `count` computed steps: every retention at both ends with the threshold that gives it."""
    steps, found = len(artifact.sigmas), {}
    for first in HEADS:
        for last in ENDS:
            if first + last > count:
                continue
            make = lambda t: teacache_mask(artifact.moved, artifact.teacache, t, first, last)  # noqa: B023
            threshold = threshold_for(make, count, 1e3)
            if threshold is not None:
                found[f"threshold {threshold:.4g}, first {first}, last {last} of {steps}"] = make(threshold)
    return found


def magcache_settings(artifact: Artifact, count: int) -> dict[str, str]:
    """{setting: mask} of `count` computed steps: every retention and cap with the threshold that gives it."""
    steps, found = len(artifact.sigmas), {}
    for head in (head for head in HEADS if head <= count):
        for cap in CAPS:
            make = lambda t: magcache_mask(artifact.magcache.cond, t, cap, head / steps)  # noqa: B023
            threshold = threshold_for(make, count, 10.0)
            if threshold is not None:
                found[f"threshold {threshold:.4g}, K {cap}, retention {head / steps:.2f}"] = make(threshold)
    return found


def threshold_for(make: Callable[[float], str], count: int, most: float) -> float | None:
    """The threshold whose mask computes `count` steps; None if no threshold does. A larger one computes fewer."""
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        computed = make(middle).count("1")
        if computed == count:
            return middle
        low, high = (middle, high) if computed > count else (low, middle)
    return None


def on_subset(pipe, test: Clips, mask: str, reference, batch: int) -> np.ndarray:
    """Latent PSNR of the pipeline's solver run on just the noise levels that a mask computes."""
    scheduler, shift = pipe.scheduler, pipe.scheduler.config.flow_shift
    scheduler.set_timesteps(test.steps)
    levels = [float(s) for s, letter in zip(scheduler.sigmas, mask) if letter == "1"]
    even = np.array([s / (shift - (shift - 1) * s) for s in levels])  # the scheduler shifts what it is given
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    inner = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda n, device=None: inner(device=device, sigmas=even.copy())
    try:
        return latent_psnr(run(pipe, replace(test, steps=len(levels)), batch), reference)
    finally:
        pipe.scheduler = scheduler
