"""The ledger of claims, `benchmarks/claims.json`: one row for every figure that the README or the docs state.

Reads it and refuses a row that nobody could check: an unknown id, a missing part, a date that is none, evidence that is
not there. The latest measurement wins, so an id stands in it once.
"""

import json
import math
from datetime import date
from pathlib import Path

from dax.errors import DaxError, nearest

IDS = frozenset(
    """
    tiny.vae_psnr_db tiny.judge_colour tiny.judge_shape tiny.judge_motion tiny.judge_all tiny.weights_mb
    attention.int8.wan14b-720p.ms attention.int8.wan14b-720p.error attention.int8.wan14b-720p.v1_error_pct
    attention.int8.wan14b-480p.tflops attention.triton.wan14b-720p.tflops
    linear.int8.5120x5120.tops linear.int8.5120x13824.tops linear.int8.13824x5120.tops ffn.int8.wan14b-720p.ms
    block.eager.wan14b-720p.ms block.exact.wan14b-720p.ms block.balanced.wan14b-720p.ms block.first-dax.wan14b-720p.ms
    block.balanced.elementwise.ms
    forward.balanced.wan14b-720p.peak_gib start.cold_s start.warm_s
    cache.calibrated-over-teacache.40pct.db cache.calibrated-over-magcache.40pct.db cache.predicted_step.ms
    parallel.ulysses2.wan14b-720p.speedup parallel.cfg2.wan14b-720p.speedup parallel.ulysses2.wan14b-720p.ms
    vae.decode2.speedup planner.error_pct
    video.fast.wan14b-720p.seconds video.first-dax.wan14b-720p.seconds tune.speedup_over_preset explain.error_pct
    """.split()
)
PARTS = ("id", "value", "unit", "hardware", "command", "date", "versions", "evidence")
COLUMNS = {key: key for key in PARTS if key != "versions"}


def ledger() -> Path:
    """Where the ledger is: under the checkout DAX runs from."""
    return Path(__file__).resolve().parents[2] / "benchmarks" / "claims.json"


def read(path: Path | None = None) -> list[dict]:
    """The claims, checked. DaxError("bad_request") names the row and what is wrong with it."""
    path = path or ledger()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DaxError("bad_request", f"claims {path}: no such file; the ledger is part of a source checkout") from None
    except (OSError, ValueError) as error:
        raise DaxError("bad_request", f"claims {path}: {error}") from None
    if not isinstance(entries, list):
        raise DaxError("bad_request", f"claims {path}: a list of objects, not {type(entries).__name__}")
    seen = set()
    for number, entry in enumerate(entries):
        where = f"claims {path} row {number + 1}"
        wrong = fault(entry, path.parent)
        if not wrong and entry["id"] in seen:
            wrong = f"{entry['id']} stands twice; keep the latest"
        if wrong:
            raise DaxError("bad_request", f"{where}: {wrong}")
        seen.add(entry["id"])
    return entries


def fault(entry, folder: Path) -> str | None:
    """What is wrong with one row, or None. `folder` is where evidence lies (`benchmarks/`)."""
    if not isinstance(entry, dict):
        return f"an object, not {type(entry).__name__}"
    missing = [part for part in PARTS if part not in entry]
    extra = [part for part in entry if part not in PARTS]
    if missing or extra:
        return f"missing {', '.join(missing) or 'nothing'}; unknown {', '.join(extra) or 'nothing'}"
    if entry["id"] not in IDS:
        return f"unknown id {entry['id']!r}{nearest(str(entry['id']), IDS)}"
    value = entry["value"]
    if type(value) not in (int, float) or not math.isfinite(value):
        return f"{entry['id']}: value = {value!r} must be a finite number"
    if entry["id"].startswith("tiny.judge_") and not 1 < value <= 100:
        return f"{entry['id']}: value = {value!r}; a percentage is written 95, not .95"
    for part in ("unit", "hardware", "command", "evidence"):
        if not isinstance(entry[part], str) or not entry[part].strip():
            return f"{entry['id']}: {part} = {entry[part]!r} must be a text"
    try:
        date.fromisoformat(entry["date"])
    except (TypeError, ValueError):
        return f"{entry['id']}: date = {entry['date']!r} must be like 2026-11-24"
    versions = entry["versions"]
    if not isinstance(versions, dict) or not versions or not all(isinstance(v, str) for v in versions.values()):
        return f"{entry['id']}: versions = {versions!r} must map packages to versions"
    evidence = folder.parent / entry["evidence"]
    if not evidence.resolve().is_relative_to(folder.resolve()) or not evidence.is_file():
        return f"{entry['id']}: evidence {entry['evidence']!r} is not a file under benchmarks/"
    return None
