"""The gate beside a plain reading of the table, and what could make one run see another's state."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch

import dax
from dax.cache.gate import apply_cache, combine, position
from dax.cache.step_plan import COMPUTE, DROP, REUSE, StepPlan, actions_of, guidance_rows
from dax.edits import Edits
from dax.errors import DaxError

STEPS = 6
LINE = (COMPUTE, COMPUTE, (1.5, -0.5), COMPUTE, (1.25, -0.25), (1.0,))
APART = StepPlan(LINE, (COMPUTE, COMPUTE, REUSE, REUSE, COMPUTE, DROP), "apart")
JOINT = StepPlan(LINE, LINE, "joint")


def call(pipe, seed=0, steps=STEPS, guidance=4.0, **kwargs):
    """Latents of one run."""
    return pipe(
        "a red circle", height=32, width=32, num_frames=5, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed), output_type="latent", **kwargs,
    ).frames  # fmt: skip


def put(pipe, plan, residual=False, edits=None):
    edits = Edits() if edits is None else edits
    return apply_cache(
        [pipe.transformer], pipe, lambda *_: plan, edits, residual=residual, checkpoint=None, kernels="exact"
    )


def by_hand(pipe, plan, guidance=4.0):
    """The same clip by a loop that reads the table itself."""
    text, negative = pipe.encode_prompt("a red circle", "", True, max_sequence_length=512)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    known = {"cond": [], "uncond": []}
    for step, t in enumerate(scheduler.timesteps):
        v = {}
        for branch, embeds in (("cond", text), ("uncond", negative)):
            action = plan.actions(branch)[step]
            if action == COMPUTE:
                v[branch] = pipe.transformer(latents, t.expand(1), embeds, return_dict=False)[0]
                known[branch].insert(0, v[branch])
            elif action == DROP:
                v[branch] = v["cond"]
            else:
                v[branch] = sum(w * x for w, x in zip(action, known[branch]))
        latents = scheduler.step(v["uncond"] + guidance * (v["cond"] - v["uncond"]), t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("plan", [JOINT, APART], ids=["joint", "apart"])
def test_the_gate_does_what_the_table_says(random_pipe, plan):
    with torch.no_grad():
        expected = by_hand(random_pipe, plan)
    gate = put(random_pipe, plan)
    assert torch.allclose(call(random_pipe), expected, atol=1e-5)
    assert gate.last.computed == plan.computed and gate.last.predicted["cond"] == STEPS - plan.computed["cond"]
    assert gate.run is None


def test_a_table_of_ones_changes_no_bit(random_pipe):
    stock = call(random_pipe)
    edits = Edits()
    gate = put(random_pipe, StepPlan((COMPUTE,) * STEPS, (COMPUTE,) * STEPS, "ones"), edits=edits)
    with pytest.warns(UserWarning, match="step cache: it never fired"):
        assert torch.equal(call(random_pipe), stock)
    assert gate.last.warnings and gate.last.computed == {"cond": STEPS, "uncond": STEPS}
    edits.undo()
    assert not {"forward", "cache_context"} & set(vars(random_pipe.transformer))
    assert "progress_bar" not in vars(random_pipe)


def test_the_residual_form_reuses_what_the_blocks_added(random_pipe):
    transformer, mask = random_pipe.transformer, "110101"
    row = actions_of(mask)
    before = dict(transformer.state_dict())
    added, seen = {}, []

    def blocks_of(branch, step):  # an independent way: the last block's output is set, the others are let run
        def hook(module, args, output):
            if mask[step[0]] == "1":
                added[branch[0]] = output - step[1]
                return output
            seen.append(step[0])
            return step[1] + added[branch[0]]

        return hook

    step, branch = [0, None], ["cond"]
    hooks = [transformer.blocks[0].register_forward_pre_hook(lambda m, args: step.__setitem__(1, args[0]))]
    hooks.append(transformer.blocks[-1].register_forward_hook(blocks_of(branch, step)))
    edits = Edits()
    context = edits.set_attribute(transformer, "cache_context", None)

    def told(name, **announced):
        branch[0], step[0] = name, announced["step_index"]
        return context(name, **announced)

    transformer.cache_context = told
    expected = call(random_pipe)
    for hook in hooks:
        hook.remove()
    edits.undo()
    edits = Edits()
    gate = put(random_pipe, StepPlan(row, row, "residual", reuse="residual"), residual=True, edits=edits)
    assert torch.equal(call(random_pipe), expected) and seen
    assert gate.last.computed == {"cond": 4, "uncond": 4} and not gate.experts[0].stack.residuals
    assert set(transformer.state_dict()) == set(before)
    edits.undo()
    assert type(transformer.blocks) is torch.nn.ModuleList


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_off_runs_cond_alone(random_pipe, guidance):
    gate = put(random_pipe, JOINT)
    call(random_pipe, guidance=guidance)
    assert gate.last.computed == {"cond": 3, "uncond": 3 if guidance > 1 else 0}


def test_guidance_switched_off_in_the_middle_still_reports(random_pipe):
    gate = put(random_pipe, JOINT)

    def off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0 if step >= 2 else 4.0
        return tensors

    call(random_pipe, callback_on_step_end=off)
    assert gate.last.computed == {"cond": 3, "uncond": 2} and gate.run is None


def test_guidance_in_one_batch_takes_a_joint_table_only(random_pipe):
    transformer, x = random_pipe.transformer, torch.randn(2, 16, 2, 4, 4)
    text = torch.randn(2, 512, 32)
    for plan in (JOINT, APART):
        edits = Edits()
        gate = put(random_pipe, plan, edits=edits)
        random_pipe.scheduler.set_timesteps(STEPS)
        try:
            for step, t in enumerate(random_pipe.scheduler.timesteps):
                with torch.no_grad(), transformer.cache_context("cond_uncond", step_index=step):
                    out = transformer(x, t.expand(2), text, return_dict=True).sample
            assert plan is JOINT and out.shape == x.shape
            assert gate.last.computed == {"cond": 3, "uncond": 3}
        except DaxError as error:
            assert plan is APART and "branches differ" in str(error)
        edits.undo()


@pytest.mark.fault(58)
def test_row_58_a_second_video_and_other_steps_see_nothing_of_the_first(random_pipe):
    fresh = copy.deepcopy(random_pipe)
    make = lambda setting, *_: JOINT if setting.steps == STEPS else StepPlan(LINE[:4], LINE[:4], "short")
    for pipe in (random_pipe, fresh):
        apply_cache([pipe.transformer], pipe, make, Edits(), residual=False, checkpoint=None, kernels="exact")
    call(random_pipe, seed=1)
    call(random_pipe, seed=2, steps=4)
    assert torch.equal(call(random_pipe, seed=3), call(fresh, seed=3))


@pytest.mark.fault(58)
@pytest.mark.parametrize("where", ["callback", "forward", "interrupt"])
def test_row_58_an_aborted_run_leaves_nothing(random_pipe, where):
    fresh = copy.deepcopy(random_pipe)
    gate, _ = put(random_pipe, JOINT), put(fresh, JOINT)

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            if where == "interrupt":
                pipe._interrupt = True
            else:
                raise RuntimeError("stop")
        return tensors

    if where == "forward":
        hook = random_pipe.transformer.proj_out.register_forward_hook(lambda *_: 1 / 0 if gate.run.step == 3 else None)
        with pytest.raises(ZeroDivisionError):
            call(random_pipe)
        hook.remove()
    elif where == "callback":
        with pytest.raises(RuntimeError, match="stop"):
            call(random_pipe, callback_on_step_end=stop)
    else:
        call(random_pipe, callback_on_step_end=stop)
    assert gate.run is None and gate.last is None
    assert torch.equal(call(random_pipe, seed=3), call(fresh, seed=3))


@pytest.mark.fault(58)
def test_row_58_two_pipelines_in_turns_see_nothing_of_each_other(random_pipe):
    other = copy.deepcopy(random_pipe)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.5)
    alone = [call(copy_with_gate(pipe)) for pipe in (random_pipe, other)]
    put(random_pipe, JOINT), put(other, JOINT)
    inner = []

    def nested(pipe, step, timestep, tensors):
        if step == 2:
            inner.append(call(other))
        return tensors

    assert torch.equal(call(random_pipe, callback_on_step_end=nested), alone[0])
    assert torch.equal(inner[0], alone[1])


def copy_with_gate(pipe):
    pipe = copy.deepcopy(pipe)
    put(pipe, JOINT)
    return pipe


def test_two_loops_over_one_transformer_at_once_are_refused(random_pipe):
    put(random_pipe, JOINT)

    def nested(pipe, step, timestep, tensors):
        if step == 2:
            call(pipe)
        return tensors

    with pytest.raises(DaxError, match="cond of step 3 was asked for while no run has begun: one loop at a time"):
        call(random_pipe, callback_on_step_end=nested)


def test_what_an_earlier_run_left_could_not_reach_a_prediction(random_pipe):
    """A table's weights never reach back beyond what its own run computed: even NaN in the history changes no bit."""
    fresh = copy_with_gate(random_pipe)
    gate = put(random_pipe, JOINT)
    begin = gate.begin

    def poisoned(announced):
        run = begin(announced)
        run.history = {b: [torch.full((1, 16, 2, 4, 4), torch.nan) for _ in range(2)] for b in ("cond", "uncond")}
        return run

    gate.begin = poisoned
    assert torch.equal(call(random_pipe), call(fresh))


def test_a_gate_that_counts_calls_would_be_seen(random_pipe):
    """The planted fault of row 58: with a counter for the step, a run after an aborted one is another clip, or none."""
    gate, calls = put(random_pipe, JOINT), []

    def counted(announced, args, kwargs):
        calls.append(0)
        return (len(calls) - 1) // 2 % STEPS

    gate.step_of = counted

    def stop(pipe, step, timestep, tensors):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        call(random_pipe, callback_on_step_end=stop)
    with pytest.raises(DaxError, match="while no run has begun"):
        call(random_pipe)


def test_what_a_run_kept_is_freed_with_it(random_pipe):
    gate = put(random_pipe, JOINT)
    kept = []

    def look(pipe, step, timestep, tensors):
        if step == 3:
            kept.extend(weakref.ref(v) for values in gate.run.history.values() for v in values)
        return tensors

    call(random_pipe, callback_on_step_end=look)
    gc.collect()
    assert len(kept) == 4 and all(ref() is None for ref in kept)


def test_guidance_switched_on_in_the_middle_computes_first(random_pipe):
    gate = put(random_pipe, JOINT)
    transformer, x, text = random_pipe.transformer, torch.randn(1, 16, 2, 4, 4), torch.randn(1, 512, 32)
    random_pipe.scheduler.set_timesteps(STEPS)
    for step, t in enumerate(random_pipe.scheduler.timesteps):
        for branch in ("cond", "uncond") if step >= 2 else ("cond",):
            with torch.no_grad(), transformer.cache_context(branch, step_index=step):
                transformer(x, t.expand(1), text)
        computed = dict(gate.run.computed) if gate.run else gate.last.computed
    assert computed["uncond"] >= 2


def test_guidance_switched_on_in_the_last_step(random_pipe):
    def on(pipe, step, timestep, tensors):
        pipe._guidance_scale = 4.0 if step == STEPS - 2 else 1.0
        return {}

    texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), random_pipe.encode_prompt("a", "b", True)))
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "output_type": "latent"}

    def clip():
        generator = torch.Generator().manual_seed(0)
        return random_pipe(**texts, **size, guidance_scale=1.0, generator=generator, callback_on_step_end=on).frames

    stock = clip()
    ones = (COMPUTE,) * STEPS
    gate = put(random_pipe, StepPlan(ones, ones, "ones"))
    with pytest.warns(UserWarning, match="never fired"):
        assert torch.equal(clip(), stock)
    assert gate.last.computed == {"cond": STEPS, "uncond": 1} and gate.run is None


@pytest.mark.parametrize(
    ("says", "announced"),
    [
        ("step 3 was asked for while no run has begun", {"step_index": 3}),
        ("is at noise level 0.50000, but the plan", {"step_index": 0, "sigma": 0.5}),
        ("has 6 steps, the run has 9", {"step_index": 0, "num_inference_steps": 9}),
    ],
)
def test_what_does_not_fit_the_table_is_refused(random_pipe, says, announced):
    put(random_pipe, StepPlan(LINE, LINE, "test", sigmas=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4)))
    random_pipe.scheduler.set_timesteps(STEPS)
    transformer = random_pipe.transformer
    with pytest.raises(DaxError) as caught, transformer.cache_context("cond", **announced):
        transformer(torch.randn(1, 16, 2, 4, 4), torch.tensor([999]), torch.randn(1, 512, 32))
    assert says in str(caught.value)


def test_an_unknown_timestep_is_named(random_pipe):
    put(random_pipe, JOINT)
    random_pipe.scheduler.set_timesteps(STEPS)
    with pytest.raises(DaxError, match="timestep 17 is none of the scheduler's 6"):
        with random_pipe.transformer.cache_context("cond"):
            random_pipe.transformer(torch.randn(1, 16, 2, 4, 4), torch.tensor([17]), torch.randn(1, 512, 32))


def test_a_forward_outside_any_context_is_the_models_own(random_pipe):
    arguments = torch.randn(1, 16, 2, 4, 4), torch.tensor([999]), torch.randn(1, 512, 32)
    with torch.no_grad():
        stock = random_pipe.transformer(*arguments).sample
        put(random_pipe, JOINT)
        assert torch.equal(random_pipe.transformer(*arguments).sample, stock)


def test_a_timestep_is_found_by_its_place_and_by_its_value():
    timesteps = torch.tensor([999, 800, 600, 600, 100])
    assert [position(t.expand(2), timesteps) for t in timesteps] == [0, 1, 2, 3, 4]
    assert position(torch.tensor([800]), timesteps) == 1 and position(torch.tensor(100.0), timesteps) == 4


def test_a_sum_of_velocities_is_fp32_and_leaves_them_alone():
    velocities = [torch.randn(4, 5) for _ in range(3)]
    before = [v.clone() for v in velocities]
    total = combine(velocities, (2.0, -1.5, 0.5))
    assert torch.allclose(total, 2.0 * before[0] - 1.5 * before[1] + 0.5 * before[2], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(velocities, before))


def test_a_predicted_step_makes_no_graph_break(random_pipe, monkeypatch):
    monkeypatch.setattr("dax.compile.BACKEND", "eager")
    stock = dax.optimize(random_pipe, cache={"policy": "mask", "mask": "110100"})
    eager = call(random_pipe)
    stock.undo()
    with dax.optimize(random_pipe, compile="blocks", cache={"policy": "mask", "mask": "110100"}):
        assert torch.allclose(call(random_pipe), eager, atol=1e-3)  # fullgraph: a break would have raised


CLIPS = """
import torch, dax
def clips(*seeds):
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    dax.optimize(pipe, cache={"policy": "mask", "mask": "110101"})
    for seed in seeds:
        x = pipe("a red circle", height=32, width=32, num_frames=5, num_inference_steps=6, guidance_scale=4.0,
                 generator=torch.Generator().manual_seed(seed), output_type="latent").frames
        yield x.numpy().tobytes().hex()
"""


def test_a_second_video_equals_the_same_one_in_a_process_of_its_own():
    here = {}
    exec(CLIPS, here)
    code = CLIPS + "print(*clips(2))"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    assert list(here["clips"](1, 2))[1] == alone


def test_guidance_plans_are_separate_choices():
    row = actions_of("110110")
    assert guidance_rows(row) == row
    mask = lambda uncond: StepPlan(row, uncond, "x").mask("uncond")
    assert (mask(guidance_rows(row, every=2)), mask(guidance_rows(row, drop_last=2))) == ("100100", "1101--")
    with pytest.raises(DaxError, match="drop_last = 6 of 6 steps"):
        guidance_rows(row, drop_last=6)
