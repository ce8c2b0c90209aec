"""Broken checkpoints: each is refused in one line that names the file, before a weight is read. Rows 23 to 36.

Every test breaks its own copy of `random_folder` or of the embedded model; the whole ones must pass.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from dax.errors import DaxError
from dax.generate.preflight import locate, preflight, verify
from dax.models.tiny import FOLDER

WEIGHTS = "diffusion_pytorch_model.safetensors"
PART = {"transformer": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}


@pytest.fixture
def folder(random_folder, tmp_path):
    return shutil.copytree(random_folder, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    """The embedded model: its transformer comes in two shards and an index."""
    return shutil.copytree(FOLDER, tmp_path / "tiny")


def refused(folder, *says: str) -> str:
    with pytest.raises(DaxError) as caught:
        preflight(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    assert all(text in message for text in says), message
    return message


def change(path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit(path, function) -> None:
    """Rewrite the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)


def test_whole_folders_pass(folder):
    checked, embedded = preflight(folder), preflight(FOLDER)
    assert checked.facts.num_layers == 2 and embedded.facts.name == "tiny"
    assert checked.digest == preflight(folder).digest != embedded.digest
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert checked.parameters == sum(p.numel() for part in parts for p in part.parameters())


def test_the_digest_tells_models_of_one_shape_apart(folder):
    before = preflight(folder).digest
    edit(folder / "transformer" / WEIGHTS, lambda tensors: tensors["proj_out.bias"].add_(1))
    assert preflight(folder).digest != before


def test_nothing_heavy_is_imported():
    script = "import sys; from dax.generate.preflight import preflight; from dax.models.tiny import FOLDER; "
    script += "preflight(FOLDER); print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert ended.stdout.strip() == "set()", ended.stderr


@pytest.mark.fault(23)
def test_row_23_no_such_folder(tmp_path):
    refused(tmp_path / "absent", "no such folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a diffusers folder")
    refused(tmp_path, "model_index.json: missing")


@pytest.mark.fault(23)
@pytest.mark.parametrize("offline", ["0", "1"])
def test_row_23_a_hub_id_without_network(tmp_path, offline):
    script = "from dax.generate.preflight import locate; locate('someone/something')"
    nowhere = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **nowhere}, timeout=30
    )
    last = ended.stderr.splitlines()[-1]
    assert "DaxError: model someone/something: not found locally and the hub is unreachable" in last
    assert "set HF_HOME or give --model DIR" in last


@pytest.mark.fault(23)
def test_row_23_a_hub_id_in_the_cache_needs_no_network(folder, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert preflight(locate("someone/something")).facts.num_layers == 2


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
    import random

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


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("transformer", "num_layers", 1, "tensors that its config does not have, first blocks.1."),
        ("transformer", "num_layers", 3, "tensors are missing, first blocks.2."),
        ("transformer", "num_attention_heads", 3, "of another shape"),
        ("transformer", "num_attention_heads", 0, "num_attention_heads"),
        ("transformer", "ffn_dim", "128", "ffn_dim"),
        ("vae", "base_dim", 8, "of another shape"),
        ("vae", "z_dim", 8, "the transformer's in_channels is 16"),
        ("vae", "latents_std", [0.0] * 16, "latents_std must be 16 numbers above 0"),
        ("vae", "latents_mean", [1.0] * 15, "latents_mean must be 16 numbers"),
        ("text_encoder", "d_model", 64, "the transformer's text_dim is 32"),
        ("text_encoder", "vocab_size", 3, "of another shape"),
    ],
)
def test_row_30_a_config_that_is_not_its_checkpoints(folder, part, key, value, says):
    change(folder / part / "config.json", **{key: value})
    refused(folder, part, says)


@pytest.mark.fault(30)
@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\ufeff{}", "[" * 100_000])
def test_row_30_configs_that_are_no_json_object(folder, file, content):
    (folder / file).write_text(content)
    refused(folder, file)


@pytest.mark.fault(31)
def test_row_31_a_text_encoder_that_lacks_a_layer(folder):
    def cut(tensors):
        for name in [name for name in tensors if name.startswith("encoder.block.1.")]:
            del tensors[name]

    edit(folder / "text_encoder" / "model.safetensors", cut)
    refused(folder, "text_encoder", "of 22 tensors are missing, first encoder.block.1.")


def test_the_text_encoders_embedding_may_go_by_either_name(folder):
    def rename(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    edit(folder / "text_encoder" / "model.safetensors", rename)
    preflight(folder)
    edit(folder / "text_encoder" / "model.safetensors", lambda tensors: tensors.pop("encoder.embed_tokens.weight"))
    refused(folder, "first shared.weight")


@pytest.mark.fault(32)
@pytest.mark.parametrize("fault", ["absent", "no vocabulary", "cut", "of nothing", "short spiece"])
def test_row_32_the_tokenizer(folder, fault):
    path = folder / "tokenizer" / "tokenizer.json"
    if fault == "absent":
        shutil.rmtree(folder / "tokenizer")
    elif fault in ("no vocabulary", "short spiece"):
        path.unlink()
        if fault == "short spiece":
            path = folder / "tokenizer" / "spiece.model"
            path.write_bytes(b"\x0a")
    elif fault == "cut":
        path.write_text(path.read_text()[:-200])
    else:
        change(path, model=None)
    refused(folder, str(path))


@pytest.mark.fault(33)
def test_row_33_a_pickle_is_not_read(folder):
    path = folder / "transformer" / WEIGHTS
    path.rename(path.with_suffix(".bin"))
    refused(folder, "diffusion_pytorch_model.bin", "can run code", "safetensors")


@pytest.mark.fault(33)
@pytest.mark.parametrize("place", ["pipeline.py", "transformer/modeling.py"])
def test_row_33_code_in_the_folder_is_refused_not_imported(folder, place):
    (folder / place).write_text("raise SystemExit('imported')")
    refused(folder, place, "brings code")


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("model_index.json", {"_class_name": ["my_pipeline", "WanPipeline"]}, "_class_name"),
        ("model_index.json", {"transformer": ["os", "system"]}, "'os', 'system'"),
        ("model_index.json", {"extra": ["subprocess", "run"]}, "extra"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "auto_map"),
        ("text_encoder/config.json", {"architectures": ["Evil"]}, "architectures"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"}, "supported: UniPC"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "flow_prediction"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "supported: AutoencoderKLWan"),
        ("model_index.json", {"vae": None}, "names no vae"),
    ],
)
def test_row_33_foreign_classes_are_refused(folder, file, values, says):
    change(folder / file, **values)
    refused(folder, says)


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}),
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}),
        ("model_index.json", {"boundary_ratio": 0.9}),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}),
        ("transformer/config.json", {"in_channels": 36}),
        ("transformer/config.json", {"image_dim": 1280}),
    ],
)
def test_row_34_other_models_are_refused_by_their_configs_alone(folder, file, values):
    for part, name in PART.items():
        (folder / part / name).unlink()
    change(folder / file, **values)
    refused(folder, "supported: Wan2.1 text-to-video")


@pytest.mark.fault(36)
def test_row_36_a_read_only_model_loads_and_is_left_alone(folder):
    from dax.generate.run import load

    def listing():
        return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))

    before = listing()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        import torch

        checked = preflight(folder)
        load(checked, "cpu", torch.float32)
        checked.unchanged()
        assert listing() == before
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("file", "fault", "says"),
    [
        ("vae/config.json", "loop", "Too many levels of symbolic links"),
        (f"vae/{WEIGHTS}", "loop", "Too many levels of symbolic links"),
        (f"vae/{WEIGHTS}", "dangling", "a link to nothing"),
        (f"vae/{WEIGHTS}", "fifo", "not a regular file"),
        ("tokenizer/tokenizer.json", "folder", "not a regular file"),
    ],
)
def test_row_36_files_that_are_none(folder, file, fault, says):
    path = folder / file
    path.unlink()
    if fault in ("loop", "dangling"):
        path.symlink_to(path if fault == "loop" else folder / "nothing")
    else:
        os.mkfifo(path) if fault == "fifo" else path.mkdir()
    refused(folder, str(path), says)


@pytest.mark.fault(36)
def test_row_36_a_loop_instead_of_a_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "Too many levels of symbolic links")


@pytest.mark.fault(36)
def test_row_36_a_file_replaced_while_loading(folder, monkeypatch, tmp_path):
    from dax.generate import run

    honest = run.load

    def load_slowly(checked, *arguments):
        pipe = honest(checked, *arguments)
        edit(folder / "vae" / WEIGHTS, lambda tensors: None)
        return pipe

    monkeypatch.setattr(run, "load", load_slowly)
    small = {"prompt": "x", "height": 32, "width": 32, "num_frames": 1, "steps": 1}
    with pytest.raises(DaxError, match="replaced while it was loaded: run again") as caught:
        run.generate(run.Job(small, str(tmp_path / "clip.npz"), model=str(folder)))
    assert caught.value.exit_code == 3 and not (tmp_path / "clip.npz").exists()


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert locate("a/b").is_dir() and str(locate("./no/such")) == "no/such"
