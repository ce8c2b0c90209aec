"""The table of a step cache: for each branch of guidance and each step, run the model or predict what it would say.

A prediction is a weighted sum of the last computed velocities, so reuse, extrapolation and fitted predictors are one
thing with other numbers. The table is made before the loop, is plain data, and says for which setting it holds.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from dax.errors import DaxError

BRANCHES = ("cond", "uncond")
COMPUTE = "compute"
DROP = "drop"  # of uncond: no guidance in this step, the velocity of cond counts alone
REUSE = (1.0,)
MOST_WEIGHTS = 4  # velocities kept per branch
FORMAT = "dax step plan 1"
Action = str | tuple[float, ...]  # COMPUTE, DROP, or the weights of the last computed velocities, newest first


@dataclass(frozen=True)
class Setting:
    """What a table was made for. None: it does not depend on that, or that is not known.

    checkpoint  digest of the transformer's weights (`dax.models.wan_steps.checkpoint_digest`)
    scheduler   its class
    kernels     the arithmetic that is not exact, as in "int8 attention"; "exact" for none
    """

    steps: int | None = None
    scheduler: str | None = None
    flow_shift: float | None = None
    guidance_scale: float | None = None
    checkpoint: str | None = None
    kernels: str | None = None

    def differences(self, other: "Setting", but: Sequence[str] = ()) -> list[str]:
        """["steps is 50, not 20", ...] for every field that both know and that differs from `other`'s."""
        found = []
        for name in (field.name for field in fields(self) if field.name not in but):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{name} is {shown(mine)}, not {shown(theirs)}")
        return found


def shown(value) -> str:
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


@dataclass(frozen=True)
class StepPlan:
    """A step cache's table. Frozen, hashable, JSON in and out; `cond` and `uncond` have one action for each step.

    made_by   what made it, in words
    reuse     "velocity": weights apply to the model's output; "residual": to what its blocks add, newest one only
    sigmas    the noise level of each step the weights were made for, or None if they hold for any
    DaxError("bad_request") for a table that cannot be run.
    """

    cond: tuple[Action, ...]
    uncond: tuple[Action, ...]
    made_by: str
    setting: Setting = Setting()
    reuse: str = "velocity"
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.cond or len(self.cond) != len(self.uncond):
            self.refuse(f"{len(self.cond)} steps of cond and {len(self.uncond)} of uncond")
        if self.sigmas is not None and len(self.sigmas) != self.steps:
            self.refuse(f"{len(self.sigmas)} noise levels for {self.steps} steps")
        if self.reuse not in ("velocity", "residual"):
            self.refuse(f"reuse = {self.reuse!r}")
        for branch, actions in (("cond", self.cond), ("uncond", self.uncond)):
            if actions[0] != COMPUTE:
                self.refuse(f"the first step of {branch} must be computed")
            computed = 0
            for step, action in enumerate(actions):
                if action == COMPUTE:
                    computed += 1
                elif action == DROP:
                    if branch == "cond":
                        self.refuse(f"step {step} drops cond")
                elif not isinstance(action, tuple) or not all(type(w) is float and math.isfinite(w) for w in action):
                    self.refuse(f"step {step} of {branch}: {action!r} is no action")
                elif not 1 <= len(action) <= min(computed, MOST_WEIGHTS):
                    self.refuse(f"step {step} of {branch}: {len(action)} weights, {computed} velocities are known")
                elif self.reuse == "residual" and action != REUSE:
                    self.refuse(f"step {step} of {branch}: a residual is reused as it is")

    @classmethod
    def of_mask(cls, mask: str, made_by: str, reuse: str = "velocity") -> "StepPlan":
        """Both branches by one mask, see actions_of."""
        row = actions_of(mask)
        return cls(row, row, made_by, reuse=reuse)

    def refuse(self, what: str) -> None:
        raise DaxError("bad_request", f"step plan ({self.made_by}): {what}")

    @property
    def steps(self) -> int:
        return len(self.cond)

    @property
    def joint(self) -> bool:
        """Whether both branches do the same in every step."""
        return self.cond == self.uncond

    @property
    def computed(self) -> dict[str, int]:
        """Forwards of each branch that run the model."""
        return {"cond": self.cond.count(COMPUTE), "uncond": self.uncond.count(COMPUTE)}

    @property
    def depth(self) -> int:
        """How many velocities of a branch must be kept."""
        return max((len(a) for a in (*self.cond, *self.uncond) if isinstance(a, tuple)), default=0)

    def actions(self, branch: str) -> tuple[Action, ...]:
        """The row of a branch. One that is neither cond nor uncond is both at once, in one batch."""
        if branch in BRANCHES:
            return self.cond if branch == "cond" else self.uncond
        if not self.joint:
            self.refuse(f"branches differ, and the pipeline runs them together as {branch!r}")
        return self.cond

    def mask(self, branch: str = "cond") -> str:
        """One letter a step: 1 computed, 0 predicted, - dropped."""
        return "".join({COMPUTE: "1", DROP: "-"}.get(action, "0") for action in self.actions(branch))

    def restarted(self, step: int) -> "StepPlan":
        """The table where another model takes over at `step`: what would be predicted from behind that is computed."""
        if not 0 < step < self.steps:
            return self
        rows = {}
        for branch, row in (("cond", list(self.cond)), ("uncond", list(self.uncond))):
            computed = 0
            for i in range(step, self.steps):
                if isinstance(row[i], tuple) and len(row[i]) > computed:
                    row[i] = COMPUTE
                computed += row[i] == COMPUTE
            rows[branch] = tuple(row)
        if rows == {"cond": self.cond, "uncond": self.uncond}:
            return self
        return replace(self, **rows, made_by=f"{self.made_by}, anew for the second expert at step {step}")

    def check(self, setting: Setting) -> None:
        """DaxError("bad_request") with the reason if this table was made for another setting. Kernels may differ."""
        if found := self.setting.differences(setting, but=("kernels",)):
            raise DaxError(
                "bad_request",
                f"the step plan ({self.made_by}) is for another setting: its {', its '.join(found)}; change the "
                "request, run `dax calibrate` for this one, or set cache.policy = none",
            )
        if setting.steps is not None and setting.steps != self.steps:
            raise DaxError(
                "bad_request", f"the step plan ({self.made_by}) has {self.steps} steps, the run has {setting.steps}"
            )

    def to_json(self) -> dict:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict) -> "StepPlan":
        """The plan of a JSON object. DaxError("bad_request") if it is not one."""
        try:
            if value.get("format") != FORMAT:
                raise DaxError("bad_request", f"step plan: format is {value.get('format')!r}, expected {FORMAT!r}")
            rows = {key: tuple(a if type(a) is str else tuple(map(float, a)) for a in value[key]) for key in BRANCHES}
            sigmas = value["sigmas"]
            return cls(
                **rows,
                made_by=value["made_by"],
                setting=Setting(**value["setting"]),
                reuse=value["reuse"],
                sigmas=None if sigmas is None else tuple(map(float, sigmas)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DaxError("bad_request", f"step plan: damaged ({type(error).__name__}: {error})") from None

    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def check_mask(mask: str, name: str = "mask") -> str:
    """The mask, without spaces. DaxError("bad_request") unless it is ones and zeros and begins with 1."""
    mask = mask.replace(" ", "")
    if not mask or set(mask) - {"0", "1"}:
        raise DaxError("bad_request", f"{name} {mask!r}: write one letter a step, 1 computed or 0 predicted")
    if mask[0] != "1":
        raise DaxError("bad_request", f"{name} {mask!r}: the first step must be 1, there is nothing to predict it from")
    return mask


def actions_of(mask: str) -> tuple[Action, ...]:
    """The row of a mask: predicted steps reuse the last velocity."""
    return tuple(COMPUTE if letter == "1" else REUSE for letter in mask)


def flow_sigmas(steps: int, flow_shift: float) -> list[float]:
    """The noise level of each step as diffusers' flow schedulers set them: even steps, shifted towards noise.

    Of 1000 training steps, the vendor's default.
    """
    even = [1 + i * (1 / 1000 - 1) / steps for i in range(steps)]
    shifted = [flow_shift * s / (1 + (flow_shift - 1) * s) for s in even]
    return [min(shifted[0], 1 - 1e-6), *shifted[1:]]


def linear(sigmas: Sequence[float], step: int, last: int, before: int) -> tuple[float, float]:
    """Weights of the velocities of steps `last` and `before` that continue their line to `step`."""
    ahead = (sigmas[step] - sigmas[last]) / (sigmas[last] - sigmas[before])
    return 1.0 + ahead, -ahead


def guidance_rows(row: tuple[Action, ...], every: int = 1, drop_last: int = 0) -> tuple[Action, ...]:
    """The uncond row beside a cond row: only every n-th computed step is computed, and none of the last `drop_last`.

    A step that is computed for cond alone reuses uncond's last velocity; in the dropped tail guidance is off.
    """
    if every < 1 or not 0 <= drop_last < len(row):
        raise DaxError("bad_request", f"guidance plan: every = {every}, drop_last = {drop_last} of {len(row)} steps")
    found, count, kept = [], 0, 0
    for step, action in enumerate(row):
        if step >= len(row) - drop_last:
            found.append(DROP)
        elif action == COMPUTE:
            found.append(COMPUTE if count % every == 0 else REUSE)
            kept += count % every == 0
            count += 1
        else:
            found.append(action if every == 1 and len(action) <= kept else REUSE)
    return tuple(found)
