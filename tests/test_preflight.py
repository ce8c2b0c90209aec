"""Broken checkpoints: each is refused in one line that names the file, before a weight is read. Rows 23, 30 to 36.

Every test breaks its own copy of a folder that passes whole. Weight files are in test_checkpoint.py.
"""

import os
import shutil
import subprocess
import sys

import pytest

from dax.errors import DaxError
from dax.generate.preflight import locate, preflight
from dax.models.tiny import FOLDER
from tests.broken import PART, WEIGHTS, change, edit, refused


def test_whole_folders_pass(folder):
    checked, embedded = preflight(folder), preflight(FOLDER)
    assert checked.facts.num_layers == 2 and embedded.facts.name == "tiny"
    assert checked.digest == preflight(folder).digest != embedded.digest
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    each = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert (checked.parameters, checked.text_parameters) == (sum(each), each[-1])


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
        ("vae", "z_dim", 8, "the transformer's out_channels is 16"),
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
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}),  # around a text-to-video transformer
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
    from dax.generate.stages import load

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
