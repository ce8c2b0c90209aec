"""From a plan's words under `cache.` to a step plan: what each policy needs, what it is refused for, what it falls to.

`resolve_cache` decides what can be decided from the model alone, before anything loads; `Maker` makes the table once
the loop's steps and noise levels are known. Neither imports torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dax.cache import magcache, teacache
from dax.cache.artifact import Artifact, find
from dax.cache.step_plan import Setting, StepPlan, check_mask, flow_sigmas, guidance_rows
from dax.errors import DaxError
from dax.facts import Facts
from dax.plan import Cache

AUTO = {  # policy: what `auto` is for its keys
    "magcache": {"threshold": 0.24, "max_skips": 6, "retention": 0.2},
    "teacache": {"threshold": 0.1},
}
CALIBRATE = "run `dax calibrate`"


def resolve_cache(
    cache: Cache, model: str, checkpoint: str | None, kernels: str, plain: bool = True
) -> tuple[Cache, Artifact | None, list[str], list[str]]:
    """(the part with every `auto` decided, the calibration it goes by, notes, fallbacks) for a model and checkpoint.

    The part names a calibration by its digest, never by a path. DaxError("bad_request") if the policy has nothing to
    go by for this model.
    plain   whether `dax calibrate` knows such a model, see Facts
    """
    if cache.policy == "mask":
        check_mask(cache.mask, "cache.mask")
    if cache.policy in ("none", "mask"):
        return cache, None, [], []
    found = calibration_of(cache, model, checkpoint, kernels, plain)
    update = {} if found is None else {"file": f"sha256:{found.digest()}"}
    notes, fallbacks = [], []
    if cache.policy != "calibrated":
        update |= {key: value for key, value in AUTO[cache.policy].items() if getattr(cache, key) == "auto"}
    elif found is None:
        update = {"policy": "magcache", **AUTO["magcache"]}
        fallbacks.append(
            f"cache.policy = calibrated: no calibration of this checkpoint; the published mask of {model} instead "
            f"(MagCache .24/6)" + f"; {CALIBRATE} for a better one" * plain
        )
    else:
        rung = found.rung(cache.budget, cache.min_psnr)
        notes.append(f"cache: {rung.plan.made_by}, {rung.psnr_db:.1f} dB on held-out prompts")
        notes += [f"cache: {text}" for text in found.notes]
        if found.setting.kernels == "exact" != kernels:
            notes.append("cache: calibrated on exact kernels, where no noise hides what a step costs")
        elif found.setting.kernels != kernels:
            fallbacks.append(
                f"cache.policy = calibrated: the plan was calibrated on other kernels ({found.setting.kernels}) than "
                f"these ({kernels}); {CALIBRATE} with this plan, or with exact"
            )
    return cache.model_copy(update=update), found, notes, fallbacks


def calibration_of(cache: Cache, model: str, checkpoint: str | None, kernels: str, plain: bool) -> Artifact | None:
    """The calibration of a checkpoint, None where what is published for the model has to do.

    DaxError("bad_request") for one of another checkpoint, or where there is neither.
    """
    found = find(cache.file, checkpoint, kernels)
    if found is not None and checkpoint is not None and found.setting.checkpoint != checkpoint:
        raise DaxError(
            "bad_request",
            f"cache.file {cache.file}: calibrated for another checkpoint ({found.model}, "
            f"{str(found.setting.checkpoint)[:8]}, not {checkpoint[:8]}): {CALIBRATE} with this model",
        )
    if found is None and model not in magcache.PUBLISHED:
        mask = "set cache.policy = mask with a cache.mask"
        instead = f"{CALIBRATE} and give its file as cache.file" if plain else mask
        raise DaxError(
            "bad_request",
            f"cache.policy = {cache.policy}: nothing is published or calibrated for {model}: {instead}, or set "
            "cache.policy = none",
        )
    return found


@dataclass(frozen=True)
class Maker:
    """Makes tables for a resolved part and the calibration it goes by; what a Gate asks when a run begins.

    embeddings   (timesteps, projected) -> [steps, C] fp32 time embeddings of the model; without it a TeaCache plan is
                 known only if the calibration holds its numbers, else the table is None
    """

    cache: Cache
    found: Artifact | None
    facts: Facts
    embeddings: Callable | None = None

    def __call__(
        self, setting: Setting, sigmas: Sequence[float] | None, timesteps=None, train_steps: int | None = None
    ) -> StepPlan | None:
        """The table of one run: the policy's steps, then guidance, then where a second expert begins.

        sigmas, timesteps   of each step: floats, and a tensor of a scheduler of so many `train_steps`; None: not known
        DaxError("bad_request") for a run that the policy, or what it goes by, is not for.
        """
        cache, facts = self.cache, self.facts
        if setting.steps is None:
            raise unknown("number of steps is")
        if sigmas is None and setting.flow_shift is not None:
            sigmas = flow_sigmas(setting.steps, setting.flow_shift)
        if cache.policy == "calibrated":
            plan = self.found.rung(cache.budget, cache.min_psnr).plan
            plan.check(setting)
        elif cache.policy == "mask":
            mask = check_mask(cache.mask, "cache.mask")
            if len(mask) != setting.steps:
                raise DaxError("bad_request", f"cache.mask has {len(mask)} letters, the run has {setting.steps} steps")
            plan = StepPlan.of_mask(mask, "mask")
        elif cache.policy == "magcache":
            plan = self.by_magcache(sigmas)
        else:
            plan = self.by_teacache(setting, timesteps)
        if plan is None:
            return None
        plan = guided(plan, cache)
        if facts.num_experts == 1:
            return plan
        known = (sigmas, 1) if timesteps is None else (timesteps.tolist(), train_steps)
        return plan.restarted(facts.expert_steps(*known)[0])  # nothing of the second is predicted from the first

    def by_magcache(self, sigmas: Sequence[float] | None) -> StepPlan:
        """By the calibrated or published ratios, moved to the noise levels of the run."""
        if sigmas is None:
            raise unknown("noise levels are")
        cache, found = self.cache, self.found
        ratios = found.magcache if found else magcache.PUBLISHED[self.facts.name]
        own = found.sigmas if found else flow_sigmas(len(ratios.cond), ratios.flow_shift)
        here = ratios.at(sigmas, own)
        made_by = f"MagCache {cache.threshold:g}/{cache.max_skips}, {'calibrated' if found else 'published'}"
        if here is not ratios:
            made_by += f", interpolated from {len(own)} steps at shift {ratios.flow_shift:g}"
        mask = magcache.magcache_mask(here.cond, cache.threshold, cache.max_skips, cache.retention)
        return StepPlan.of_mask(mask, made_by)

    def by_teacache(self, setting: Setting, timesteps) -> StepPlan | None:
        """By the calibrated or published polynomial, where it was fitted; None if it takes embeddings not here."""
        cache, found = self.cache, self.found
        polynomial = found.teacache if found else teacache.PUBLISHED[self.facts.name][cache.ret_steps]
        if wrong := polynomial.setting.differences(setting, but=("kernels", "scheduler", "guidance_scale")):
            raise DaxError(
                "bad_request",
                f"cache.policy = teacache: its polynomial was fitted where {', '.join(wrong)}; change the request, "
                f"{CALIBRATE}, or take another policy",
            )
        if found:
            moved = found.moved
        elif self.embeddings is None:
            return None
        elif timesteps is None:
            raise unknown("timesteps are")
        else:
            moved = teacache.changes(self.embeddings(timesteps, polynomial.projected))
        mask = teacache.teacache_mask(moved, polynomial, cache.threshold, *teacache.RETAINED[cache.ret_steps])
        return StepPlan.of_mask(mask, f"TeaCache {cache.threshold:g}, {'calibrated' if found else 'published'}")


def unknown(what: str) -> DaxError:
    """For a transformer that runs without its pipeline, whose scheduler would tell."""
    return DaxError("bad_request", f"step cache: the {what} unknown: optimize the pipeline")


def guided(plan: StepPlan, cache: Cache) -> StepPlan:
    """The cond row of a plan with the guidance and the reuse that the part asks for."""
    made_by = plan.made_by
    if cache.uncond_every > 1:
        made_by += f", uncond at every {cache.uncond_every}th computed step"
    if cache.drop_uncond:
        made_by += f", no guidance in the last {cache.drop_uncond} steps"
    uncond = guidance_rows(plan.cond, cache.uncond_every, cache.drop_uncond)
    return replace(plan, uncond=uncond, made_by=made_by, reuse=cache.reuse)
