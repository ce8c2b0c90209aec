"""Which checkpoint a calibration belongs to: one small tensor that no plan changes, read from a model or its folder.

The head's modulation table, rounded to bf16 so that every dtype a checkpoint is kept or loaded in gives one digest.
Fine-tuning moves it; an adapter on other layers does not. Nothing here imports torch.
"""

import hashlib

import numpy as np

TENSOR = "scale_shift_table"


def digest(bf16: bytes, num_layers: int) -> str:
    """sha256 (hex) of the table's bf16 bytes and the number of blocks."""
    return hashlib.sha256(f"wan {num_layers} ".encode() + bf16).hexdigest()


def folder_digest(tensors: dict, num_layers: int) -> str:
    """The digest of a folder; `tensors` says where each lies, as `dax.generate.checkpoint.read_weights` gives them."""
    found = tensors[TENSOR]
    with found.file.open("rb") as file:
        file.seek(found.start)
        raw = file.read(found.stop - found.start)
    if found.dtype == "F16":
        raw = np.frombuffer(raw, "<f2").astype("<f4").tobytes()
    if found.dtype != "BF16":
        bits = np.frombuffer(raw, "<u4")
        raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to the nearest, ties to even
    return digest(raw, num_layers)
