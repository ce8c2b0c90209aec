"""The file of static scales: what calibration found on one model, versioned, named by digests. Without torch."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dax.errors import DaxError

VERSION = 1


@dataclass(frozen=True)
class Scales:
    """What calibration found: `amax` {layer: largest magnitude of its input}, and the digest of the model."""

    model: str
    amax: dict[str, float]
    version: int = VERSION

    def save(self, path: "str | Path") -> None:
        """Write it as JSON; fp32 values come back bit for bit. DaxError("cannot_write") if the path refuses."""
        try:
            Path(path).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        except OSError as error:
            raise DaxError("cannot_write", f"scales {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: "str | Path") -> "Scales":
        """DaxError("bad_request") for a file that is not one of this version."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DaxError("bad_request", f"scales {path}: {error}") from None
        if not isinstance(found, dict) or found.get("version") != VERSION or set(found) != {"model", "amax", "version"}:
            raise DaxError("bad_request", f"scales {path}: not a file of static scales, version {VERSION}")
        wrong = [k for k, v in found["amax"].items() if type(v) not in (int, float) or not 0 < v < float("inf")]
        if wrong:
            raise DaxError("bad_request", f"scales {path}: {wrong[0]} = {found['amax'][wrong[0]]!r} is no magnitude")
        return cls(**found)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content: what a plan's hash uses instead of the path."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
