"""The search: its cost beside a plain sum of errors, its masks beside all masks, its weights beside least squares."""

import itertools
import random

import numpy as np
import pytest

from dax.cache.optimal import PREDICTORS, Predictor, Trajectory, best_masks, counts, neighbours, row, stretches, weights
from dax.cache.step_plan import COMPUTE, REUSE, flow_sigmas
from dax.errors import DaxError


def recorded(steps=9, noise=0.0, seed=0):
    """(Trajectory, velocities [n, D]) of smooth random velocities, rough at both ends as a model's are."""
    generator = np.random.default_rng(seed)
    sigmas = np.array(flow_sigmas(steps, 3.0))
    waves = generator.normal(size=(4, 40))
    curves = np.stack([np.ones(steps), sigmas**2, np.exp(-8 * sigmas), np.exp(8 * (sigmas - 1))], axis=1)
    velocities = curves @ waves + noise * generator.normal(size=(steps, 40))
    amplification = np.linspace(3.0, 1.0, steps)
    return Trajectory(sigmas, velocities @ velocities.T / 40, amplification), velocities


def predicted_error(trajectory, velocities, mask, kind):
    """What a mask does to the clip, summed up step by step from the velocities themselves."""
    total, stretch, known = 0.0, None, []
    ahead = np.diff(np.append(trajectory.sigmas, 0.0))
    for step, action in enumerate(row(trajectory, mask, Predictor(kind))):
        if action == COMPUTE:
            total, stretch = total + (0.0 if stretch is None else stretch), None
            known = [step, *known]
            error = 0.0
            continue
        guess = sum(w * velocities[k] for w, k in zip(action, known))
        error = error + ahead[step] * (guess - velocities[step])
        stretch = (trajectory.amplification[step] ** 2) * np.mean(error**2)
    return total + (stretch or 0.0)


@pytest.mark.parametrize("kind", ["reuse", "linear"])
@pytest.mark.parametrize("count", [3, 4, 6])
def test_the_best_mask_is_best_of_all_masks(kind, count):
    trajectory, velocities = recorded()
    masks = ["11" + "".join(rest) for rest in itertools.product("01", repeat=7) if rest.count("1") == count - 2]
    errors = {mask: predicted_error(trajectory, velocities, mask, kind) for mask in masks}
    best = best_masks(trajectory, kind)[count]
    assert errors[best] == pytest.approx(min(errors.values()), rel=1e-6) and best.count("1") == count


def test_every_count_can_be_had_and_more_is_never_worse():
    trajectory, velocities = recorded(12)
    for kind in ("reuse", "linear", "fitted"):
        masks = best_masks(trajectory, kind)
        assert set(masks) == set(range(2, 13)) and masks[12] == "1" * 12
    for steps, least in ((12, 2), (13, 2), (14, 3), (26, 4)):
        possible = counts(steps)
        assert set(best_masks(recorded(steps)[0], "reuse")) == set(possible) and possible[0] == least
    reuse = best_masks(trajectory, "reuse")
    errors = [predicted_error(trajectory, velocities, reuse[count], "reuse") for count in range(2, 13)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0


def test_fitted_weights_are_least_squares_and_damped_ones_are_smaller():
    trajectory, velocities = recorded()
    found = weights(trajectory, "fitted", 6, (4, 3, 1))
    exact, *_ = np.linalg.lstsq(velocities[[4, 3, 1]].T, velocities[6], rcond=None)
    assert found == pytest.approx(exact.tolist(), rel=1e-4)
    sizes = [np.abs(weights(trajectory.noisy(noise), "fitted", 6, (4, 3, 1))).sum() for noise in (0.0, 0.02, 0.5)]
    assert sizes == sorted(sizes, reverse=True)
    assert weights(trajectory, "fitted", 1, (0,)) == REUSE


def test_mending_makes_up_for_what_earlier_predictions_got_wrong():
    """What all errors add up to by the end shrinks; without mending each step is fitted for itself."""
    trajectory, velocities = recorded(20)
    mask, ahead = "11100100010000100101", np.diff(np.append(trajectory.sigmas, 0.0))
    left = {}
    for mend in (0.0, 0.5, 1.0):
        actions, total = row(trajectory, mask, Predictor("fitted", 1e-4, 4, mend)), 0.0
        known = []
        for step, action in enumerate(actions):
            if action == COMPUTE:
                known.insert(0, step)
                continue
            assert len(action) == min(4, len(known))
            if mend == 0.0:
                assert action == weights(trajectory.noisy(1e-4), "fitted", step, known[:4])
            total = total + ahead[step] * (sum(w * velocities[k] for w, k in zip(action, known)) - velocities[step])
        left[mend] = np.linalg.norm(total)
    assert left[1.0] < left[0.5] < left[0.0] and left[1.0] < 0.5 * left[0.0], left


def test_noise_turns_extrapolation_off():
    """The line wins on smooth velocities and loses on noisy ones, and the figure that says so tells them apart."""
    for noise, better in ((0.0, "linear"), (0.5, "reuse")):
        trajectory, _ = recorded(20, noise)
        change = {kind: np.median(trajectory.change(kind)) for kind in ("reuse", "linear")}
        cost = {kind: stretches(trajectory, kind)[9, 10, 14] for kind in change}
        assert min(change, key=change.get) == min(cost, key=cost.get) == better


def test_predictors_that_pretend_to_know_the_noise_are_told_apart():
    assert len({value for value in PREDICTORS.values()}) == len(PREDICTORS)


def test_neighbours_keep_the_count_and_the_first_step():
    generator, mask = random.Random(0), "110100100"
    near = {neighbours(mask, generator) for _ in range(200)}
    assert mask not in near and len(near) > 5
    assert all(m.count("1") == 4 and m[0] == "1" and sum(a != b for a, b in zip(m, mask)) == 2 for m in near)


def test_too_few_steps_to_leave_one_out():
    with pytest.raises(DaxError, match="2 steps: too few"):
        counts(2)
