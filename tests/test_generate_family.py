"""dax generate with a folder of Wan2.2 TI2V-5B's kind, from text or from an image as its pipeline says; and of VACE."""

import numpy as np
import pytest

from dax.bench.model import facts_of
from dax.errors import DaxError
from dax.generate.preflight import preflight
from dax.generate.run import Job, generate
from dax.generate.settle import check_model
from tests.broken import change, edit, refused
from tests.conftest import build_ti2v_pipe, build_vace_pipe, stock_frames
from tests.models.test_image_to_video import picture

SMALL = {"prompt": "a cat", "height": 64, "width": 96, "num_frames": 5, "steps": 2, "seed": 5}


@pytest.fixture(params=[False, True], ids=["from text", "from an image"])
def made(request, tmp_path):
    """(pipe, its folder, the picture it starts from as Job takes it)"""
    pipe = build_ti2v_pipe(request.param)
    pipe.save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "first.png")
    return pipe, tmp_path / "model", {"image": str(tmp_path / "first.png")} if request.param else {}


def test_frames_are_those_of_the_stock_pipeline(made, tmp_path):
    pipe, folder, paths = made
    record = generate(Job(SMALL, str(tmp_path / "clip.npz"), str(folder), **paths))
    saved = np.load(tmp_path / "clip.npz")["frames"]
    assert saved.shape == (5, 64, 96, 3) and saved.std() > 1
    assert np.abs(saved.astype(int) - stock_frames(pipe, SMALL, paths)).max() <= 1
    assert len(record["images"]) == len(paths)


def test_a_whole_folder_passes_and_what_does_not_fit_is_refused_before_weights_are_read(made, tmp_path, monkeypatch):
    pipe, folder, paths = made
    monkeypatch.setattr("dax.generate.run.load", None)
    checked = preflight(folder)
    assert checked.facts == facts_of(str(folder)) and checked.facts.num_images == len(paths)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert checked.parameters == sum(p.numel() for part in parts for p in part.parameters())
    job = Job(SMALL, str(tmp_path / "clip.npz"), str(folder), **paths)
    if paths:
        wrong = {"no image": {"image": None}, "takes a first image only": {"last_image": paths["image"]}}
        with pytest.raises(DaxError, match="starts from an image: dax generate takes it"):
            check_model(str(folder))
    else:
        wrong = {"starts from text alone": {"image": str(tmp_path / "first.png")}}
    wrong["height 48 must be a multiple of 32"] = {"given": SMALL | {"height": 48}}
    for says, differently in wrong.items():
        with pytest.raises(DaxError, match=says):
            generate(Job(**vars(job) | differently))
    index, vae = folder / "model_index.json", folder / "vae" / "config.json"
    for path, values, says in (
        (index, {"expand_timesteps": False}, "expand_timesteps = False around 48 channels"),
        (vae, {"scale_factor_spatial": 8}, "scale_factor_spatial = 8, but wan-ti2v has 16"),
        (vae, {"patch_size": None}, "in_channels = 12 must be 3 for each pixel of a patch"),
        (vae, {"is_residual": False}, "tensors"),
        (vae, {"latents_std": [1.0] * 16}, "latents_std must be 48 numbers above 0"),
    ):
        before = path.read_text()
        change(path, **values)
        refused(folder, says)
        path.write_text(before)
    edit(folder / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("decoder.conv_in.bias"))
    refused(folder, "decoder.conv_in.bias")


def test_a_folder_of_vace_passes_and_the_command_line_refuses_it_by_name(tmp_path, monkeypatch):
    pipe, folder = build_vace_pipe(), tmp_path / "model"
    pipe.save_pretrained(folder)
    monkeypatch.setattr("dax.generate.run.load", None)
    assert preflight(folder).facts == facts_of(str(folder))
    with pytest.raises(DaxError, match="wan-vace-3x64 takes a control video, which the command line does not"):
        generate(Job(SMALL, str(tmp_path / "clip.npz"), str(folder)))
    edit(folder / "transformer" / "diffusion_pytorch_model.safetensors", lambda t: t.pop("vace_blocks.1.proj_out.bias"))
    refused(folder, "vace_blocks.1.proj_out.bias")
