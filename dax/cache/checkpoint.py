"""Which checkpoint a calibration belongs to: one small tensor that no plan changes, read from a model or its folder.

The head's modulation table, rounded to bf16 so that every dtype a checkpoint is kept or loaded in gives one digest.
Fine-tuning moves it; an adapter on other layers does not. Neither torch nor numpy is imported.
"""

import hashlib
import json
import struct
from pathlib import Path

TENSOR = "scale_shift_table"


def digest(bf16: bytes, num_layers: int) -> str:
    """sha256 (hex) of the table's bf16 bytes and the number of blocks."""
    return hashlib.sha256(f"wan {num_layers} ".encode() + bf16).hexdigest()


def joint_digest(digests: list[str]) -> str:
    """One digest for the transformers of a model: the only one's own, or of both experts'."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def folder_digest(file: Path, num_layers: int) -> str:
    """The digest of a checkpoint from the safetensors file that holds its table, already checked."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(length))[TENSOR]
        start, stop = entry["data_offsets"]
        opened.seek(8 + length + start)
        raw = opened.read(stop - start)
    if entry["dtype"] == "F16":
        count = len(raw) // 2
        raw = struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", raw))
    if entry["dtype"] != "BF16":
        bits = struct.unpack(f"<{len(raw) // 4}I", raw)
        near = [(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits]  # to the nearest, ties to even
        raw = struct.pack(f"<{len(near)}H", *near)
    return digest(raw, num_layers)
