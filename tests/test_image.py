"""Pictures a clip starts from: good ones as they are, bad ones in one line. And the job with one, to the stock clip."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from dax.bench.model import facts_of
from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate.image import MOST_PIXELS, read_image, read_images, stretched
from dax.generate.preflight import preflight
from dax.generate.run import Job, generate
from dax.generate.settle import check_model
from dax.generate.shapes import image_encoder_shapes
from dax.models.tiny import FOLDER
from tests.broken import change, edit, refused
from tests.conftest import build_image_pipe, stock_frames

I2V, FLF2V = FACTS["wan2.1-i2v-14b-480p"], FACTS["wan2.1-flf2v-14b-720p"]


def picture(seed=0, size=(48, 32), mode="RGB") -> Image.Image:
    width, height = size
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, len(mode)), generator=random, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def wrong(path, *says: str, code="bad_request") -> None:
    with pytest.raises(DaxError) as caught:
        read_image(str(path))
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert all(text in str(caught.value) for text in (str(path), *says)), caught.value


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_good_pictures_come_as_they_are(tmp_path, suffix, mode):
    path, image = tmp_path / f"a.{suffix}", picture().convert(mode)  # RGBA: opaque
    image.save(path, lossless=True)
    read = read_image(str(path))
    assert (read.width, read.height, read.name) == (48, 32, path.name) and read.pixels.mode == "RGB"
    if mode != "P" or suffix == "png":
        assert np.array_equal(np.asarray(read.pixels), np.asarray(image.convert("RGB")))


def test_a_jpeg_is_read(tmp_path):
    picture().save(tmp_path / "a.jpg")
    assert read_image(str(tmp_path / "a.jpg")).record().keys() == {"name", "sha256", "width", "height"}


@pytest.mark.fault(62)
def test_row_62_files_that_are_no_such_picture(tmp_path):
    wrong(tmp_path / "absent.png", "No such file")
    wrong(tmp_path, "Is a directory")
    for name, content in (("empty.png", b""), ("text.png", b"hello"), ("pickle.png", b"\x80\x04N.")):
        (tmp_path / name).write_bytes(content)
        wrong(tmp_path / name, "not a PNG, JPEG or WebP picture")
    picture().save(tmp_path / "a.png", format="BMP")
    wrong(tmp_path / "a.png", "not a PNG, JPEG or WebP picture")
    for suffix in ("png", "jpg", "webp"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        picture(size=(200, 200)).save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        wrong(cut)


@pytest.mark.fault(62)
def test_row_62_pictures_that_would_not_look_as_they_do_in_a_viewer(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (10_000, MOST_PIXELS // 10_000 + 1)).save(path)
    wrong(path, "50 megapixels: at most 50")
    for suffix in ("png", "webp"):
        path = tmp_path / f"film.{suffix}"
        picture().save(path, save_all=True, append_images=[picture(1)])
        wrong(path, "is animated, 2 pictures")
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"turned.{suffix}"
        picture().save(path, exif=exif)
        wrong(path, "turned by its EXIF orientation, 6")
    path = tmp_path / "alpha.png"
    picture(mode="RGBA").save(path)
    wrong(path, "is transparent in places")
    picture().convert("P").save(path, transparency=0)
    wrong(path, "is transparent in places")
    Image.new("I;16", (8, 8)).save(path)
    wrong(path, "mode I;16")
    picture().convert("CMYK").save(tmp_path / "a.jpg")
    wrong(tmp_path / "a.jpg", "mode CMYK")


@pytest.mark.fault(63)
@pytest.mark.parametrize(
    ("facts", "paths", "says"),
    [
        (FACTS["tiny"], ("a.png", None), "--image: tiny starts from text alone"),
        (FACTS["tiny"], (None, "a.png"), "--image: tiny starts from text alone"),
        (I2V, (None, None), "no image: wan2.1-i2v-14b-480p starts from one"),
        (I2V, (None, "a.png"), "no image: wan2.1-i2v-14b-480p starts from one"),
        (I2V, ("a.png", "a.png"), "--last-image: wan2.1-i2v-14b-480p takes a first image only"),
        (FLF2V, ("a.png", None), "no last image: wan2.1-flf2v-14b-720p"),
    ],
)
def test_row_63_as_many_pictures_as_the_model_takes(facts, paths, says):
    with pytest.raises(DaxError, match=says):
        read_images(facts, *paths)


def test_a_stretched_picture_is_remarked(tmp_path):
    picture(size=(48, 32)).save(tmp_path / "a.png")
    read = (read_image(str(tmp_path / "a.png")),)
    assert stretched(read, 64, 96) == [] and stretched(read, 64, 64) == ["a.png is 48x32: stretched to 64x64"]


@pytest.fixture(scope="module", params=[1, 2], ids=["first frame", "first and last"])
def image_folder(request, tmp_path_factory):
    """The folder of a small random pipeline and as many pictures as it takes; read only."""
    folder = tmp_path_factory.mktemp("image_wan")
    pipe = build_image_pipe(request.param)
    pipe.save_pretrained(folder / "model")
    names = ("image", "last_image")[: request.param]
    for i, name in enumerate(names):
        picture(i).save(folder / f"{name}.png")
    return folder / "model", {name: str(folder / f"{name}.png") for name in names}, pipe


SMALL = {"prompt": "a cat", "height": 32, "width": 48, "num_frames": 5, "steps": 2, "seed": 5}


def test_frames_are_those_of_the_stock_pipeline(image_folder, tmp_path):
    folder, paths, pipe = image_folder
    record = generate(Job(SMALL, str(tmp_path / "clip.npz"), str(folder), **paths))
    saved = np.load(tmp_path / "clip.npz")["frames"]
    assert np.abs(saved.astype(int) - stock_frames(pipe, SMALL, paths)).max() <= 1
    assert [image["name"] for image in record["images"]] == [f"{name}.png" for name in paths]
    assert record["warnings"] == []
    other = tmp_path / "other.png"
    picture(9).save(other)
    generate(Job(SMALL, str(tmp_path / "other.npz"), str(folder), **paths | {"image": str(other)}))
    assert not np.array_equal(np.load(tmp_path / "other.npz")["frames"], saved)


def test_refusals_come_before_weights_are_read(image_folder, tmp_path, monkeypatch):
    folder, paths, _ = image_folder
    monkeypatch.setattr("dax.generate.run.load", None)
    job = Job(SMALL, str(tmp_path / "clip.npz"), str(folder))
    with pytest.raises(DaxError, match="no image"):
        generate(job)
    with pytest.raises(DaxError, match="starts from text alone"):
        generate(replace(job, model=None, image=paths["image"]))
    if len(paths) == 2:
        with pytest.raises(DaxError, match="num_frames 1: a first and a last frame are two"):
            generate(replace(job, given=SMALL | {"num_frames": 1}, **paths))
    with pytest.raises(DaxError, match="starts from an image: dax generate takes it"):
        check_model(str(folder))


def test_a_whole_folder_passes_and_a_broken_image_encoder_does_not(image_folder, tmp_path):
    source, _, pipe = image_folder
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.image_encoder)
    assert preflight(source).facts == facts_of(str(source)) and preflight(source).facts.num_images in (1, 2)
    assert preflight(source).parameters == sum(p.numel() for part in parts for p in part.parameters())
    folder = shutil.copytree(source, tmp_path / "model")
    weights = folder / "image_encoder" / "model.safetensors"
    edit(weights, lambda tensors: tensors.pop("pre_layrnorm.bias"))
    refused(folder, "image_encoder", "pre_layrnorm.bias")
    edit(weights, lambda tensors: tensors.update({"pre_layrnorm.bias": torch.zeros(17)}))
    refused(folder, "pre_layrnorm.bias [17], not [16]")
    shutil.copy(source / "image_encoder" / "model.safetensors", weights)
    older = lambda tensors: [tensors.update({f"vision_model.{name}": tensors.pop(name)}) for name in list(tensors)]
    edit(weights, older)
    preflight(folder)
    change(folder / "image_processor" / "preprocessor_config.json", crop_size={"height": 336, "width": 336})
    refused(folder, "crop_size")
    for key, value, says in (("patch_size", 16, "197 tokens"), ("hidden_size", 32, "image_dim is 16")):
        change(folder / "image_encoder" / "config.json", **{key: value})
        refused(folder, says)
        shutil.copy(source / "image_encoder" / "config.json", folder / "image_encoder" / "config.json")
    change(folder / "model_index.json", image_encoder=["os", "system"])
    refused(folder, "image_encoder = ['os', 'system']")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": [None, None]}))
    refused(folder, "names no image_encoder")
    assert preflight(FOLDER).facts.num_images == 0


def test_image_encoders_are_the_vendors():
    """CLIP ViT-H/14, the one of Wan2.1."""
    config = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**config, num_attention_heads=16))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert image_encoder_shapes(config, 1280, 257) == expected
