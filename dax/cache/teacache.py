"""TeaCache: skip while the time embedding has hardly moved. On Wan that depends on the step alone, so it is a mask.

The published rule adds up a polynomial of the embedding's relative change and computes when the sum reaches a
threshold. A negative increment would lower the sum and could switch computing off for good: it counts as zero here, and
settings the polynomial was not fitted for are refused. arXiv 2411.19108; coefficients of the authors' Wan2.1 release.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dax.cache.step_plan import Setting
from dax.errors import DaxError


@dataclass(frozen=True)
class Polynomial:
    """How far the output moves when the time embedding moves: coefficients, highest degree first.

    projected   the embedding is the projected one (six modulations a channel), as with retained steps; else the plain
    setting     what it was fitted for
    """

    coefficients: tuple[float, ...]
    projected: bool
    setting: Setting

    def __call__(self, moved: float) -> float:
        value = 0.0
        for coefficient in self.coefficients:
            value = value * moved + coefficient
        return max(value, 0.0)


def published(steps: int, flow_shift: float, retained: tuple, plain: tuple) -> dict[bool, Polynomial]:
    setting = Setting(steps=steps, flow_shift=flow_shift)
    return {True: Polynomial(retained, True, setting), False: Polynomial(plain, False, setting)}


PUBLISHED = {  # model: {with retained steps: Polynomial}
    "wan2.1-t2v-1.3b": published(
        50, 5.0,
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    ),
    "wan2.1-t2v-14b": published(
        50, 5.0,
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    ),
    "wan2.1-i2v-14b-480p": published(
        40, 3.0,
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
        (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    ),
    "wan2.1-i2v-14b-720p": published(
        40, 5.0,
        (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    ),
}  # fmt: skip
RETAINED = {True: (5, 0), False: (1, 1)}  # steps computed at the start and at the end, as published


def changes(embeddings) -> list[float]:
    """Relative L1 change of the time embedding from each step to the next: mean|e_i - e_{i-1}| / mean|e_{i-1}|.

    embeddings  [steps, C]  fp32, one row for each step
    """
    moved = (embeddings[1:] - embeddings[:-1]).abs().mean(-1) / embeddings[:-1].abs().mean(-1)
    return moved.tolist()


def teacache_mask(moved: Sequence[float], polynomial: Polynomial, threshold: float, first: int, last: int) -> str:
    """The mask of `len(moved) + 1` steps: 1 computed, 0 skipped.

    moved        see `changes`
    first, last  steps that are computed whatever happens, at the start and at the end
    """
    steps = len(moved) + 1
    if not 1 <= first <= steps - last:
        raise DaxError("bad_request", f"{steps} steps are fewer than the {first + last} that TeaCache always computes")
    if threshold < 0:
        raise DaxError("bad_request", f"cache.threshold {threshold} must not be negative")
    mask, total = "1" * first, 0.0
    for step in range(first, steps):
        total += polynomial(moved[step - 1])
        compute = step >= steps - last or total >= threshold
        if compute:
            total = 0.0
        mask += "1" if compute else "0"
    return mask


def fit(moved: Sequence[float], outputs: Sequence[float], setting: Setting) -> Polynomial:
    """The authors' calibration: a polynomial of degree 4 from the embedding's change to the output's, least squares.

    outputs  mean relative L1 change of the model's output at the same steps, over the calibration prompts
    """
    import numpy as np

    found = np.polynomial.Polynomial.fit(moved, outputs, 4).convert().coef[::-1]
    return Polynomial(tuple(map(float, found)), True, setting)
