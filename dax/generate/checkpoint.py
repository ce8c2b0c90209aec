"""A component's files, read as far as their headers: JSON, safetensors, shards and their index.

Every fault is one DaxError("bad_model") line that names the file, what was expected and what was found.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dax.errors import DaxError

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}  # all ones: inf or NaN
MAX_HEADER = 100_000_000
MAX_JSON = 64_000_000
CHUNK = 16_000_000


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `start` and `stop` are byte offsets in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def bad(path: Path | str, what: str) -> DaxError:
    return DaxError("bad_model", f"{path}: {what}")


def stat_file(path: Path) -> os.stat_result:
    """The stat of a regular file, links followed. Missing, looping, special or unreadable files are refused."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise bad(path, "missing" if not path.is_symlink() else "a link to nothing") from None
    except OSError as error:
        raise bad(path, error.strerror or str(error)) from None
    if not stat.S_ISREG(found.st_mode):
        raise bad(path, "not a regular file")
    if not os.access(path, os.R_OK):
        raise bad(path, "not readable")
    return found


def read_bytes(path: Path, most: int) -> bytes:
    size = stat_file(path).st_size
    if size > most:
        raise bad(path, f"{size} bytes, at most {most} expected")
    try:
        return path.read_bytes()
    except OSError as error:
        raise bad(path, error.strerror or str(error)) from None


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        value = json.loads(read_bytes(path, MAX_JSON).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise bad(path, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad(path, f"expected a JSON object, found {type(value).__name__}")
    return value


def read_header(path: Path) -> tuple[dict[str, Tensor], bytes]:
    """({name: Tensor}, the header's bytes) of a safetensors file, whose layout must add up to the file's size."""
    size = stat_file(path).st_size
    if size < 8:
        raise bad(path, f"{size} bytes, too short to be safetensors")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, size - 8):
                raise bad(path, f"a header of {length} bytes in a file of {size}: truncated, or not safetensors")
            raw = file.read(length)
    except OSError as error:
        raise bad(path, error.strerror or str(error)) from None
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise bad(path, "the header is not JSON: damaged, or not safetensors") from None
    if not isinstance(header, dict):
        raise bad(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: read_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise bad(path, f"tensor {name} begins at byte {tensor.start}, expected {end}")
        end = tensor.stop
    if end != size:
        raise bad(path, f"expected {end} bytes by its header, found {size}")
    return tensors, raw


def read_entry(path: Path, name: str, entry, base: int) -> Tensor:
    whole = lambda values: isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise bad(path, f"tensor {name}: its header entry is damaged")
    dtype, shape, offsets = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise bad(path, f"tensor {name} has dtype {dtype}; supported: {', '.join(ITEM_BYTES)}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype]:
        raise bad(path, f"tensor {name}: {list(shape)} of {dtype} does not fill bytes {offsets}")
    return Tensor(path, dtype, shape, base + offsets[0], base + offsets[1])


def read_weights(folder: Path, stem: str) -> tuple[dict[str, Tensor], list[Path], list[bytes]]:
    """({name: Tensor}, files, header bytes) of a component: one file `stem`.safetensors, or shards and their index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(index):
        return read_shards(folder, index)
    if not os.path.lexists(single):
        pickled = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        if pickled:
            raise bad(folder / pickled[0], "a pickle, which can run code; convert it to safetensors")
        raise bad(single, "missing")
    tensors, raw = read_header(single)
    return tensors, [single], [raw]


def read_shards(folder: Path, index: Path) -> tuple[dict[str, Tensor], list[Path], list[bytes]]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise bad(index, "has no weight_map of tensor to file")
    tensors, raws, files = {}, [], []
    for shard in sorted(set(listed.values())):
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise bad(index, f"names {shard!r}, which is not a safetensors file beside it")
        found, raw = read_header(folder / shard)
        for name, tensor in found.items():
            if listed.get(name) != shard:
                raise bad(index, f"does not list tensor {name} of {shard}")
            tensors[name] = tensor
        files.append(folder / shard)
        raws.append(raw)
    for name, shard in listed.items():
        if name not in tensors:
            raise bad(folder / shard, f"lacks tensor {name}, which {index.name} lists")
    return tensors, [*files, index], raws


def check_shapes(folder: Path, tensors: dict[str, Tensor], expected: dict, may_have: frozenset = frozenset()) -> None:
    """Exactly the expected tensors, in their shapes; `may_have` names are allowed beside them."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise bad(folder, f"{len(missing)} of {len(expected)} tensors are missing, first {missing[0]}")
    extra = [name for name in tensors if name not in expected and name not in may_have]
    if extra:
        raise bad(folder, f"{len(extra)} tensors that its config does not have, first {extra[0]}")
    wrong = [name for name in expected if tensors[name].shape != expected[name]]
    if wrong:
        shape, wanted = list(tensors[wrong[0]].shape), list(expected[wrong[0]])
        raise bad(
            tensors[wrong[0]].file, f"{len(wrong)} tensors of another shape, first {wrong[0]} {shape}, not {wanted}"
        )


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Read every weight. DaxError names the first tensor that holds an infinity or a NaN."""
    import numpy as np

    for name, tensor in tensors.items():
        dtype, ones = EXPONENT[tensor.dtype]
        if tensor.start == tensor.stop:
            continue
        words = np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.stop - tensor.start,)).view(dtype)
        for start in range(0, len(words), CHUNK):
            part = words[start : start + CHUNK]
            if bool(((part & part.dtype.type(ones)) == ones).any()):
                raise bad(tensor.file, f"tensor {name} holds an infinity or a NaN")


def check_digests(folder: Path, files: list[Path]) -> int:
    """Compare files with `SHA256SUMS` of the folder and with the names of hub blobs; returns how many were compared."""
    sums, manifest = {}, folder / "SHA256SUMS"
    if manifest.exists():
        for line in read_bytes(manifest, MAX_JSON).decode("utf-8", "replace").splitlines():
            digest, _, name = line.partition("  ")
            sums[name.strip()] = digest
    compared = 0
    for file in files:
        known = sums.get(file.relative_to(folder).as_posix())
        if known is None and file.is_symlink():
            blob = Path(os.readlink(file)).name
            known = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None
        if known is None:
            continue
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != known:
            raise bad(
                file, f"sha256 {found[:12]}... is not the recorded {known[:12]}...: the file was changed or damaged"
            )
        compared += 1
    return compared
