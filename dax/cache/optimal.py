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


@dataclass(frozen=True)
class Predictor:
    """How a mask's predicted steps get their weights.

    kind    reuse; linear: the line through the last two in sigma; fitted: least squares on the recorded velocities
    noise   what a computed velocity is off by, relative to its size: the more, the smaller fitted weights are
    depth   velocities that fitted weights combine, at most
    mend    share of what earlier predictions got wrong that a fitted one makes up for: later velocities tell more
            about a stretch than was known when it was predicted, as a solver's corrector uses
    """

    kind: str
    noise: float = 0.0
    depth: int = 3
    mend: float = 0.0


PREDICTORS = {
    "reuse": Predictor("reuse"),
    "linear": Predictor("linear"),
    "fitted": Predictor("fitted", 0.004),
    "damped": Predictor("fitted", 0.015),
    "much damped": Predictor("fitted", 0.05),
    "mending": Predictor("fitted", 0.01, MOST_WEIGHTS, 0.5),
    "damped mending": Predictor("fitted", 0.02, MOST_WEIGHTS, 0.5),
    "much damped mending": Predictor("fitted", 0.05, MOST_WEIGHTS, 0.5),
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


def weights(trajectory: Trajectory, kind: str, step: int, known: Sequence[int], aim=None) -> Action:
    """The weights that predict `step` from the computed steps `known`, newest first.

    aim   [n] inner products of every velocity with what fitted weights come near to; by default the step's velocity
    fitted: least squares on the recorded velocities; their noise keeps the weights small. A computed step of a cached
    run is off by more than rounding, since the run has left the recorded one.
    """
    if kind == "reuse" or len(known) < 2:
        return REUSE
    if kind == "linear":
        return tuple(map(float, linear(trajectory.sigmas, step, known[0], known[1])))
    h = list(known)
    aim = trajectory.gram[step] if aim is None else aim
    return tuple(map(float, np.linalg.solve(trajectory.gram[np.ix_(h, h)], aim[h])))


def row(trajectory: Trajectory, mask: str, predictor: Predictor) -> tuple[Action, ...]:
    """The actions of a mask under a predictor.

    What is owed, the sum of earlier errors times their steps in sigma, is a combination of velocities like everything
    else; a mending predictor aims at the velocity less its share of that, spread over the step ahead.
    """
    noisy, ahead = trajectory.noisy(predictor.noise), trajectory.ahead()
    known, found, owed = [], [], np.zeros(trajectory.steps)
    for step, letter in enumerate(mask):
        if letter == "1":
            found.append(COMPUTE)
            known.insert(0, step)
            continue
        target = -predictor.mend * owed / ahead[step]
        target[step] += 1.0
        used = known[: predictor.depth]
        found.append(weights(noisy, predictor.kind, step, used, trajectory.gram @ target))
        owed = owed + ahead[step] * trajectory.error(step, found[-1], used)
    return tuple(found)


def counts(steps: int) -> range:
    """How many steps a mask may compute: the first two always, then one in LONGEST at least.

    DaxError("bad_request") where there is none to leave out.
    """
    if steps < 3:
        raise DaxError("bad_request", f"{steps} steps: too few to leave one out, a plan needs at least 3")
    return range(2 + (steps - 2) // LONGEST, steps + 1)


def best_masks(trajectory: Trajectory, kind: str) -> dict[int, str]:
    """{number of computed steps: the mask of least predicted error}, for every one of `counts`.

    Fitted weights are of two velocities here; a finished mask may use more.
    """
    n = trajectory.steps
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
