"""A component's files, read as far as their headers: JSON, safetensors, shards and their index.

Every fault is one DaxError("bad_model") line that names the file, what was expected and what was found. The safetensors
library parses and validates headers; what it leaves out is here: sizes, dtypes, and that shards and index agree.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dax.errors import DaxError

DTYPES = ("F32", "F16", "BF16")
MAX_BYTES = 64_000_000  # of a JSON or vocabulary file


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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


def read_bytes(path: Path) -> bytes:
    size = stat_file(path).st_size
    if size > MAX_BYTES:
        raise bad(path, f"{size} bytes, at most {MAX_BYTES} expected")
    try:
        return path.read_bytes()
    except OSError as error:
        raise bad(path, error.strerror or str(error)) from None


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise bad(path, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad(path, f"expected a JSON object, found {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """{name: Tensor} of a safetensors file, whose header must add up to the file's size."""
    from safetensors import SafetensorError, safe_open

    stat_file(path)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Tensor(path, x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise bad(path, f"{sizes(path)}: {str(error).removeprefix('Error while deserializing header: ')}") from None


def sizes(path: Path) -> str:
    """What a broken safetensors file should hold by its own header, as far as that can be told, and what it holds."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                return f"found {size} bytes, expected more than {length}" if size >= 8 else f"found {size} bytes"
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return f"found {size} bytes, expected {8 + length + max(ends)}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"found {size} bytes"


def read_weights(folder: Path, stem: str) -> tuple[dict[str, Tensor], list[Path]]:
    """({name: Tensor}, files) of a component: one file `stem`.safetensors, or shards and their index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(index):
        return read_shards(folder, index)
    if not os.path.lexists(single) and (pickled := sorted(folder.glob("*.bin"))):
        raise bad(pickled[0], "a pickle, which can run code; convert it to safetensors")
    return read_header(single), [single]


def read_shards(folder: Path, index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise bad(index, "has no weight_map of tensor to file")
    tensors, shards = {}, sorted(set(listed.values()))
    for shard in shards:
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise bad(index, f"names {shard!r}, which is not a safetensors file beside it")
    for shard in shards:
        for name, tensor in read_header(folder / shard).items():
            if listed.get(name) != shard:
                raise bad(index, f"does not list tensor {name} of {shard}")
            tensors[name] = tensor
    for name, shard in listed.items():
        if name not in tensors:
            raise bad(folder / shard, f"lacks tensor {name}, which {index.name} lists")
    return tensors, [*(folder / shard for shard in shards), index]


def check_dtypes(tensors: dict[str, Tensor], wanted: Mapping[str, str] = {}) -> None:
    """No foreign dtype; `wanted` {tensor: its dtype} for codes and scales of weights in 8 bits."""
    for name, tensor in tensors.items():
        if name in wanted and tensor.dtype != wanted[name]:
            raise bad(tensor.file, f"tensor {name} has dtype {tensor.dtype}; its config says {wanted[name]}")
        if name not in wanted and tensor.dtype not in DTYPES:
            raise bad(tensor.file, f"tensor {name} has dtype {tensor.dtype}; supported: {', '.join(DTYPES)}")


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


def check_finite(files: list[Path]) -> None:
    """Read every weight. DaxError names the first tensor that holds an infinity or a NaN."""
    import torch
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
                    raise bad(path, f"tensor {name} holds an infinity or a NaN")


def check_digests(folder: Path, files: list[Path]) -> int:
    """Compare files with `SHA256SUMS` of the folder and the names of hub blobs; returns how many could be compared."""
    sums, manifest = {}, folder / "SHA256SUMS"
    if manifest.exists():
        lines = read_bytes(manifest).decode("utf-8", "replace").splitlines()
        sums = {name.strip().lstrip("*"): digest.lower() for digest, _, name in (line.partition(" ") for line in lines)}
    compared = 0
    for file in files:
        known = sums.get(file.relative_to(folder).as_posix())
        if known is None and file.is_symlink():  # the hub's cache names a large file by its sha256
            blob = os.path.basename(os.readlink(file))
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
