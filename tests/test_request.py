"""Requests: what is filled in, what is refused and what the refusal says. Rows 1 to 15 of docs/faults.md."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate.request import Released, check_memory, make_request, memory_bytes

TINY = FACTS["tiny"]


def refused(code="bad_request", facts=TINY, **fields) -> str:
    with pytest.raises(DaxError) as caught:
        make_request(facts, {"prompt": "a red circle", **fields})
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_models():
    request, warnings = make_request(TINY, {"prompt": "a red circle", "steps": None})
    assert (request.height, request.width, request.num_frames, request.steps, request.fps) == (128, 128, 17, 50, 8)
    assert (request.guidance_scale, request.flow_shift, request.seed, warnings) == (4.0, 3.0, 0, [])


@pytest.mark.fault(1)
@pytest.mark.parametrize("side", ["height", "width"])
def test_row_1_a_size_the_patches_do_not_divide(side):
    assert refused(**{side: 33}) == f"{side} 33 must be a multiple of 16 (nearest 32 or 48; --round picks one)"


@pytest.mark.fault(2)
@pytest.mark.parametrize("size", [0, -32, 10**9])
def test_row_2_a_size_out_of_range(size):
    assert f"height {size} must lie from 1 to" in refused(height=size)


@pytest.mark.fault(3)
@pytest.mark.parametrize("size", ["32", 32.0, True])
def test_row_3_a_size_that_is_no_whole_number(size):
    assert f"height {size!r} must be a whole number" == refused(height=size)


@pytest.mark.fault(4)
def test_row_4_frames_that_are_not_4_n_plus_1():
    assert "num_frames 6 must be a multiple of 4 plus 1 (nearest 5 or 9" in refused(num_frames=6)
    request, warnings = make_request(TINY, {"prompt": "x", "num_frames": 6, "height": 120}, round=True)
    assert (request.num_frames, request.height) == (5, 112)
    assert warnings == ["height 120 rounded to 112", "num_frames 6 rounded to 5"]


@pytest.mark.fault(5)
@pytest.mark.parametrize("frames", [0, -5])
def test_row_5_no_frames(frames):
    assert f"num_frames {frames} must lie from 1" in refused(num_frames=frames)


@pytest.mark.fault(6)
@pytest.mark.parametrize("steps", [0, -3, 2.5, 10**6, "50"])
def test_row_6_steps(steps):
    assert f"steps {steps!r} must" in refused(steps=steps)


@pytest.mark.fault(8)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e30, -1, "4"])
def test_row_8_guidance_that_is_no_sane_number(scale):
    assert f"guidance_scale {scale!r} must be a number from 0 to 100" == refused(guidance_scale=scale)
    assert "flow_shift" in refused(flow_shift=scale)


@pytest.mark.fault(9)
@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_row_9_an_empty_prompt(prompt):
    assert "--allow-empty-prompt" in refused(prompt=prompt)
    assert make_request(TINY, {"prompt": prompt}, allow_empty_prompt=True)[0].prompt == prompt


@pytest.mark.fault(10)
def test_row_10_a_prompt_too_long_to_be_one():
    assert "prompt has 100000 characters: at most 10000" in refused(prompt="x" * 100_000)


@pytest.mark.fault(11)
@pytest.mark.parametrize("prompt", ["a\0b", "a \ud83d b"])
def test_row_11_characters_no_text_has(prompt):
    message = refused(prompt=prompt)
    assert "NUL" in message or "surrogate" in message
    assert "negative_prompt" in refused(negative_prompt=prompt)


@pytest.mark.fault(12)
@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.5, "7", True])
def test_row_12_seeds(seed):
    assert f"seed {seed!r} must" in refused(seed=seed)
    assert make_request(TINY, {"prompt": "x", "seed": 2**63 - 1})[0].seed == 2**63 - 1


@pytest.mark.fault(13)
@pytest.mark.parametrize("fields", [{"prompt": ["a", "b"]}, {"negative_prompt": ["a"]}, {"num_videos": 0}])
def test_row_13_batches_are_not_one_request(fields):
    assert next(iter(fields)) in refused(**fields)


@pytest.mark.fault(14)
@pytest.mark.parametrize("fps", [0, 10**9, float("nan"), 7.5])
def test_row_14_frames_per_second(fps):
    assert f"fps {fps!r} must" in refused(fps=fps)


@pytest.mark.fault(15)
def test_row_15_a_size_that_cannot_fit_is_refused_by_estimate():
    request, _ = make_request(TINY, {"prompt": "x", "height": 8192, "width": 8192, "num_frames": 100_001})
    with pytest.raises(DaxError, match="needs about .* GiB and there are 24.0: fewer frames") as caught:
        check_memory(TINY, request, 10**9, 4, 24.0)
    assert caught.value.exit_code == 4
    ordinary, _ = make_request(TINY, {"prompt": "x"})
    check_memory(TINY, ordinary, 62_000_000, 4, 3.0)
    check_memory(TINY, request, 10**9, 4, None)


def test_the_estimate_of_the_14b_fits_the_card_it_runs_on():
    facts = FACTS["wan2.1-t2v-14b"]
    request, _ = make_request(facts, {"prompt": "x"})
    assert 28 < memory_bytes(facts, request, 2 * facts.num_parameters, 2) / 2**30 < 80


def test_what_is_given_back_leaves_its_room_to_what_comes_next():
    """14B at 720p with a text encoder of 5.7 G parameters: measured were 58.7 GiB where two experts in 8 bits stay."""
    facts, text = FACTS["wan2.1-t2v-14b"], int(5.7e9 * 2)
    request, _ = make_request(facts, {"prompt": "x"})
    experts = 2 * facts.num_parameters
    weights = experts + text + 500_000_000

    def need(released):
        return memory_bytes(facts, request, weights, 2, released) / 2**30

    assert need(Released()) == pytest.approx(37.7 + 20.2, rel=0.02)  # the decoder beside everything
    assert need(Released(text)) == pytest.approx(27.1 + 20.2, rel=0.02)
    assert need(Released(text, experts)) == weights / 2**30  # all of it while the text is read, 37.7
    assert need(Released(text, 0, 4)) == pytest.approx(weights / 2**30)
    assert memory_bytes(facts, request, experts, 2, Released(0, experts)) < experts + 12e9  # a block or the decoder
    with pytest.raises(DaxError, match="needs about 37.7 GiB and there are 37.0"):
        check_memory(facts, request, weights, 2, 37.0, Released(text, experts))
    check_memory(facts, request, weights, 2, 38.0, Released(text, experts))


@settings(max_examples=200, deadline=None)
@given(height=st.integers(-40, 9000), frames=st.integers(-5, 200), rounding=st.booleans())
def test_what_passes_is_what_the_model_can_make(height, frames, rounding):
    try:
        request, warnings = make_request(TINY, {"prompt": "x", "height": height, "num_frames": frames}, rounding)
    except DaxError:
        return
    assert request.height % 16 == 0 and request.height > 0
    assert request.num_frames % 4 == 1
    assert rounding or (request.height, request.num_frames, warnings) == (height, frames, [])
