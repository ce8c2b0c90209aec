"""Wan2.2 A14B: two transformers share the loop, and every part of a plan serves both."""

import gc
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch

import dax
from dax import offload as module
from dax.cache.step_plan import COMPUTE, DROP, REUSE, StepPlan
from dax.errors import DaxError
from dax.facts import FACTS
from dax.generate.stages import Forwards
from dax.models import wan, wan_guard
from tests.conftest import build_expert_pipe, build_random_pipe
from tests.models.test_image_to_video import latents as one_scale
from tests.models.test_image_to_video import picture
from tests.quant.test_apply import relative, velocity

LAYERS = 2
KINDS = pytest.mark.parametrize("image", [False, True], ids=["text", "image"])


def latents(pipe, steps=4, **options):
    """45 tokens: odd. At 4 steps and this scheduler's shift the experts take two each."""
    options = {"guidance_scale": 8.0, "guidance_scale_2": 6.0, "height": 80, "width": 48, "num_frames": 9} | options
    image = {"image": picture(0)} if type(pipe).__name__ == "WanImageToVideoPipeline" else {}
    return pipe(
        prompt="a cat",
        negative_prompt="b",
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **image,
        **options,
    ).frames


def experts(pipe) -> list:
    return [pipe.transformer, pipe.transformer_2]


@KINDS
def test_every_block_of_both_matters(image):
    """Else nothing below could fail."""
    pipe = build_expert_pipe(image)
    stock = latents(pipe)
    assert relative(latents(pipe, guidance_scale_2=4.0), stock) > 0.01
    for transformer in experts(pipe):
        blocks = transformer.blocks
        for i in range(LAYERS):
            transformer.blocks = torch.nn.ModuleList(b for j, b in enumerate(blocks) if j != i)
            assert relative(latents(pipe), stock) > 0.2
        transformer.blocks = blocks


@KINDS
@pytest.mark.parametrize(
    "size",
    [{}, {"guidance_scale": 1.0, "guidance_scale_2": 1.0}, {"num_frames": 1}, {"height": 16, "width": 112}],
    ids=["guided", "not guided", "one frame", "wide"],
)
def test_exact_is_the_stock_clip_and_undo_gives_the_model_back(image, size):
    pipe = build_expert_pipe(image)
    stock = latents(pipe, **size)
    for keys in ({}, {"blocks": {"fused": False}}, {"offload": "experts"}):
        with dax.optimize(pipe, "exact", **keys) as engine, Forwards(*experts(pipe)) as forwards:
            assert relative(latents(pipe, **size), stock) < 1e-5
            assert f"{2 * LAYERS} of {2 * LAYERS} cross-attention layers" in engine.summary()
            assert engine.facts.family == ("wan2.2-i2v" if image else "wan2.2-t2v") and engine.fallbacks == ()
        uncond = 0 if size.get("guidance_scale") == 1.0 else 2
        assert forwards.each == 2 * [{"cond": 2, "uncond": uncond}]
        assert torch.equal(latents(pipe, **size), stock)


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, (4, 0)), (1.0, (0, 4))])
@pytest.mark.parametrize("offload", ["none", "experts"])
def test_a_boundary_at_the_edge_leaves_all_to_one(ratio, steps, offload):
    pipe = build_expert_pipe(boundary_ratio=ratio)
    stock = latents(pipe)
    cache = {"policy": "mask", "mask": "1101"}
    with dax.optimize(pipe, "exact", offload=offload), Forwards(*experts(pipe)) as forwards:
        assert relative(latents(pipe), stock) < 1e-5
    assert [counts["cond"] for counts in forwards.each] == list(steps)
    with dax.optimize(pipe, "exact", offload=offload, cache=cache) as engine:
        latents(pipe)
    assert engine.gate.last.plan.mask() == "1101"


def test_8_bits_err_no_more_than_with_one_transformer():
    plain = build_random_pipe()
    stock = one_scale(plain, steps=4)
    with dax.optimize(plain, attention={"kernel": "sdpa"}, linear={"scheme": "int8"}):
        errors = [relative(one_scale(plain, steps=4), stock)]
    for image in (False, True):
        pipe = build_expert_pipe(image)
        stock = latents(pipe, guidance_scale=4.0, guidance_scale_2=4.0)
        clips = []
        for offload in ("none", "experts"):
            with dax.optimize(pipe, attention={"kernel": "sdpa"}, linear={"scheme": "int8"}, offload=offload):
                clips.append(latents(pipe, guidance_scale=4.0, guidance_scale_2=4.0))
                assert all(type(x.blocks[1].ffn.net[2]).__name__ == "QuantLinear" for x in experts(pipe))
        assert torch.equal(*clips)
        errors.append(relative(clips[0], stock))
        assert torch.equal(latents(pipe, guidance_scale=4.0, guidance_scale_2=4.0), stock)
    plain, *two = errors
    assert 1e-4 < plain and max(two) < 1.5 * plain, errors


def by_hand(pipe, mask, boundary):
    """The clip of a loop that reuses the last velocity where the mask has a 0, forgetting all at the boundary."""
    text, negative = pipe.encode_prompt("a cat", "b", True, max_sequence_length=512)
    pipe.scheduler.set_timesteps(4)
    x, known = torch.randn(1, 16, 3, 10, 6, generator=torch.Generator().manual_seed(3)), None
    for step, t in enumerate(pipe.scheduler.timesteps):
        model, scale = (pipe.transformer, 8.0) if step < boundary else (pipe.transformer_2, 6.0)
        if mask[step] == "1":
            known = [model(x, t.expand(1), embeds, return_dict=False)[0] for embeds in (text, negative)]
        cond, uncond = known
        x = pipe.scheduler.step(uncond + scale * (cond - uncond), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("offload", "train_steps"), [("none", 1000), ("experts", 1000), ("experts", 500)])
def test_a_step_cache_begins_anew_at_the_boundary(offload, train_steps):
    pipe = build_expert_pipe()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=train_steps)
    with torch.no_grad():
        wanted, without = by_hand(pipe, "1010", 2), by_hand(pipe, "1000", 2)
    assert relative(without, wanted) > 0.1, "a cache that does not begin anew would not be seen"
    cache = {"policy": "mask", "mask": "1000"}
    with dax.optimize(pipe, cache=cache, offload=offload) as engine, Forwards(*experts(pipe)) as forwards:
        for _ in range(2):
            assert relative(latents(pipe), wanted) < 1e-5
            assert engine.gate.last.plan.mask() == "1010"
            assert "anew for the second expert at step 2" in engine.gate.last.plan.made_by
            assert engine.gate.last.computed == {"cond": 2, "uncond": 2} == engine.gate.last.predicted
    assert forwards.each == 2 * [{"cond": 2, "uncond": 2}]


def test_the_gate_itself_predicts_nothing_from_the_other_expert(monkeypatch):
    """Even where the table does not know of the boundary."""
    pipe = build_expert_pipe()
    with torch.no_grad():
        wanted = by_hand(pipe, "1010", 2)
    monkeypatch.setattr(StepPlan, "restarted", lambda plan, step: plan)
    with dax.optimize(pipe, cache={"policy": "mask", "mask": "1000"}) as engine:
        assert relative(latents(pipe), wanted) < 1e-5
        assert engine.gate.last.computed == {"cond": 2, "uncond": 2}


@pytest.mark.parametrize("reuse", ["velocity", "residual"])
@KINDS
def test_a_step_cache_serves_both(image, reuse):
    pipe = build_expert_pipe(image)
    stock = latents(pipe)
    cache = {"policy": "mask", "mask": "1011", "reuse": reuse}
    with dax.optimize(pipe, cache=cache) as engine, Forwards(*experts(pipe)) as forwards:
        assert 1e-3 < relative(latents(pipe), stock) < 1
        assert engine.gate.last.computed == {"cond": 3, "uncond": 3}
    assert torch.equal(latents(pipe), stock)
    if reuse == "velocity":
        assert [counts["cond"] for counts in forwards.each] == [1, 2]


def test_a_table_restarted():
    line = (1.5, -0.5)
    row = (COMPUTE, COMPUTE, line, line, line, REUSE, line, COMPUTE)
    plan = StepPlan(row, (COMPUTE, REUSE, REUSE, REUSE, REUSE, REUSE, DROP, DROP), "made")
    found = plan.restarted(3)
    assert found.cond == (COMPUTE, COMPUTE, line, COMPUTE, COMPUTE, REUSE, line, COMPUTE)
    assert found.uncond == (COMPUTE, REUSE, REUSE, COMPUTE, REUSE, REUSE, DROP, DROP)
    assert plan.restarted(0) is plan is plan.restarted(8)


def test_blocks_take_turns_on_the_device():
    """After each call the right weights are where the next call runs, and the idle expert's are in the host's copy."""
    pipe = build_expert_pipe()
    own = [[p.clone() for p in x.blocks.parameters()] for x in experts(pipe)]
    device = {p.data_ptr() for p in pipe.transformer.blocks.parameters()}
    seen = []

    def look(*_):
        here = [{p.data_ptr() for p in x.blocks.parameters()} == device for x in experts(pipe)]
        right = all(
            torch.equal(a, b) for x, mine in zip(experts(pipe), own) for a, b in zip(x.blocks.parameters(), mine)
        )
        seen.append((here.index(True) if sum(here) == 1 else None, right))

    with dax.optimize(pipe, "exact", offload="experts", blocks={"fused": False}) as engine:
        assert f"{LAYERS} of {LAYERS} pairs of blocks that take turns" in engine.summary()
        for transformer in experts(pipe):
            transformer.register_forward_hook(look)
        for _ in range(2):
            seen.clear()
            latents(pipe)
            # moved ahead: with the last call before the boundary, and with the clip's last
            assert seen == [(0, True)] * 3 + [(1, True)] * 4 + [(0, True)]
        seen.clear()
        latents(pipe, guidance_scale=1.0, guidance_scale_2=1.0)
        assert seen == [(0, True)] + [(1, True)] * 2 + [(0, True)]


def test_a_block_makes_room_while_the_next_ones_run():
    """In the last forward of an expert, not in those before."""
    pipe = build_expert_pipe()
    device = next(pipe.transformer.blocks[0].parameters()).data_ptr()
    seen = []
    with dax.optimize(pipe, "exact", offload="experts"):
        place = next(pipe.transformer_2.blocks[0].parameters())
        for transformer in experts(pipe):
            transformer.blocks[1].register_forward_pre_hook(lambda *_: seen.append(place.data_ptr() == device))
        latents(pipe)
    assert seen == [False] * 3 + [True] * 4 + [False]


class FakeStream:
    """Notes what is asked of a stream; events are numbered."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(("side waits for", other.name))

    def wait_event(self, event):
        self.notes.append(("blocks wait for", event.number))

    def synchronize(self):
        self.notes.append(("host waits", self.name))


class FakeEvent:
    count = 0

    def record(self):
        FakeEvent.count += 1
        self.number = FakeEvent.count


def test_copies_wait_for_the_blocks_before_them_and_blocks_for_their_copies(monkeypatch):
    """The streams of a GPU, imitated: what is queued where, in which order."""
    notes, right, build = [], module.host_copies, module.Turns.__init__
    side, blocks = FakeStream("side", notes), FakeStream("blocks", notes)

    def with_stream(turns, *args):
        build(turns, *args)
        turns.stream = side

    monkeypatch.setattr(module.Turns, "__init__", with_stream)
    monkeypatch.setattr(module, "host_copies", lambda tensors, pinned: right(tensors, not pinned))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: blocks)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(notes.append(("copies on", stream.name))))
    pipe = build_expert_pipe()
    stock = latents(pipe)
    with dax.optimize(pipe, "exact", offload="experts"):
        for transformer in experts(pipe):
            transformer.blocks[1].register_forward_pre_hook(lambda *_: notes.append(("runs", "block 1")))
        assert relative(latents(pipe), stock) < 1e-5
    swap, run = [("side waits for", "blocks"), ("copies on", "side")], ("runs", "block 1")
    first = FakeEvent.count - 3  # of two swaps, two blocks each
    assert notes == [
        *[run] * 3, *swap, run, *swap,
        ("blocks wait for", first), ("blocks wait for", first + 1), *[run] * 3, *swap, run, *swap,
        ("host waits", "side"),
    ]  # fmt: skip


def test_an_expert_that_was_not_announced_is_brought_first():
    """Called by hand, in any order."""
    pipe = build_expert_pipe()
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(1, 16, 3, 6, 10, generator=generator), torch.tensor([500.0])
    text = torch.randn(1, 512, 32, generator=generator)
    with torch.no_grad():
        stock = [x(*given, text, return_dict=False)[0] for x in experts(pipe)]
        with dax.optimize(pipe, "exact", offload="experts"):
            for i in (1, 1, 0, 1, 0, 0):
                assert relative(experts(pipe)[i](*given, text, return_dict=False)[0], stock[i]) < 1e-5


def test_fused_products_stay_fused_wherever_the_weights_are():
    pipe = build_expert_pipe()
    with dax.optimize(pipe, "exact", offload="experts") as engine:
        every = f"fused now: self-attention in {2 * LAYERS} of {2 * LAYERS} blocks"
        assert every in engine.summary()
        latents(pipe, steps=1)
        assert every in engine.summary()


def test_the_texts_keys_are_computed_once_an_expert_wherever_its_weights_are(monkeypatch):
    pipe, calls = build_expert_pipe(), []
    wan_guard.check_processor()
    right = wan.text_operands
    monkeypatch.setattr(wan, "text_operands", lambda attn, text: calls.append(attn) or right(attn, text))
    remembered = []
    with dax.optimize(pipe, blocks={"fused": False}, offload="experts"):
        memory = pipe.transformer.blocks[0].attn2.processor.text
        count = lambda pipe, step, timestep, tensors: remembered.append(len(memory.known)) or tensors
        latents(pipe, callback_on_step_end=count)
    assert len(calls) == 2 * 2 * LAYERS
    assert remembered == [2] * 4, "both prompts, of one expert"


def test_an_aborted_loop_leaves_nothing_behind():
    pipe = build_expert_pipe()
    stock = latents(pipe)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with dax.optimize(pipe, "exact", offload="experts"):
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, callback_on_step_end=stop)
        assert relative(latents(pipe), stock) < 1e-5


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("build", "keys", "says"),
    [
        (build_random_pipe, {"offload": "experts"}, "offload = experts: wan-t2v-2x64 has one transformer"),
        (lambda: build_expert_pipe().transformer_2, {"offload": "experts"}, "has one transformer"),
        (
            build_expert_pipe,
            {"offload": "experts", "compile": "blocks"},
            "offload = experts and compile = blocks cannot be combined",
        ),
        (
            build_expert_pipe,
            {"linear": {"scheme": "int8", "activation": "static", "granularity": "tensor", "scales": "x.json"}},
            "linear.activation = static: scales are of one transformer and wan2.2-t2v-2x64 has two",
        ),
        (
            build_expert_pipe,
            {"cache": {"policy": "teacache"}},
            "nothing is published or calibrated for wan2.2-t2v-2x64: set cache.policy = mask",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, keys, says):
    model = build()
    with pytest.raises(DaxError, match=says) as caught:
        dax.optimize(model, "exact", **keys)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_experts_that_differ_cannot_take_turns():
    pipe = build_expert_pipe()
    stock = latents(pipe)
    pipe.transformer_2.blocks[1].attn1.fuse_projections()
    with pytest.raises(DaxError, match="blocks.1 of the two experts differ"):
        dax.optimize(pipe, "exact", offload="experts")
    assert relative(latents(pipe), stock) < 1e-5


def test_a_host_too_small_for_both_is_named(monkeypatch):
    pipe = build_expert_pipe()
    stock = latents(pipe)

    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch, pytest.raises(DaxError, match="no 0.0 GiB of pinned memory") as caught:
        patch.setattr("dax.offload.torch.empty", full)
        dax.optimize(pipe, "exact", offload="experts")
    assert caught.value.exit_code == 5
    assert torch.equal(latents(pipe), stock)


def test_nothing_is_published_for_the_real_ones():
    from dax.cache import magcache, teacache

    for name in ("wan2.2-t2v-a14b", "wan2.2-i2v-a14b"):
        assert name in FACTS and name not in magcache.PUBLISHED and name not in teacache.PUBLISHED


@pytest.mark.parametrize("linear", ["none", "int8"])
@pytest.mark.parametrize("resident", [0, 1])
def test_experts_that_take_turns_come_back_cast_and_refuse_to_go_on(linear, resident):
    pipe = build_expert_pipe()
    alone = [deepcopy(each).to(torch.bfloat16) for each in experts(pipe)]
    with dax.optimize(pipe, linear={"scheme": linear}, offload="experts"):
        velocity(experts(pipe)[resident])
        for each in experts(pipe):
            each.to(torch.bfloat16)
        with pytest.raises(DaxError, match="cast from torch.float32 to torch.bfloat16 .*: call engine.undo"):
            latents(pipe)
    for each, cast in zip(experts(pipe), alone):
        for mine, theirs in zip(each.parameters(), cast.parameters(), strict=True):
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("linear", ["none", "int8"])
def test_on_a_gpu_the_idle_expert_is_in_host_memory(linear):
    """Loaded to the host, brought over, in turns; the same clip, and half the memory of both."""
    clips, peaks = [], []
    for offload in ("none", "experts"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        pipe = build_expert_pipe()
        for part in (pipe.transformer, pipe.transformer_2):
            part.to(torch.bfloat16)
        pipe.transformer.to("cuda"), pipe.text_encoder.to("cuda"), pipe.vae.to("cuda")
        with dax.optimize(pipe, linear={"scheme": linear}, offload=offload):
            torch.cuda.synchronize()
            peaks.append(torch.cuda.memory_allocated() - before)
            for _ in range(2):
                clips.append(latents(pipe).cpu())
            devices = {p.device.type for p in pipe.transformer_2.blocks.parameters()}
            assert devices == ({"cuda"} if offload == "none" else {"cpu"})
        assert {p.device.type for p in pipe.transformer_2.parameters()} == {"cpu"}, "undo puts it where it was"
    assert all(torch.equal(clip, clips[0]) for clip in clips)
    assert peaks[1] < peaks[0]
