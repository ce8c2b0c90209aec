"""Weight files: damaged, incomplete, poisoned, of foreign dtypes. Rows 24 to 29 of docs/faults.md."""

import hashlib
import json
import os
import random
import shutil

import pytest

from dax.errors import DaxError
from dax.generate.preflight import preflight, verify
from dax.models.tiny import FOLDER
from tests.broken import PART, WEIGHTS, change, edit, refused


@pytest.fixture
def sharded(tmp_path):
    """The embedded model: its transformer comes in two shards and an index."""
    return shutil.copytree(FOLDER, tmp_path / "tiny")


@pytest.mark.fault(24)
@pytest.mark.parametrize("part", PART)
@pytest.mark.parametrize("fault", ["empty", "cut", "cut in the header", "longer", "garbage", "1 TB header"])
def test_row_24_a_damaged_weight_file(folder, part, fault):
    path = folder / part / PART[part]
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "cut": whole[:-1000],
        "cut in the header": whole[:100],
        "longer": whole + b"x",
        "garbage": b"garbage" * 100,
        "1 TB header": (2**40).to_bytes(8, "little") + whole[8:],
    }[fault]
    path.write_bytes(content)
    message = refused(folder, str(path), f"found {len(content)} bytes")
    if fault in ("cut", "longer"):
        assert f"expected {len(whole)}" in message


@pytest.mark.fault(24)
@pytest.mark.parametrize("seed", range(40))
def test_row_24_bytes_changed_anywhere_in_the_header_never_crash(folder, seed):
    path = folder / "vae" / WEIGHTS
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(rng.choice([1, 3, 30])):
        content[rng.randrange(8 + int.from_bytes(content[:8], "little") % len(content))] = rng.randrange(256)
    path.write_bytes(content)
    try:
        preflight(folder)  # blanks may have changed, or the free text of __metadata__
    except DaxError as error:
        assert error.exit_code == 3 and "\n" not in str(error)


@pytest.mark.fault(25)
@pytest.mark.parametrize("recorded", ["manifest", "hub cache"])
def test_row_25_a_flipped_bit(folder, tmp_path, recorded):
    path = folder / "transformer" / WEIGHTS
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if recorded == "manifest":
        (folder / "SHA256SUMS").write_text(f"{digest}  transformer/{WEIGHTS}\n")
    else:
        blob = tmp_path / digest
        path.rename(blob)
        path.symlink_to(blob)
    checked = preflight(folder)
    total = len(checked.files)
    assert verify(checked) == [f"--verify: {total - 1} of {total} files have no recorded digest"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    preflight(folder)  # a header tells nothing of it
    with pytest.raises(DaxError, match=f"{path}: sha256 .* is not the recorded {digest[:12]}") as caught:
        verify(preflight(folder))
    assert caught.value.exit_code == 3


INDEX = WEIGHTS + ".index.json"
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("fault", "names", "says"),
    [
        ("missing shard", SHARD, "missing"),
        ("cut index", INDEX, "not JSON"),
        ("no weight map", INDEX, "has no weight_map"),
        ("key not listed", INDEX, "does not list tensor proj_out.bias"),
        ("key not there", SHARD, "lacks tensor ghost"),
        ("outside", INDEX, "names '../../secret.safetensors'"),
        ("a pickle", INDEX, "names 'weights.bin'"),
    ],
)
def test_row_26_shards_and_their_index(sharded, fault, names, says):
    part = sharded / "transformer"
    index = part / INDEX
    listed = json.loads(index.read_text())["weight_map"]
    assert SHARD in listed.values() and listed["proj_out.bias"] in os.listdir(part)
    if fault == "missing shard":
        (part / SHARD).unlink()
    elif fault == "cut index":
        index.write_text(index.read_text()[:-40])
    elif fault == "no weight map":
        change(index, weight_map=None)
    else:
        if fault == "key not listed":
            del listed["proj_out.bias"]
        elif fault == "key not there":
            listed["ghost"] = SHARD
        else:
            listed["proj_out.bias"] = "../../secret.safetensors" if fault == "outside" else "weights.bin"
        change(index, weight_map=listed)
    refused(sharded, names, says)


@pytest.mark.fault(27)
@pytest.mark.parametrize("part", PART)
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_row_27_tensors_missing_extra_and_of_another_shape(folder, part, fault):
    path = folder / part / PART[part]
    picked = []

    def break_it(tensors):
        name = sorted(tensors)[len(tensors) // 2]
        picked.append(name)
        if fault == "missing":
            del tensors[name]
        elif fault == "extra":
            tensors["ghost"] = tensors[name].clone()
        else:
            tensors[name] = tensors[name].flatten()[:-1].clone()

    edit(path, break_it)
    says = {"missing": "tensors are missing", "extra": "1 tensors that its config does not have", "shape": "not ["}
    refused(folder, part, says[fault], "ghost" if fault == "extra" else picked[0])


@pytest.mark.fault(28)
@pytest.mark.parametrize("part", PART)
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_row_28_verify_finds_a_weight_that_is_not_finite(folder, part, value):
    name = []

    def poison(tensors):
        name.append(sorted(tensors)[3])
        tensors[name[0]].view(-1)[-1] = float(value)

    edit(folder / part / PART[part], poison)
    checked = preflight(folder)
    with pytest.raises(DaxError, match="infinity or a NaN") as caught:
        verify(checked)
    assert caught.value.exit_code == 3 and name[0] in str(caught.value) and part in str(caught.value)


@pytest.mark.fault(29)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64"])
def test_row_29_weights_of_a_dtype_nobody_scales(folder, dtype):
    import torch

    def cast(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].to(getattr(torch, dtype))

    edit(folder / "transformer" / WEIGHTS, cast)
    refused(folder, WEIGHTS, "tensor proj_out.weight has dtype", "supported: F32, F16, BF16")


def test_the_text_encoders_embedding_may_go_by_either_name(folder):
    def rename(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    edit(folder / "text_encoder" / "model.safetensors", rename)
    preflight(folder)
    edit(folder / "text_encoder" / "model.safetensors", lambda tensors: tensors.pop("encoder.embed_tokens.weight"))
    refused(folder, "first shared.weight")
