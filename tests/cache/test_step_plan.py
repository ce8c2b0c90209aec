"""Tables that cannot be run are refused; the rest survive JSON and know what they were made for."""

import json
from dataclasses import replace

import pytest

from dax.cache.step_plan import (
    COMPUTE,
    DROP,
    REUSE,
    Setting,
    StepPlan,
    check_mask,
    flow_sigmas,
    guidance_rows,
    linear,
)
from dax.errors import DaxError

ROW = (COMPUTE, COMPUTE, REUSE, (1.5, -0.5), COMPUTE, (1.0,))
SETTING = Setting(6, "UniPCMultistepScheduler", 3.0, 4.0, "a" * 64, "exact")
PLAN = StepPlan(ROW, ROW, "test", SETTING, sigmas=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4))


def test_a_plan_survives_json_and_tells_itself_apart():
    again = StepPlan.from_json(json.loads(json.dumps(PLAN.to_json())))
    assert again == PLAN and hash(again) == hash(PLAN) and again.hash() == PLAN.hash()
    assert replace(PLAN, setting=replace(SETTING, steps=7)).hash() != PLAN.hash()


def test_what_a_plan_says_of_itself():
    assert (PLAN.mask(), PLAN.computed, PLAN.depth, PLAN.joint) == ("110010", {"cond": 3, "uncond": 3}, 2, True)
    assert PLAN.actions("cond_uncond") == ROW
    apart = replace(PLAN, uncond=guidance_rows(ROW, every=2, drop_last=1))
    assert apart.mask("uncond") == "10001-" and apart.computed == {"cond": 3, "uncond": 2}
    with pytest.raises(DaxError, match="branches differ, and the pipeline runs them together as 'cond_uncond'"):
        apart.actions("cond_uncond")


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("6 steps of cond and 5 of uncond", {"uncond": ROW[:5]}),
        ("the first step of cond must be computed", {"cond": (REUSE, *ROW[1:])}),
        ("step 1 of uncond: 2 weights, 1 velocities are known", {"uncond": (COMPUTE, (1.0, 0.0), *ROW[2:])}),
        ("step 2 of cond: (1.0, nan) is no action", {"cond": (*ROW[:2], (1.0, float("nan")), *ROW[3:])}),
        ("step 2 of cond: 'skip' is no action", {"cond": (*ROW[:2], "skip", *ROW[3:])}),
        ("step 5 drops cond", {"cond": (*ROW[:5], DROP)}),
        ("a residual is reused as it is", {"reuse": "residual"}),
        ("reuse = 'noise'", {"reuse": "noise"}),
        ("2 noise levels for 6 steps", {"sigmas": (0.9, 0.8)}),
    ],
)
def test_tables_that_cannot_be_run(says, change):
    with pytest.raises(DaxError) as caught:
        replace(PLAN, **change)
    assert says in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("damage", [{"format": "dax step plan 0"}, {"cond": None}, {"cond": [["x"]]}, {"setting": 3}])
def test_damaged_json(damage):
    with pytest.raises(DaxError, match="step plan"):
        StepPlan.from_json({**PLAN.to_json(), **damage})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 20, "its steps is 6, not 20"),
        ("scheduler", "FlowMatchEulerDiscreteScheduler", "its scheduler is UniPC"),
        ("flow_shift", 5.0, "its flow_shift is 3.0, not 5.0"),
        ("guidance_scale", 5.0, "its guidance_scale is 4.0, not 5.0"),
        ("checkpoint", "b" * 64, "its checkpoint is aaaaaaaa, not bbbbbbbb"),
    ],
)
def test_another_setting_is_refused_with_the_reason(field, value, says):
    PLAN.check(SETTING)
    with pytest.raises(DaxError, match=says):
        PLAN.check(replace(SETTING, **{field: value}))


@pytest.mark.fault(7)
def test_row_7_a_table_of_another_length():
    free = StepPlan(ROW, ROW, "mask")
    free.check(Setting(steps=6))
    with pytest.raises(DaxError, match=r"the step plan \(mask\) has 6 steps, the run has 8"):
        free.check(Setting(steps=8))


@pytest.mark.parametrize(("mask", "says"), [("0111", "first step must be 1"), ("11x1", "one letter"), ("", "one")])
def test_masks_that_are_none(mask, says):
    with pytest.raises(DaxError, match=says):
        check_mask(mask)
    assert check_mask("1100 1") == "11001"


def test_a_line_in_sigma_predicts_what_is_linear_in_sigma():
    sigmas = flow_sigmas(6, 3.0)
    velocity = [3.0 - 2.0 * s for s in sigmas]
    for step, *known in ((2, 1, 0), (3, 1, 0), (5, 4, 1)):
        weights = linear(sigmas, step, *known)
        assert sum(w * velocity[i] for w, i in zip(weights, known)) == pytest.approx(velocity[step])


def test_noise_levels_are_those_of_the_vendors_scheduler():
    from diffusers import UniPCMultistepScheduler

    for steps, shift in ((50, 5.0), (7, 3.0), (1, 1.0)):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        assert flow_sigmas(steps, shift) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
