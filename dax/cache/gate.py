"""The gate: runs a step plan from outside the transformer, at every forward the pipeline asks for.

It stands on the instance's `forward` and `cache_context`, by which the pipeline says which branch and step it is at. A
computed step is the model, untouched; a predicted one is a sum of at most four velocities. Nothing waits for the
device. What is kept belongs to one run of the loop: it begins at step 0 and is let go when the loop ends, however it
ends.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from dax.cache.residual import BlockStack
from dax.cache.run import Report, Run, around_loop
from dax.cache.step_plan import BRANCHES, COMPUTE, DROP, Action, Setting, StepPlan
from dax.edits import Edits
from dax.errors import DaxError

SIGMA_TOLERANCE = 1e-4


@dataclass
class Expert:
    """A transformer behind the gate: its own forward and context, and its stack of blocks where residuals are kept."""

    forward: Callable
    context: Callable
    stack: BlockStack | None = None


class Gate:
    """The step cache of a loop, before its transformer or its experts. `last` is the Report of the last finished run of
    the loop, or None.

    make_plan   (Setting, noise levels, timesteps, the scheduler's training steps) -> StepPlan, asked when a run begins;
                without a pipeline the last three are None
    checkpoint, kernels   of the transformer, see Setting
    """

    def __init__(self, transformers, pipe, make_plan: Callable, checkpoint: str | None = None, kernels: str = "exact"):
        self.experts = [Expert(transformer.forward, transformer.cache_context) for transformer in transformers]
        self.pipe, self.make_plan, self.checkpoint, self.kernels = pipe, make_plan, checkpoint, kernels
        self.said: tuple[str, dict] | None = None  # the branch, and what else the pipeline announced
        self.run: Run | None = None
        self.last: Report | None = None
        self.looping = False  # inside the pipeline's own loop, which says when it ends

    @contextmanager
    def cache_context(self, expert: Expert, name: str, **announced):
        """The vendor's, overheard."""
        with expert.context(name, **announced):
            self.said = name, announced
            try:
                yield
            except BaseException:
                self.release()
                raise
            finally:
                self.said = None

    def forward(self, expert: Expert, *args, **kwargs):
        """The transformer's forward, or its prediction. Outside a cache_context the branch is unknown: computed."""
        if self.said is None:
            return expert.forward(*args, **kwargs)
        branch, announced = self.said
        try:
            run = self.enter(branch, announced, args, kwargs)
            if run.expert is not expert:  # what another one said predicts nothing of this one
                run.expert = expert
                run.history.clear()
            output = self.act(run, expert, branch, run.plan.actions(branch)[run.step], args, kwargs)
            run.outputs[branch] = output[0]
            if run.done() and not self.looping:  # guidance may be switched on in the last step
                self.finish()
            return output
        except BaseException:
            self.release()
            raise

    def enter(self, branch: str, announced: dict, args: tuple, kwargs: dict) -> Run:
        """The run this forward belongs to, at its step. DaxError("bad_request") if it cannot be told."""
        step, run = self.step_of(announced, args, kwargs), self.run
        if step == 0 and (run is None or run.step > 0 or branch in run.outputs):
            return self.begin(announced)
        if run is None or step not in (run.step, run.step + 1) or (step == run.step and branch in run.outputs):
            where = "no run has begun" if run is None else f"the run is at step {run.step}"
            raise DaxError(
                "bad_request",
                f"step cache: {branch} of step {step} was asked for while {where}: one loop at a time, from step 0 on",
            )
        if step >= run.plan.steps:
            raise DaxError("bad_request", f"step cache: step {step} of a plan of {run.plan.steps} steps")
        self.check_sigma(run.plan, step, announced)
        if step > run.step:
            run.close_step()
            run.step = step
        return run

    def begin(self, announced: dict) -> Run:
        """A new run; whatever an earlier one left is let go."""
        self.release()
        self.last = None
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
        config = getattr(scheduler, "config", {})
        setting = Setting(
            steps=announced.get("num_inference_steps") or (None if timesteps is None else len(timesteps)),
            scheduler=None if scheduler is None else type(scheduler).__name__,
            flow_shift=config.get("flow_shift", config.get("shift")),
            guidance_scale=getattr(self.pipe, "guidance_scale", None),
            checkpoint=self.checkpoint,
            kernels=self.kernels,
        )
        levels = None if sigmas is None else sigmas.tolist()[: setting.steps]
        plan = self.make_plan(setting, levels, timesteps, config.get("num_train_timesteps"))
        plan.check(setting)
        self.check_sigma(plan, 0, announced)
        self.run = Run(plan)
        return self.run

    def check_sigma(self, plan: StepPlan, step: int, announced: dict) -> None:
        """DaxError("bad_request") if the announced noise level is not the one the plan was made for."""
        sigma = announced.get("sigma")
        if plan.sigmas is not None and sigma is not None and abs(sigma - plan.sigmas[step]) > SIGMA_TOLERANCE:
            raise DaxError(
                "bad_request",
                f"step cache: step {step} is at noise level {sigma:.5f}, but the plan ({plan.made_by}) was made for "
                f"{plan.sigmas[step]:.5f}: use the scheduler and shift it was made for, or cache.policy = none",
            )

    def step_of(self, announced: dict, args: tuple, kwargs: dict) -> int:
        """The step, as announced; else the position of the timestep among the scheduler's."""
        if announced.get("step_index") is not None:
            return announced["step_index"]
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        if timestep is None or timesteps is None:
            raise DaxError(
                "bad_request",
                "step cache: which step this is is unknown; pass step_index to cache_context, or optimize the pipeline",
            )
        return position(timestep, timesteps)

    def act(self, run: Run, expert: Expert, branch: str, action: Action, args: tuple, kwargs: dict):
        """The output of this forward, computed or predicted, in the form the transformer gives it."""
        residual, stack = run.plan.reuse == "residual", expert.stack
        known = branch in stack.residuals if residual else len(run.history.get(branch, ())) >= len(action)
        counts, velocity, output = run.predicted, None, None
        if action == DROP:
            velocity = run.outputs["cond"]
        elif action == COMPUTE or not known:  # guidance may be switched on in the middle of a run
            counts = run.computed
            with stack.noting(branch) if residual else nullcontext():
                output = expert.forward(*args, **kwargs)
            run.form, run.dtype = type(output), output[0].dtype
            if not residual and run.plan.depth:
                run.fresh.add(branch)
        elif residual:
            with stack.replaying(branch):
                output = expert.forward(*args, **kwargs)
        else:
            velocity = combine(run.history[branch], action).to(run.dtype)
        for name in (branch,) if branch in BRANCHES else BRANCHES:
            counts[name] += 1
        if output is not None:
            return output
        return (velocity,) if run.form is tuple else run.form(velocity)

    def finish(self) -> None:
        """The run reached its last step: report and let go."""
        run = self.run
        found = []
        if not any(run.predicted.values()):
            found.append(f"step cache: it never fired ({run.plan.made_by}): every forward was computed")
        self.last = Report(run.plan, dict(run.computed), dict(run.predicted), tuple(found))
        self.release()
        for text in found:
            warnings.warn(text, stacklevel=2)

    def release(self) -> None:
        """Let go of the run and all it holds."""
        self.run = None
        for expert in self.experts:
            if expert.stack is not None:
                expert.stack.residuals.clear()

    @contextmanager
    def loop(self):
        """The pipeline's loop runs inside: when it ends the run is over, finished or not."""
        self.looping = True
        try:
            yield
            if self.run is not None and self.run.step == self.run.plan.steps - 1:
                self.finish()
        finally:
            self.looping = False
            self.release()


def apply_cache(
    transformers, pipe, make_plan: Callable, edits: Edits, *, residual: bool, checkpoint: str | None, kernels: str
) -> Gate:
    """Put one gate before all transformers of a loop; undone with `edits`. See Gate for the arguments.

    residual   also replace the list of blocks, which plans of the residual form need
    """
    gate = Gate(transformers, pipe, make_plan, checkpoint, kernels)
    for transformer, expert in zip(transformers, gate.experts):
        if residual:
            expert.stack = BlockStack(transformer.blocks)
            edits.swap_module(transformer, "blocks", expert.stack)
        edits.set_attribute(transformer, "forward", partial(gate.forward, expert))
        edits.set_attribute(transformer, "cache_context", partial(gate.cache_context, expert))
    if pipe is not None:
        around_loop(pipe, gate.loop, edits)
    return gate


def combine(velocities: list[torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    """sum_i weights[i] * velocities[i] in fp32: one pass over each, no host value is waited for."""
    total = velocities[0].to(torch.float32, copy=True).mul_(weights[0])
    for velocity, weight in zip(velocities[1:], weights[1:]):
        total.add_(velocity, alpha=weight)
    return total


def position(timestep: torch.Tensor, timesteps: torch.Tensor) -> int:
    """Where in `timesteps` the timestep of a forward stands. DaxError("bad_request") if nowhere.

    A pipeline hands over a view of an element, whose address tells without waiting for the device; else values are
    compared, at the cost of one wait. Where each token has a timestep, those of a given first frame are 0: the last
    one counts.
    """
    last = timestep.reshape(-1)[-1:]
    if last.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
        step = (last.storage_offset() - timesteps.storage_offset()) // max(1, timesteps.stride(0))
        if 0 <= step < len(timesteps):
            return step
    value = last.item()
    found = (timesteps.cpu() == value).nonzero().flatten().tolist()
    if not found:
        raise DaxError("bad_request", f"timestep {value} is none of the scheduler's {len(timesteps)}: denoise by those")
    return found[0]
