"""`dax generate` with two experts: a folder checked, loaded and run; each expert's forwards in the record."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate import video
from dax.generate.preflight import preflight
from dax.generate.request import Released, check_memory, experts_bytes, make_request
from dax.generate.run import Job, generate
from dax.generate.settle import check_model
from dax.generate.steps import checkpoint_of
from dax.plan import Plan
from tests.broken import WEIGHTS, change, edit, refused
from tests.conftest import build_expert_pipe, stock_frames
from tests.models.test_image_to_video import picture

SMALL = {"prompt": "a cat", "height": 32, "width": 48, "num_frames": 5, "steps": 4, "seed": 5}


@pytest.fixture(scope="module", params=[False, True], ids=["text", "image"])
def expert_folder(request, tmp_path_factory):
    """(the folder of a small random pipeline, what --image takes, the pipeline); read only."""
    folder, image = tmp_path_factory.mktemp("experts"), {}
    pipe = build_expert_pipe(request.param)
    pipe.save_pretrained(folder / "model")
    if request.param:
        picture(0).save(folder / "image.png")
        image = {"image": str(folder / "image.png")}
    return folder / "model", image, pipe


def test_frames_are_those_of_the_stock_pipeline(expert_folder, tmp_path):
    folder, image, pipe = expert_folder
    given = SMALL | {"guidance_scale": 6.0, "guidance_scale_2": 2.0}
    job = Job(given, str(tmp_path / "clip.npz"), str(folder), **image)
    record = generate(job)
    saved = np.load(tmp_path / "clip.npz")["frames"]
    assert np.abs(saved.astype(int) - stock_frames(pipe, given, image)).max() <= 1
    assert record["computed"] == {"cond": 4, "uncond": 4}
    assert record["computed_by_expert"] == 2 * [{"cond": 2, "uncond": 2}]
    assert (record["guidance_scale"], record["guidance_scale_2"]) == (6.0, 2.0)
    earlier = Job({}, str(tmp_path / "again.npz"), from_clip=str(tmp_path / "clip.npz"), **image)
    assert generate(earlier)["guidance_scale_2"] == 2.0
    assert np.array_equal(np.load(tmp_path / "again.npz")["frames"], saved)
    generate(replace(job, given=given | {"guidance_scale_2": 6.0}, output=str(tmp_path / "other.npz")))
    assert not np.array_equal(np.load(tmp_path / "other.npz")["frames"], saved)


def test_a_plan_reaches_both(expert_folder, tmp_path):
    folder, image, _ = expert_folder
    sets = ("linear.scheme=int8", "offload=experts", "cache.policy=mask", "cache.mask=1000")
    record = generate(Job(SMALL, str(tmp_path / "clip.mp4"), str(folder), sets=sets, **image))
    assert record["computed_by_expert"] == 2 * [{"cond": 1, "uncond": 1}]
    assert record["plan"]["offload"] == "experts" and record["computed"] == {"cond": 2, "uncond": 2}
    assert video.read_record(tmp_path / "clip.mp4")["computed_by_expert"] == record["computed_by_expert"]


@pytest.mark.fault(66)
def test_row_66_a_folder_that_lacks_an_expert(expert_folder, tmp_path):
    source, _, _ = expert_folder
    checked = preflight(source)
    assert checked.facts.num_experts == 2
    folder = shutil.copytree(source, tmp_path / "model")
    assert preflight(folder).digest == checked.digest
    before = checkpoint_of(folder, checked.facts)
    edit(folder / "transformer_2" / WEIGHTS, lambda tensors: tensors["scale_shift_table"].add_(1))
    assert preflight(folder).digest != checked.digest and checkpoint_of(folder, checked.facts) != before
    (folder / "transformer_2" / WEIGHTS).unlink()
    refused(folder, "transformer_2", WEIGHTS)
    shutil.copy(source / "transformer_2" / WEIGHTS, folder / "transformer_2")
    edit(folder / "transformer_2" / WEIGHTS, lambda tensors: tensors.pop("proj_out.bias"))
    refused(folder, "transformer_2", "missing, first proj_out.bias")
    change(folder / "transformer_2" / "config.json", ffn_dim=64)
    refused(folder, "transformer_2/config.json: not of the shapes of transformer/config.json")
    shutil.rmtree(folder / "transformer_2")
    refused(folder, "transformer_2/config.json: missing")
    change(folder / "model_index.json", transformer_2=[None, None])
    refused(folder, "two experts need both")


def test_an_image_encoder_that_nothing_asks_is_not_loaded(expert_folder, tmp_path):
    source, image, _ = expert_folder
    if image:
        folder = shutil.copytree(source, tmp_path / "model")
        change(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"])
        refused(folder, "names an image_encoder, and the transformer takes no image tokens")


def test_the_live_model_has_the_folders_digest(expert_folder):
    from dax.models.wan_steps import checkpoint_digest

    folder, _, pipe = expert_folder
    facts = preflight(folder).facts
    assert checkpoint_digest(pipe.transformer, pipe.transformer_2) == checkpoint_of(folder, facts)
    assert checkpoint_digest(pipe.transformer_2, pipe.transformer) != checkpoint_of(folder, facts)


def test_refusals_come_before_weights_are_read(expert_folder, random_folder, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    folder, image, _ = expert_folder
    monkeypatch.setattr("dax.generate.run.load", None)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    job = Job(SMALL, str(tmp_path / "clip.npz"), str(folder), **image)
    for changed, says in (
        (replace(job, loras=(str(tmp_path / "lora.safetensors"),)), "--lora: .* has two experts and a file is for one"),
        (replace(job, sets=("cache.policy=teacache",)), "nothing is published or calibrated for"),
        (replace(job, given=SMALL | {"guidance_scale_2": -1.0}), "guidance_scale_2 -1.0 must be"),
        (
            replace(job, given=SMALL | {"guidance_scale": 1.0, "guidance_scale_2": 2.0}),
            "guidance_scale_2 2 has no effect",
        ),
        (
            Job(SMALL | {"guidance_scale_2": 2.0}, job.output, str(random_folder)),
            "guidance_scale_2: .* has one transformer",
        ),
        (Job(SMALL, job.output, str(random_folder), sets=("offload=experts",)), "has one transformer"),
    ):
        with pytest.raises(DaxError, match=says):
            generate(changed)
    with pytest.raises(DaxError, match="dax generate takes it, comparing, tuning"):
        check_model(str(folder))


def test_a_stated_scale_is_both_experts():
    facts = FACTS["wan2.2-t2v-a14b"]
    scales = lambda **given: [
        getattr(make_request(facts, {"prompt": "x", **given})[0], name)
        for name in ("guidance_scale", "guidance_scale_2")
    ]
    assert scales() == [4.0, 3.0]
    assert scales(guidance_scale=5) == [5.0, 5.0]
    assert scales(guidance_scale=5, guidance_scale_2=2) == [5.0, 2.0]
    assert scales(guidance_scale_2=2) == [4.0, 2.0]
    assert make_request(FACTS["tiny"], {"prompt": "x"})[0].guidance_scale_2 is None


def test_memory_is_that_of_the_plan():
    """In bf16 on a GPU, with a text encoder of 5.7 G parameters: what fits in 45 GiB, and what does not."""
    facts = FACTS["wan2.2-t2v-a14b"]
    request = make_request(facts, {"prompt": "x"})[0]
    plans = {
        "both in bf16": Plan(),
        "both in 8 bits": Plan.load("balanced"),
        "one in bf16": Plan(offload="experts"),
        "one in 8 bits": Plan.load("balanced").model_copy(update={"offload": "experts"}),
    }
    GiB = {name: experts_bytes(facts, plan, 2) / 2**30 for name, plan in plans.items()}
    assert GiB == pytest.approx(
        {"both in bf16": 53.34, "both in 8 bits": 27.18, "one in bf16": 27.16, "one in 8 bits": 26.61}, abs=0.02
    )
    text = int(5.7e9 * 2)

    def check(plan: str, memory_gib: float) -> None:
        experts = experts_bytes(facts, plans[plan], 2)
        check_memory(facts, request, text + experts, 2, memory_gib, Released(text, experts))

    with pytest.raises(DaxError, match="needs about 64.0 GiB"):
        check("both in bf16", 60.0)
    check("both in 8 bits", 45.0)
