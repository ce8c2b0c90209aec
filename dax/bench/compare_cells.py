"""Finished cells of a comparison, kept on disk so that none is run twice.

A cell is one clip under one arrangement, in a folder named by everything it depends on: plan, kernel, model, request,
device, versions, and the reference it is measured against. Its folder appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from dax.bench.compare_record import Cell
from dax.errors import DaxError


class Cells:
    """The folder `cells` of a report."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:32]

    def read(self, key: str, reference: bool = False) -> Cell | None:
        """The finished cell, or None: not there, cut off, damaged, or of another version of DAX.

        reference   others are held against it: its latents must be there too
        """
        try:
            saved = json.loads((self.path(key) / "cell.json").read_text(encoding="utf-8"))
            for name in ("frames", "trajectory") if reference else ("frames",):
                self.array(key, name)
            return Cell.model_validate(saved)
        except (OSError, ValueError, EOFError):
            return None

    def frames(self, key: str):
        """The clip, [T, H, W, 3] uint8, mapped from disk."""
        return self.array(key, "frames")

    def array(self, key: str, name: str):
        import numpy as np

        return np.load(self.path(key) / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def figure(self, key: str, name: str, measure) -> float:
        """A figure of a finished clip that is not in its cell: kept beside it under `name`, else measured and kept.

        DaxError("cannot_write") if the disk refuses.
        """
        path = self.path(key) / "figures.json"
        try:
            kept = {str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: measured anew
            kept = {}
        if name not in kept:
            kept[name] = measure()
            write_atomically(path, json.dumps(kept).encode())
        return kept[name]

    def write(self, key: str, cell: Cell, **arrays) -> None:
        """Keep a finished cell. DaxError("cannot_write") if the disk refuses; nothing half-written stays."""
        import numpy as np

        part = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
            for name, array in arrays.items():
                np.save(part / f"{name}.npy", array, allow_pickle=False)
            (part / "cell.json").write_text(cell.model_dump_json(), encoding="utf-8")
            if self.path(key).exists():
                shutil.rmtree(self.path(key))
            os.rename(part, self.path(key))
        except OSError as error:
            raise DaxError("cannot_write", f"{self.folder}: {error.strerror or error}") from None
        finally:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)


def key_of(**everything) -> str:
    """sha256 (hex) of all that a cell depends on."""
    canonical = json.dumps(everything, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file, or the one that was there. DaxError("cannot_write") names the path."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise DaxError("cannot_write", f"{path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
