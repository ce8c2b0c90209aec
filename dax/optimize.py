"""optimize(): marry a Plan with a model. The whole story on one page.

First `resolve` (resolve.py): plan, facts and machine in, a plan of definite choices out; pure. Every refusal is raised
there or in the checks that follow, before anything changes. Then `apply`, part by part, each counting what it changed.
The Engine that comes back describes the changes and takes them back.

The module itself can be called: `dax.optimize(pipe)` and `from dax.optimize import Engine` mean one name.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from weakref import WeakSet

from dax import attention
from dax.cache.policy import Maker
from dax.edits import Edits
from dax.errors import DaxError
from dax.hardware import Machine, machine
from dax.parallel.join import num_ranks, ranks_here
from dax.plan import DEFAULT_PRESET, Plan, plan_layer
from dax.resolve import Resolved, kernels_of, resolve, without_fused_blocks

OPTIMIZED = WeakSet()  # transformers that carry an engine now


def optimize(
    pipe, plan: "str | Plan" = DEFAULT_PRESET, strict: bool = False, tokens: int | None = None, **overrides
) -> "Engine":
    """Change a diffusers pipeline, or a bare transformer, in place as the plan says; returns the Engine.

    plan        a preset's name, a YAML file's path, or a Plan
    strict      a fallback is an error
    tokens      of the clips to come, where known: several ranks measure at that size, else at the model's own
    overrides   plan keys that win over the plan: compile="blocks", attention={"kernel": "sdpa"}
    DaxError, before anything is changed: "bad_request" for the plan or a model that is already optimized or compiled,
    "bad_model" for a family DAX does not know, "unsupported" for what this machine cannot do.
    """
    layers = [("plan", plan.leaves()) if isinstance(plan, Plan) else plan_layer(plan), ("optimize()", overrides)]
    wanted, _ = Plan.from_layers(layers)
    from dax.models import wan, wan_guard

    target = wan.target_of(pipe)
    if any(transformer in OPTIMIZED for transformer in target.transformers):
        raise DaxError("bad_request", "this model is optimized already: call engine.undo() first")
    wan_guard.check_seams(target)
    transformer = target.transformers[0]
    here = machine(device_of(transformer))
    dtype = str(transformer.dtype).removeprefix("torch.")
    checkpoint = None if wanted.cache.policy == "none" else checkpoint_of(target)
    ranks = replace(ranks_here(guided=target.pipe is not None), tokens=tokens)
    resolved = resolve(wanted, target.facts, here, strict, dtype, checkpoint, ranks, stored_in(target))
    if resolved.plan.blocks.fused:
        difference = wan_guard.block_difference(bool(target.facts.control_layers))
        resolved = without_fused_blocks(resolved, difference, strict)

    edits = Edits()
    with mode_of(transformer):
        try:
            auto = wanted.parallel.overlap == "auto"
            changes, resolved, sequences = apply(resolved, target, here, dtype, edits, auto, tokens)
            gate = gate_of(resolved, target, checkpoint, edits)
        except BaseException as error:
            if edits.sealed:
                error.add_note(f"the model is left half changed: {edits.sealed}")
            else:
                edits.undo()
            raise
    OPTIMIZED.update(target.transformers)
    if gate is not None:
        changes.append(
            Change("cache.policy", resolved.plan.cache.policy, "transformers", *[len(target.transformers)] * 2)
        )
    return Engine(target, resolved, changes, edits, gate, sequences)


def apply(
    resolved: Resolved, target, machine: Machine, dtype: str, edits: Edits, auto: bool, tokens: int | None
) -> "tuple[list[Change], Resolved, list]":
    """Change the model as a resolved plan says, in this order; every change is in `edits`, counted and checked.

    auto, tokens   for ranks, as in parallel.apply; the plan that comes back says what they found, the list holds the
                   Sequence of each transformer whose tokens they share
    """
    from dax.compile import apply_compile
    from dax.models.token_time import apply_token_time

    changes, sequences = change_attention(resolved.plan, target, machine, dtype, edits), []
    apply_token_time(target, resolved.plan.blocks.fused, edits)
    changes += change_linears(resolved, target, edits)
    changes += change_blocks(resolved.plan, target, machine, edits)
    if num_ranks() > 1:
        shared, resolved, sequences = share_out(resolved, target, machine, edits, auto, tokens)
        changes += shared
    if resolved.plan.compile == "blocks":
        blocks = target.blocks()
        count = apply_compile(blocks, edits, overlap=resolved.plan.parallel.overlap != 0)
        changes.append(Change("compile", "blocks", "transformer blocks", count, len(blocks)))
    for change in changes:
        change.check()
    return changes, resolved, sequences


def change_attention(plan: Plan, target, machine: Machine, dtype: str, edits: Edits) -> "list[Change]":
    """The kernels of self- and cross-attention, and the text's keys and values remembered."""
    from dax.models.text_memory import remember_text
    from dax.models.wan import WanProcessor

    kernel, memory, changes = plan.attention.kernel, remember_text(target, edits), []
    kernel_for_cross = attention.kernel_for_cross(kernel, machine, dtype, target.facts.head_dim)
    for kind, name in (("self", kernel), ("cross", kernel_for_cross)):
        layers = target.attentions(cross=kind == "cross")
        processor = WanProcessor(attention.backend_of(name), memory)
        count = attention.apply_attention(layers, processor, edits)
        what = f"{kind}-attention layers"
        changes.append(Change("attention.kernel", processor.backend.name, what, count, len(target.blocks())))
    return changes


def change_linears(resolved: Resolved, target, edits: Edits) -> "list[Change]":
    """Linear layers into 8 bits, where they are not as stored."""
    part = resolved.plan.linear
    if not part.active or resolved.as_stored:
        return []
    from dax.quant import apply_linear

    counts = apply_linear(target, target.facts, part, edits, resolved.scales)
    return [Change("linear.scheme", scheme, "linear layers", count, count) for scheme, count in counts.items()]


def change_blocks(plan: Plan, target, machine: Machine, edits: Edits) -> "list[Change]":
    """Blocks fused; of two experts, where the blocks lie."""
    from dax.cache.gate import position
    from dax.models.wan_block import apply_blocks, compile_kernels
    from dax.offload import apply_turns, bring_together

    changes, total = [], len(target.blocks())
    if moved := bring_together(target, plan.offload, edits):
        changes.append(Change("offload", plan.offload, "tensors of transformer_2 moved beside the first", moved, moved))
    if plan.blocks.fused:
        changes.append(Change("blocks.fused", "true", "transformer blocks", apply_blocks(target, edits), total))
    if machine.device == "cuda":
        compile_kernels(target)
    if plan.offload == "experts":
        count = apply_turns(target, position, edits)
        changes.append(Change("offload", "experts", "pairs of blocks that take turns", count, total // 2))
    return changes


def share_out(
    resolved: Resolved, target, machine: Machine, edits: Edits, auto: bool, tokens: int | None
) -> "tuple[list[Change], Resolved, list]":
    """The work over all ranks, see `apply`."""
    from dax.parallel.apply import apply_parallel

    plan, plain = resolved.plan, attention.backend_of("sdpa")
    eager = plan.compile == "none"
    parts, parallel, said, sequences = apply_parallel(
        target, plan.parallel, machine.device, plain, attention.Turn(), auto, tokens, eager, edits
    )
    plan = plan.model_copy(update={"parallel": parallel})
    return [Change(*part) for part in parts], replace(resolved, plan=plan, notes=(*resolved.notes, *said)), sequences


def checkpoint_of(target) -> str:
    from dax.models.wan_steps import checkpoint_digest

    return checkpoint_digest(*target.transformers)


def gate_of(resolved: Resolved, target, checkpoint: str | None, edits: Edits):
    """The step cache's gate before the transformers, outside everything else; None if the plan has no cache."""
    plan = resolved.plan
    if plan.cache.policy == "none":
        return None
    from dax.cache.gate import apply_cache
    from dax.models.wan_steps import time_embeddings

    transformers = target.transformers
    make = Maker(plan.cache, resolved.calibration, target.facts, partial(time_embeddings, transformers[0]))
    residual = plan.cache.reuse == "residual"
    return apply_cache(
        transformers, target.pipe, make, edits, residual=residual, checkpoint=checkpoint, kernels=kernels_of(plan)
    )


def stored_in(target) -> dict:
    """{layer: Rule} of the linear layers that have 8 bits already, under an adapter too; alike in both experts."""
    from dax.quant import QuantLinear

    first, *others = (
        {
            name.removesuffix(".base_layer"): layer.rule
            for name, layer in transformer.named_modules()
            if isinstance(layer, QuantLinear)
        }
        for transformer in target.transformers
    )
    if any(other != first for other in others):
        raise DaxError("bad_request", "linear: the two experts are not quantised alike: load or quantise both the same")
    return first


def mode_of(transformer):
    """torch.inference_mode as when the weights were made: moved in the other one they could not be used any more."""
    import torch

    return torch.inference_mode(next(transformer.parameters()).is_inference())


def device_of(transformer) -> str:
    """Where the transformer runs, "cuda" or "cpu": under CPU offload that is not where it lies."""
    offload = getattr(transformer, "_hf_hook", None)
    device = getattr(offload, "execution_device", None) or transformer.device
    return "cuda" if "cuda" in str(device) or type(device) is int else "cpu"


@dataclass(frozen=True)
class Change:
    """One part of the plan as it was applied: `count` of `total` things named `what` now have `value`."""

    key: str
    value: str
    what: str
    count: int
    total: int

    def check(self) -> None:
        """Nothing asked is dropped silently: DaxError("bad_model") for none or only some."""
        if self.count == 0 or self.count != self.total:
            raise DaxError(
                "bad_model", f"plan {self.key} = {self.value}: {self.count} of {self.total} {self.what} matched"
            )

    def __str__(self):
        return f"{self.key} = {self.value}: {self.count} of {self.total} {self.what}"


class Engine:
    """What `optimize` did. `plan` is the resolved plan, `fallbacks` and `notes` how it differs from the one asked.

    A context manager: leaving the block undoes; where original weights are gone, all but them.
    """

    def __init__(self, target, resolved: Resolved, changes: list[Change], edits: Edits, gate=None, sequences=()):
        self.plan = resolved.plan
        self.notes = resolved.notes
        self.fallbacks = resolved.fallbacks
        self.changes = tuple(changes)
        self.facts = target.facts
        self.gate = gate  # of the step cache, or None; gate.last is the Report of the last run
        self.sequences = tuple(sequences)  # parallel.Sequence of each transformer whose tokens ranks share
        self._target = target
        self._edits = edits

    @property
    def active(self) -> bool:
        """False once undone."""
        return len(self._edits) > 0

    def summary(self) -> str:
        """Every change with its count, then notes and fallbacks; one line each."""
        lines = [f"plan {self.plan.hash()[:8]} on {self.facts.name}" + ("" if self.active else " (undone)")]
        lines += [f"  {change}" for change in self.changes]
        if self.active and self.plan.blocks.fused:
            from dax.models.wan_block import fused_segments

            total = len(self._target.blocks())
            counts = fused_segments(self._target).items()
            lines.append("  fused now: " + ", ".join(f"{name} in {count} of {total} blocks" for name, count in counts))
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  fallback: {fallback}" for fallback in self.fallbacks]
        return "\n".join(lines)

    def undo(self) -> None:
        """Give the model back as it was, the same objects bit for bit; if it was cast meanwhile, all of it as cast.

        Twice is harmless.

        DaxError("bad_request"), with nothing undone, where original weights are gone or were never here.
        """
        self._undo(anyway=False)

    def _undo(self, anyway: bool) -> None:
        if self.active:
            with mode_of(self._target.transformers[0]):
                self._edits.undo(anyway)
            for transformer in self._target.transformers:
                OPTIMIZED.discard(transformer)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self._undo(anyway=True)


class CallableModule(ModuleType):
    """A module that is the function it is named after."""

    def __call__(self, pipe, plan=DEFAULT_PRESET, strict=False, **overrides):
        return optimize(pipe, plan, strict, **overrides)


sys.modules[__name__].__class__ = CallableModule
