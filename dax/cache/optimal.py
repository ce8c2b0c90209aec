"""The best table for a budget: which steps to compute, and with which weights to predict the others.

All it needs of a model is the Gram matrix of the guided velocities of exact runs: the error of any prediction is a
combination of velocities, and its square a quadratic form. What a stretch of predicted steps does to the clip is the
sum of its errors times the steps in sigma they are taken over; a shortest path over (last two computed steps, number
computed) finds the computed steps that make the sum of those squares least.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dax.cache.step_plan import COMPUTE, MOST_WEIGHTS, REUSE, Action, linear
from dax.errors import DaxError

PREDICTORS = {  # name: (kind, noise: what a computed velocity is off by, relative to its size)
    "reuse": ("reuse", 0.0),
    "linear": ("linear", 0.0),
    "fitted": ("fitted", 0.004),
    "damped": ("fitted", 0.015),
    "much damped": ("fitted", 0.05),
}
LONGEST = 12  # steps from one computed step to the next


@dataclass(frozen=True)
class Trajectory:
    """What was recorded of exact runs.

    sigmas         [n]     noise level of each step
    gram           [n, n]  mean over clips and cells of g_i * g_j, g the guided velocity at step i
    amplification  [n]     how much an error made at a step has grown at the end; ones if it was not measured
    """

    sigmas: np.ndarray
    gram: np.ndarray
    amplification: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    def ahead(self) -> np.ndarray:
        """Each step's length in sigma; the last one ends at 0."""
        return np.diff(np.append(self.sigmas, 0.0))

    def rms(self, combination: np.ndarray) -> float:
        """Root mean square of sum_i combination[i] * g_i."""
        return float(np.sqrt(max(combination @ self.gram @ combination, 0.0)))

    def noisy(self, noise: float) -> "Trajectory":
        """The same with velocities that are each off by that part of their size, independently."""
        return replace(self, gram=self.gram + np.diag(noise**2 * np.diag(self.gram)))

    def change(self, kind: str) -> np.ndarray:
        """Relative error of predicting each step from the ones right before it, steps 2 and later."""
        found = []
        for step in range(2, self.steps):
            error = self.error(step, weights(self, kind, step, (step - 1, step - 2)), (step - 1, step - 2))
            found.append(self.rms(error) / np.sqrt(self.gram[step, step]))
        return np.array(found)

    def error(self, step: int, row: Sequence[float], known: Sequence[int]) -> np.ndarray:
        """The prediction of a step less its truth, as a combination of velocities."""
        found = np.zeros(self.steps)
        found[step] = -1.0
        for weight, source in zip(row, known):
            found[source] += weight
        return found


def weights(trajectory: Trajectory, kind: str, step: int, known: Sequence[int]) -> Action:
    """The weights that predict `step` from the computed steps `known`, newest first.

    fitted: least squares on the recorded velocities; their noise keeps the weights small. A computed step of a cached
    run is off by more than rounding, since the run has left the recorded one.
    """
    if kind == "reuse" or len(known) < 2:
        return REUSE
    if kind == "linear":
        return tuple(map(float, linear(trajectory.sigmas, step, known[0], known[1])))
    h = list(known[:MOST_WEIGHTS])
    return tuple(map(float, np.linalg.solve(trajectory.gram[np.ix_(h, h)], trajectory.gram[h, step])))


def row(trajectory: Trajectory, mask: str, kind: str) -> tuple[Action, ...]:
    """The actions of a mask under a kind of prediction."""
    known, found = [], []
    for step, letter in enumerate(mask):
        found.append(COMPUTE if letter == "1" else weights(trajectory, kind, step, known))
        if letter == "1":
            known.insert(0, step)
    return tuple(found)


def best_masks(trajectory: Trajectory, kind: str) -> dict[int, str]:
    """{number of computed steps: the mask of least predicted error}, for every number that can be had.

    The first two steps are always computed. Fitted weights are of two velocities here; a finished mask may use three.
    """
    n = trajectory.steps
    if n < 3:
        raise DaxError("bad_request", f"{n} steps: too few to leave one out, a plan needs at least 3")
    cost = stretches(trajectory, kind)
    reached = {1: {(0, 1): (0.0, None)}}  # number computed before the last: {(one before, last): (error, from)}
    for count in range(2, n + 1):
        states: dict[tuple[int, int], tuple[float, tuple | None]] = {}
        for (before, last), (error, _) in reached[count - 1].items():
            for j in range(last + 1, min(last + LONGEST, n - 1) + 1):
                total = error + cost[before, last, j]
                if total < states.get((last, j), (np.inf, None))[0]:
                    states[last, j] = (total, (before, last))
        reached[count] = states
    masks = {}
    for count, states in reached.items():
        ends = {s: e + cost[(*s, n)] for s, (e, _) in states.items() if n - s[1] <= LONGEST}
        if not ends:
            continue
        state, computed = min(ends, key=ends.get), []
        for level in range(count, 0, -1):
            computed.append(state[1])
            state = reached[level][state][1]
        computed.append(0)
        masks[count + 1] = "".join("1" if step in computed else "0" for step in range(n))
    return masks


def stretches(trajectory: Trajectory, kind: str) -> dict[tuple[int, int, int], float]:
    """{(one computed before, last computed, next computed): error of the steps in between}; the next may be the end."""
    n, ahead, cost = trajectory.steps, trajectory.ahead(), {}
    for last in range(1, n):
        for before in range(max(0, last - LONGEST), last):
            error = np.zeros(n)
            cost[before, last, last + 1] = 0.0
            for step in range(last + 1, min(last + LONGEST, n)):
                found = weights(trajectory, kind, step, (last, before))
                error = error + ahead[step] * trajectory.error(step, found, (last, before))
                cost[before, last, step + 1] = (trajectory.rms(error) * trajectory.amplification[step]) ** 2
    return cost


def neighbours(mask: str, generator) -> str:
    """A mask near this one: a computed step moved by one or two, or exchanged with a predicted one anywhere."""
    letters = list(mask)
    ones = [i for i, letter in enumerate(letters) if letter == "1" and i > 0]
    zeros = [i for i, letter in enumerate(letters) if letter == "0"]
    source = generator.choice(ones)
    near = [i for i in zeros if abs(i - source) <= 2]
    target = generator.choice(near if near and generator.random() < 0.75 else zeros)
    letters[source], letters[target] = "0", "1"
    return "".join(letters)
