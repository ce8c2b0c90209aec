"""From a plan's words under `cache.` to a step plan: what each policy needs, what it is refused for, what it falls to.

`resolve_cache` decides what can be decided from the model alone, before anything loads; `maker` gives the function that
makes the table once the loop's steps and noise levels are known. Neither imports torch.
"""

from collections.abc import Callable, Sequence

from dax.cache import magcache, teacache
from dax.cache.artifact import Artifact, find
from dax.cache.step_plan import Setting, StepPlan, actions_of, check_mask, flow_sigmas, guidance_rows
from dax.errors import DaxError
from dax.facts import Facts
from dax.plan import Cache

MAGCACHE_FAST = {"threshold": 0.24, "max_skips": 6, "retention": 0.2}
TEACACHE = {"threshold": 0.1}
ANY = Setting()
CALIBRATE = "run `dax calibrate`"


def resolve_cache(
    cache: Cache, model: str, checkpoint: str | None, kernels: str, plain: bool = True
) -> tuple[Cache, Artifact | None, list[str], list[str]]:
    """(the part with every `auto` decided, the calibration it goes by, notes, fallbacks) for a model and checkpoint.

    The part names a calibration by its digest, never by a path. DaxError("bad_request") if the policy has nothing to
    go by for this model.
    plain   whether `dax calibrate` knows such a model, see Facts
    """
    notes, fallbacks = [], []
    if cache.policy in ("none", "mask"):
        if cache.policy == "mask":
            check_mask(cache.mask, "cache.mask")
        return cache, None, notes, fallbacks
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
    update = {}
    if found is not None:
        update["file"] = f"sha256:{found.digest()}"
    if cache.policy == "calibrated" and found is None:
        update = {"policy": "magcache", **MAGCACHE_FAST}
        fallbacks.append(
            f"cache.policy = calibrated: no calibration of this checkpoint; the published mask of {model} instead "
            f"(MagCache .24/6)" + f"; {CALIBRATE} for a better one" * plain
        )
    elif cache.policy == "calibrated":
        rung = found.rung(cache.budget, cache.min_psnr)
        notes.append(f"cache: {rung.plan.made_by}, {rung.psnr_db:.1f} dB on held-out prompts")
        notes += [f"cache: {text}" for text in found.notes]
        if found.setting.kernels != kernels:
            fallbacks.append(
                f"cache.policy = calibrated: the plan was calibrated on other kernels ({found.setting.kernels}) than "
                f"these ({kernels}); {CALIBRATE} with this plan"
            )
    elif cache.policy == "magcache":
        for key, value in MAGCACHE_FAST.items():
            update |= {key: value} if getattr(cache, key) == "auto" else {}
    elif cache.threshold == "auto":
        update |= TEACACHE
    return cache.model_copy(update=update), found, notes, fallbacks


def maker(cache: Cache, found: Artifact | None, facts: Facts, embeddings: Callable | None = None) -> Callable:
    """make(setting, sigmas, timesteps, train_steps) -> StepPlan for a resolved part and its calibration, see `Gate`.

    With two experts nothing of the second is predicted from what the first said: it begins with a computed step.
    embeddings   (timesteps, projected) -> [steps, C] fp32 time embeddings of the model; without it a TeaCache plan is
                 known only if the calibration holds its numbers, else make returns None
    """

    def make(setting: Setting, sigmas: Sequence[float] | None, timesteps=None, train_steps=None) -> StepPlan | None:
        plan = table(setting, sigmas, timesteps)
        if plan is None or facts.num_experts == 1:
            return plan
        if timesteps is None:
            shares = facts.expert_steps(sigmas or flow_sigmas(setting.steps, setting.flow_shift), 1)
        else:
            shares = facts.expert_steps(timesteps.tolist(), train_steps)
        return plan.restarted(shares[0])

    def table(setting: Setting, sigmas: Sequence[float] | None, timesteps) -> StepPlan | None:
        steps = setting.steps
        if steps is None:
            raise DaxError("bad_request", "step cache: the number of steps is unknown: optimize the pipeline")
        if cache.policy == "calibrated":
            plan = found.rung(cache.budget, cache.min_psnr).plan
            plan.check(setting)
            return guided(plan.cond, plan.made_by, plan.setting, plan.sigmas)
        if cache.policy == "mask":
            mask = check_mask(cache.mask, "cache.mask")
            if len(mask) != steps:
                raise DaxError("bad_request", f"cache.mask has {len(mask)} letters, the run has {steps} steps")
            return guided(actions_of(mask), "mask")
        sigmas = sigmas if sigmas is not None else flow_sigmas(steps, setting.flow_shift)
        if cache.policy == "magcache":
            return magcache_plan(sigmas)
        return teacache_plan(setting, timesteps)

    def guided(row, made_by: str, made_for: Setting = ANY, sigmas=None) -> StepPlan:
        every, last = cache.uncond_every, cache.drop_uncond
        if every > 1:
            made_by += f", uncond at every {every}th computed step"
        if last:
            made_by += f", no guidance in the last {last} steps"
        return StepPlan(row, guidance_rows(row, every, last), made_by, made_for, cache.reuse, sigmas)

    def magcache_plan(sigmas) -> StepPlan:
        ratios = found.magcache if found else magcache.PUBLISHED[facts.name]
        own = found.sigmas if found else flow_sigmas(len(ratios.cond), ratios.flow_shift)
        here = ratios.at(sigmas, own)
        mask = magcache.magcache_mask(here.cond, cache.threshold, cache.max_skips, cache.retention)
        made_by = f"MagCache {cache.threshold:g}/{cache.max_skips}, {'calibrated' if found else 'published'}"
        if here is not ratios:
            made_by += f", interpolated from {len(own)} steps at shift {ratios.flow_shift:g}"
        return guided(actions_of(mask), made_by)

    def teacache_plan(setting: Setting, timesteps) -> StepPlan | None:
        polynomial = found.teacache if found else teacache.PUBLISHED[facts.name][cache.ret_steps]
        if wrong := polynomial.setting.differences(setting, but=("kernels", "scheduler", "guidance_scale")):
            raise DaxError(
                "bad_request",
                f"cache.policy = teacache: its polynomial was fitted where {', '.join(wrong)}; change the request, "
                f"{CALIBRATE}, or take another policy",
            )
        first, last = teacache.RETAINED[cache.ret_steps]
        if found:
            moved = found.moved
        elif embeddings is None:
            return None
        else:
            moved = teacache.changes(embeddings(timesteps, polynomial.projected))
        mask = teacache.teacache_mask(moved, polynomial, cache.threshold, first, last)
        made_by = f"TeaCache {cache.threshold:g}, {'calibrated' if found else 'published'}"
        return guided(actions_of(mask), made_by)

    return make
