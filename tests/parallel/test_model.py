"""The stock pipeline on several ranks makes the clip one process makes, whatever the ranks divide."""

import numpy
import pytest

from dax.generate.run import Job, generate, settle
from tests.parallel import tasks

TOPOLOGIES = [
    (2, {"cfg": 2}),
    (2, {"cfg": 1, "ulysses": 2}),
    (2, {"cfg": 1, "rows": 2, "overlap": 1}),
    (4, {"cfg": 2, "ulysses": 2, "overlap": 3}),
    (4, {"cfg": 1, "ulysses": 2, "rows": 2}),
    (8, {"cfg": 1, "ulysses": 8, "overlap": 2}),
]


@pytest.mark.parametrize(("count", "parallel"), TOPOLOGIES, ids=str)
def test_the_clip_is_that_of_one_process(ranks, count, parallel):
    for latents, frames, restored, summary in ranks(count).run(tasks.model, parallel):
        assert latents < 1e-5
        assert frames < 1e-4
        assert restored
        assert "parallel.vae = split" in summary and f"on {count} ranks" in summary


@pytest.mark.parametrize(("count", "parallel"), TOPOLOGIES[1:5], ids=str)
def test_and_through_a_window(ranks, count, parallel):
    """Of 2 layers, 2 steps and 2 branches; undo gives the memory back."""
    forwards = 2 if parallel["cfg"] == 2 else 4
    for latents, same, chunks, freed in ranks(count).run(tasks.windowed, parallel):
        assert latents < 1e-5 and same
        assert chunks == 2 * forwards * max(parallel.get("overlap", 0), 1)
        assert freed == 2, "operands and output"


def test_an_engine_is_switched_to_a_window_and_back(ranks):
    """Of 2 layers, 2 steps and 2 branches."""
    found = ranks(2).run(tasks.switched, {"cfg": 1, "ulysses": 2, "overlap": 0})
    assert set(found) == {(True, 8, 2, 0)}


@pytest.mark.parametrize(
    "case",
    [
        ("two_experts", {"cfg": 1, "ulysses": 2}, False, {"offload": "experts"}),
        ("member", "build_vace_pipe", 2, {"cfg": 1, "rows": 2}, {}, {}),
        ("member", "build_ti2v_pipe", True, {"cfg": 1, "ulysses": 2}, {"height": 160, "width": 96}, {}),
    ],
    ids=("two experts", "VACE", "a timestep for each token"),
)
def test_one_window_serves_all_layers_of_a_pipeline(ranks, case):
    for latents, restored, *_ in ranks(2).run(tasks.through_a_window, *case):
        assert latents < 1e-5
        assert restored


@pytest.mark.parametrize("count, parallel", [(2, {"cfg": 2}), (4, {"cfg": 2, "ulysses": 2})])
def test_engines_in_a_row_make_no_more_groups_than_one(ranks, count, parallel):
    """A communicator takes time to make and to shut down, at the latest when the process ends, one after the other."""
    for first, *others in ranks(count).run(tasks.groups_after_engines, parallel, 3):
        assert others == [first, first]


def test_without_guidance(ranks):
    for latents, _, _, _ in ranks(2).run(tasks.model, {"cfg": 1}, 1.0):
        assert latents < 1e-5


@pytest.mark.parametrize(
    ("parallel", "num_images"), [({"cfg": 2}, 2), ({"cfg": 1, "ulysses": 2}, 1), ({"cfg": 1, "rows": 2}, 2)], ids=str
)
def test_image_to_video(ranks, parallel, num_images):
    for latents, restored in ranks(2).run(tasks.member, "build_image_pipe", num_images, parallel, {}, {}):
        assert latents < 1e-5
        assert restored


@pytest.mark.parametrize(
    ("parallel", "image", "keys"),
    [
        ({"cfg": 2}, True, {}),
        ({"cfg": 1, "ulysses": 2}, True, {}),
        ({"cfg": 1, "ulysses": 2}, True, {"blocks": {"fused": False}}),
        ({"cfg": 1, "rows": 2}, False, {}),
    ],
    ids=str,
)
def test_a_timestep_for_each_token(ranks, parallel, image, keys):
    """15 tokens of the first frame, 45 in all: the first rank has both timesteps, the second one."""
    size = {"height": 160, "width": 96}
    for latents, restored in ranks(2).run(tasks.member, "build_ti2v_pipe", image, parallel, size, keys):
        assert latents < 1e-5
        assert restored


@pytest.mark.parametrize(
    ("parallel", "size"),
    [({"cfg": 2}, {}), ({"cfg": 1, "ulysses": 2}, {}), ({"cfg": 1, "rows": 2}, {"num_frames": 1})],
    ids=str,
)
def test_vace(ranks, parallel, size):
    """Its control tokens are cut as the video's are."""
    for latents, restored in ranks(2).run(tasks.member, "build_vace_pipe", 2, parallel, size, {}):
        assert latents < 1e-5
        assert restored


def test_control_of_fewer_tokens_ends_in_zeros_and_of_more_is_refused(ranks):
    for short, long in ranks(2).run(tasks.other_control):
        assert short < 1e-5
        assert "control_hidden_states: 15 tokens more than the video has" in long


@pytest.mark.parametrize(
    ("parallel", "image", "more"),
    [
        ({"cfg": 2}, False, {}),
        ({"cfg": 1, "ulysses": 2}, True, {}),
        ({"cfg": 1, "rows": 2}, False, {"offload": "experts"}),
        ({"cfg": 2}, True, {"offload": "experts", "cache": {"policy": "mask", "mask": "1000"}}),
    ],
    ids=str,
)
def test_two_experts(ranks, parallel, image, more):
    for latents, restored, summary in ranks(2).run(tasks.two_experts, parallel, image, more):
        assert latents < 1e-5
        assert restored
        part = "parallel.cfg = 2: 2 of 2 transformers" if parallel["cfg"] == 2 else "4 of 4 self-attention layers"
        assert part in summary


def test_guidance_parallel_needs_guidance(ranks):
    with pytest.raises(AssertionError, match="parallel.cfg = 2 needs guidance"):
        ranks(2).run(tasks.model, {"cfg": 2}, 1.0)


@pytest.mark.fault(51)
def test_degrees_that_do_not_fit_the_ranks(ranks):
    with pytest.raises(AssertionError, match="parallel.ulysses = 3: not possible on 2 ranks with 12 heads; usable:"):
        ranks(2).run(tasks.model, {"ulysses": 3})


@pytest.mark.parametrize("fault", ("rope", "heads"))
def test_a_planted_fault_on_one_rank_is_seen(ranks, fault):
    assert all(difference < 1e-5 for difference in ranks(2).run(tasks.faulty, None))
    assert all(difference > 1e-3 for difference in ranks(2).run(tasks.faulty, fault))


def test_cross_attention_needs_no_other_rank(ranks):
    for cross, own, forward in ranks(2).run(tasks.collectives):
        assert (cross, own) == (0, 4)  # q, k, v and the output
        assert forward == 2 * 4 + 1  # and the tokens, joined after the head


def test_gpus_makes_the_clip_of_one_process(random_folder, tmp_path):
    """The ranks of `--gpus 2`, from the prompt to the file: text, noise, loop, decoder."""
    given = {"prompt": "a star", "height": 64, "width": 64, "num_frames": 9, "steps": 2}
    clips, records = [], []
    for gpus in (1, 2):
        path = tmp_path / f"{gpus}.npz"
        job = Job(given, str(path), str(random_folder), device="cpu", sets=("parallel.cfg=1",) * (gpus > 1), gpus=gpus)
        records.append(generate(job))
        clips.append(numpy.load(path)["frames"].astype(int))
    apart = abs(clips[0] - clips[1])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.001
    assert clips[0].std() > 1, "a blank clip would say nothing"
    alone, together = records
    assert (alone["ranks"], together["ranks"]) == (1, 2) and alone["computed"] == together["computed"]
    assert together["plan"]["parallel"]["ulysses"] == 2


def test_what_ranks_are_to_time_is_left_to_them(random_folder, tmp_path):
    """Degrees are decided before weights load; whether head chunks pay is measured, where the plan says auto."""
    given = {"prompt": "a star", "height": 64, "width": 64, "num_frames": 9, "steps": 2}
    for sets, overlap in (((), "auto"), (("parallel.overlap=3",), 3)):
        settled = settle(Job(given, str(tmp_path / "x.npz"), str(random_folder), device="cpu", sets=sets, gpus=2))
        assert settled.asked.parallel.overlap == overlap and settled.asked.parallel.cfg == 2
        assert settled.resolved.plan.parallel.overlap in (0, 3)


@pytest.mark.parametrize("reuse", ("velocity", "residual"))
@pytest.mark.parametrize("parallel", ({"cfg": 2}, {"cfg": 1, "ulysses": 2}), ids=str)
def test_with_a_step_cache(ranks, parallel, reuse):
    """The gate stands outside: every rank predicts the same steps, and both branches are there when it does."""
    cache = {"policy": "mask", "mask": "1101", "reuse": reuse}
    answers = ranks(2).run(tasks.cached, parallel, cache)
    for difference, effect, _ in answers:
        assert difference < 1e-5 < effect
    for branch in ("cond", "uncond"):  # a rank that only receives a branch does not know that its residual was reused
        assert min(computed[branch] for _, _, computed in answers) == 3
