"""Where a tuned plan comes from: the fidelity and cost that were measured, and of what; `measured` in its file.

It is no part of the plan: it changes neither what runs nor the plan's hash. Whoever loads the file asks what differs
here from where it was measured; each difference is named, and a promise about fidelity is kept only without one.
"""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dax.errors import DaxError
from dax.plan import PLANS, Plan, presets
from dax.plan_file import read_yaml

KEY = "measured"
WHERE_ONLY = ("parallel", "offload", "compile")  # parts that say where and how a model runs, not what it computes
KEPT = "linear.keep_original"  # where the replaced weights go
SLACK_DB = 3.0  # p10 may lie this far under the fidelity that is held


class Measured(BaseModel):
    """psnr_db, psnr_p10_db over `prompts` held-out prompts against exact; floor_db the noise floor's PSNR.

    computes   the resolved plan's keys that decide what is computed
    cost       of the plan as a share of exact's, by the table that `cost_of` names
    seconds    of the denoising loop: cost x what exact's took there, so not what references on a CPU take; None in
               files of before this was said
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    psnr_db: float
    psnr_p10_db: float
    floor_db: float
    prompts: int
    cost: float
    cost_of: str
    seconds: float | None = None
    model: str
    model_digest: str
    device: str
    dtype: str
    request: dict[str, Any]
    computes: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str

    def differences(self, model_digest: str, device: str, resolved: Plan, request: dict) -> list[str]:
        """What is otherwise here, in words: model, device, kernels, request. Versions are recorded, not compared."""
        found = []
        if model_digest != self.model_digest:
            found.append(f"another model ({model_digest[:8]}, measured on {self.model} {self.model_digest[:8]})")
        if device != self.device:
            found.append(f"another device ({device}, measured on {self.device})")
        here = computes(resolved)
        for key in {**self.computes, **here}:
            if here.get(key) != self.computes.get(key):
                found.append(f"other kernels ({key} = {here.get(key)}, measured with {self.computes.get(key)})")
        for key, value in self.request.items():
            if request.get(key) != value:
                found.append(f"another request ({key} {request.get(key)}, measured at {value})")
        return found


def held(psnr_db: float, p10_db: float) -> float:
    """The highest fidelity that clips hold: their mean is there or above, their p10 no more than SLACK_DB under."""
    return min(psnr_db, p10_db + SLACK_DB)


def computes(plan: Plan) -> dict[str, Any]:
    """The keys of a resolved plan that decide what is computed."""
    leaves = plan.leaves().items()
    return {key: value for key, value in leaves if key.split(".")[0] not in WHERE_ONLY and key != KEPT}


def read_measured(name_or_path: "str | Path") -> Measured | None:
    """What stands in a plan's file, None if nothing does. DaxError("bad_request") if it is damaged."""
    name = str(name_or_path)
    path = PLANS / f"{name}.yaml" if name in presets() else Path(name)
    values = read_yaml(path).get(KEY)
    if values is None:
        return None
    try:
        return Measured.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (KEY, *first["loc"])))
        raise DaxError("bad_request", f"plan {path}: {where}: {first['msg']}; tune it again") from None


def to_yaml(plan: Plan, measured: Measured) -> str:
    """The file of a plan with its measurement. Never to be written in part: the plan alone reads as one without."""
    import yaml

    return plan.to_yaml() + yaml.safe_dump({KEY: measured.model_dump(exclude_none=True)}, sort_keys=False)


def check_min_psnr(wanted: float, measured: Measured | None, differences: list[str], exact: bool) -> None:
    """The gate of `--min-psnr`: DaxError("check_failed") if the plan does not hold `wanted`, or not measured like this.

    exact   the plan computes what exact does, so nothing needs to be measured
    DaxError("bad_request") for a plan that nobody measured, or a number that is none.
    """
    if not math.isfinite(wanted) or wanted < 0:
        raise DaxError("bad_request", f"--min-psnr {wanted}: must be a number of decibels from 0")
    if exact:
        return
    if measured is None:
        raise DaxError("bad_request", "--min-psnr: this plan carries no measured fidelity; `dax tune` makes such plans")
    if held(measured.psnr_db, measured.psnr_p10_db) < wanted:
        raise DaxError(
            "check_failed",
            f"--min-psnr {wanted:g}: the plan was measured at {measured.psnr_db:.1f} dB, p10 "
            f"{measured.psnr_p10_db:.1f} ({wanted - SLACK_DB:g} is needed), on {measured.prompts} held-out prompts; "
            "nothing was made",
        )
    if differences:
        raise DaxError("check_failed", f"--min-psnr {wanted:g}: the fidelity was measured elsewhere: {differences[0]}")
