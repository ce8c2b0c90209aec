"""What `dax calibrate` measured of one model in one setting: one versioned JSON file of kilobytes.

Step plans for a ladder of budgets, and the constants TeaCache and MagCache need for this model. Artifacts that ship
with DAX lie in dax/plans and are found by the checkpoint's digest.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dax.cache.magcache import Ratios
from dax.cache.step_plan import Setting, StepPlan
from dax.cache.teacache import Polynomial
from dax.errors import DaxError
from dax.provenance import held

FORMAT = "dax calibration 1"
SHIPPED = Path(__file__).parent.parent / "plans"
MOST_BYTES = 4_000_000


@dataclass(frozen=True)
class Rung:
    """One step plan, and its latent PSNR in dB on held-out prompts against uncached runs: mean, and worst tenth."""

    plan: StepPlan
    predictor: str
    psnr_db: float
    p10_db: float


@dataclass(frozen=True)
class Artifact:
    """moved     relative change of the projected time embedding between steps, which TeaCache's polynomial takes
    floor_db  latent PSNR of two exact runs that differ by a harmless change: no plan can be held to more
    """

    model: str
    setting: Setting
    sigmas: tuple[float, ...]
    rungs: tuple[Rung, ...]
    moved: tuple[float, ...]
    teacache: Polynomial
    magcache: Ratios
    floor_db: float
    notes: tuple[str, ...] = ()

    def rung(self, budget: float, min_psnr: float) -> Rung:
        """The rung of most forwards within `budget`, a share of all; with min_psnr > 0 the cheapest that holds it.

        Holding means the mean over held-out prompts, and p10 no more than 3 dB under what is asked: `held`.
        """
        by_cost = sorted(self.rungs, key=lambda rung: sum(rung.plan.computed.values()))
        if min_psnr > 0:
            fit = [r for r in by_cost if held(r.psnr_db, r.p10_db) >= min_psnr]
            if not fit:
                best = max(self.rungs, key=lambda r: r.psnr_db)
                raise DaxError(
                    "bad_request",
                    f"cache.min_psnr = {min_psnr:g}: no calibrated step plan of {self.model} holds that; the best "
                    f"holds {best.psnr_db:.1f} dB (worst tenth {best.p10_db:.1f})",
                )
            return fit[0]
        most = budget * 2 * len(self.sigmas)
        fit = [r for r in by_cost if sum(r.plan.computed.values()) <= most + 1e-9]
        if not fit:
            least = sum(by_cost[0].plan.computed.values()) / (2 * len(self.sigmas))
            raise DaxError(
                "bad_request",
                f"cache.budget = {budget:g}: the cheapest calibrated step plan of {self.model} computes {least:.2f}",
            )
        return fit[-1]

    def to_json(self) -> dict:
        value = asdict(self)
        value["rungs"] = [{**asdict(r), "plan": r.plan.to_json()} for r in self.rungs]
        return {"format": FORMAT, **value}

    def save(self, path: Path) -> None:
        """Whole or not at all. DaxError("cannot_write") if the path refuses."""
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise DaxError("cannot_write", f"{path}: {error.strerror}") from None

    def digest(self) -> str:
        """sha256 (hex) of its content."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Artifact:
    """DaxError("bad_request") names the file and what is wrong with it."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DaxError("bad_request", f"cache.file {path}: larger than a calibration file is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DaxError("bad_request", f"cache.file {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DaxError("bad_request", f"cache.file {path}: not JSON") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise DaxError("bad_request", f"cache.file {path}: format is {found!r}, expected {FORMAT!r}; run dax calibrate")
    try:
        setting, polynomial, ratios = value["setting"], value["teacache"], value["magcache"]
        return Artifact(
            model=value["model"],
            setting=Setting(**setting),
            sigmas=tuple(map(float, value["sigmas"])),
            rungs=tuple(Rung(**{**r, "plan": StepPlan.from_json(r["plan"])}) for r in value["rungs"]),
            moved=tuple(map(float, value["moved"])),
            teacache=Polynomial(
                tuple(map(float, polynomial["coefficients"])), polynomial["projected"], Setting(**polynomial["setting"])
            ),
            magcache=Ratios(tuple(ratios["cond"]), tuple(ratios["uncond"]), ratios["flow_shift"]),
            floor_db=float(value["floor_db"]),
            notes=tuple(value["notes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DaxError("bad_request", f"cache.file {path}: damaged ({type(error).__name__}: {error})") from None


def find(name: str, checkpoint: str | None, kernels: str | None = None) -> Artifact | None:
    """The artifact of a file, of a digest ("sha256:...", shipped), or, for "auto", the shipped one of a checkpoint.

    None if nothing is shipped for that checkpoint; of several, the one for exact kernels, which serves all (see
    docs/step_caching.md), else the one for these.
    """
    if name != "auto" and not name.startswith("sha256:"):
        return load(Path(name))
    shipped = [load(path) for path in sorted(SHIPPED.glob("*.json"))]
    if name != "auto":
        for artifact in shipped:
            if f"sha256:{artifact.digest()}" == name:
                return artifact
        raise DaxError("bad_request", f"cache.file {name[:19]}...: no calibration of that digest ships: give its file")
    found = [a for a in shipped if checkpoint is not None and a.setting.checkpoint == checkpoint]
    return min(found, key=lambda a: (a.setting.kernels != "exact", a.setting.kernels != kernels), default=None)
