"""resolve(): a plan of definite choices, from what is wanted, what the model is and what the machine can do. Pure.

No torch, no weights: every `auto` is decided here, and what cannot be had is refused or falls back by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dax import attention
from dax.cache.artifact import Artifact
from dax.cache.policy import resolve_cache
from dax.errors import DaxError
from dax.facts import Facts
from dax.hardware import Machine, no_kernels
from dax.parallel.cost import TILE
from dax.parallel.planner import ALONE, Ranks, resolve_parallel
from dax.plan import Linear, Plan
from dax.quant.scales import Scales
from dax.quant.scheme import Rule
from dax.quant.scheme import reason as scheme_reason
from dax.quant.stored import held_to

EIGHT_BIT = ("int8",)  # kernels whose operands can travel in 8 bits


@dataclass(frozen=True)
class Resolved:
    """A plan of definite choices. `notes` say what each `auto` became, `fallbacks` what could not be had.

    `scales` is the content of the plan's linear.scales, whose place the digest takes in the plan. `as_stored`: linear
    layers came in 8 bits and no others were asked for, so there is nothing to quantise.
    """

    plan: Plan
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    scales: Scales | None = None
    calibration: Artifact | None = None  # of the step cache
    as_stored: bool = False


def resolve(
    plan: Plan,
    facts: Facts,
    machine: Machine,
    strict: bool = False,
    dtype: str = "bfloat16",
    checkpoint: str | None = None,
    ranks: Ranks = ALONE,
    stored: Mapping[str, Rule] = {},
) -> Resolved:
    """The plan with every `auto` decided for that model on that machine. Pure: no torch, no weights.

    dtype and checkpoint (its digest, see dax.cache.checkpoint) are the transformer's; ranks says how many share the
    work, and what is known of it; `stored` are linear layers that have 8 bits already. What does not run there falls
    back to something exact and is named; with `strict` it is DaxError("unsupported") instead. 8 bits that do not run
    there are an error always.
    """
    check_experts(plan, facts)
    check_reuse(plan, facts)
    linear, notes, fallbacks = held_to(plan.linear, facts, stored)
    linear, scales = resolve_linear(linear, machine)
    kernel, said, fell = resolve_attention(plan.attention.kernel, machine, dtype, facts.head_dim)
    notes, fallbacks = notes + said, fallbacks + fell
    fused, compiled, said, fell = resolve_blocks(plan, machine)
    notes, fallbacks = notes + said, fallbacks + fell
    parallel, said = resolve_parallel(
        plan.parallel,
        facts,
        machine,
        replace(ranks, align=TILE) if kernel in EIGHT_BIT else ranks,
        travels=kernel in EIGHT_BIT,
        kernel=kernel,
        linear="8bit" if linear.active else "bf16",
        joint=plan.cache.policy == "none" or (plan.cache.uncond_every == 1 and plan.cache.drop_uncond == 0),
        eager=compiled == "none",
    )
    notes += said
    resolved = plan.model_copy(
        update={
            "attention": plan.attention.model_copy(update={"kernel": kernel}),
            "linear": linear,
            "blocks": plan.blocks.model_copy(update={"fused": fused}),
            "parallel": parallel,
            "compile": compiled,
        }
    )
    kernels = kernels_of(resolved)
    cached, calibration, said, fell = resolve_cache(plan.cache, facts.name, checkpoint, kernels, facts.plain)
    notes, fallbacks = notes + said, fallbacks + fell
    if strict and fallbacks:
        raise DaxError("unsupported", f"--strict: {'; '.join(fallbacks)}")
    resolved, as_stored = resolved.model_copy(update={"cache": cached}), bool(stored) and not plan.linear.active
    return Resolved(resolved, tuple(notes), tuple(fallbacks), scales, calibration, as_stored)


def resolve_attention(kernel: str, machine: Machine, dtype: str, head_dim: int) -> tuple[str, list[str], list[str]]:
    """(the kernel that runs there, notes, fallbacks)."""
    best = attention.choose(machine, dtype, head_dim)
    if kernel == "auto":
        said = f"attention.kernel: auto is {best} on {machine.name} in {dtype}"
        failed = attention.passed_over(best, machine, dtype, head_dim)
        return best, [f"{said}; bf16 {failed}" if failed else said], []
    if problem := attention.reason(kernel, machine, dtype, head_dim):
        return best, [], [f"attention.kernel = {kernel}: {problem}; {best} instead"]
    remark = attention.lesser(kernel, machine)
    return kernel, [], [f"attention.kernel = {kernel}: {remark}"] if remark else []


def resolve_blocks(plan: Plan, machine: Machine) -> tuple[bool, str, list[str], list[str]]:
    """(blocks.fused, compile, notes, fallbacks): how a block is run there, and where it waits."""
    fused, compiled, notes, fallbacks = plan.blocks.fused, plan.compile, [], []
    if fused and (problem := no_kernels(machine)):
        fused = False
        fallbacks.append(f"blocks.fused = true: {problem}; false instead")
    if compiled == "blocks" and machine.packages is not None and machine.compiler is None:
        compiled = "none"
        fallbacks.append("compile = blocks: no C++ compiler found (install g++ or set CXX); none instead")
    if plan.offload == "experts" and machine.device == "cpu":
        notes.append("offload = experts: the device is the host here, so it saves nothing")
    return fused, compiled, notes, fallbacks


def check_reuse(plan: Plan, facts: Facts) -> None:
    """DaxError("bad_request") for residuals of a model that adds something between its blocks."""
    if facts.control_layers and plan.cache.policy != "none" and plan.cache.reuse == "residual":
        raise DaxError(
            "bad_request",
            f"cache.reuse = residual: {facts.name} adds hints between its blocks, which reusing what all blocks add "
            "would count twice; set cache.reuse = velocity",
        )


def check_experts(plan: Plan, facts: Facts) -> None:
    """DaxError("bad_request") for what takes two experts, or what two cannot have.

    Compiled blocks cannot take turns: weights are changed between their calls. Static scales are one transformer's.
    """
    if facts.num_experts == 2 and plan.linear.active and plan.linear.activation == "static":
        raise DaxError(
            "bad_request",
            f"linear.activation = static: scales are of one transformer and {facts.name} has two; set dynamic",
        )
    if plan.offload == "none":
        return
    if facts.num_experts == 1:
        raise DaxError("bad_request", f"offload = {plan.offload}: {facts.name} has one transformer; set offload = none")
    if plan.compile == "blocks":
        raise DaxError("bad_request", f"offload = {plan.offload} and compile = blocks cannot be combined; keep one")


def resolve_linear(linear: Linear, machine: Machine) -> tuple[Linear, Scales | None]:
    """The part with the digest of its scales for their path, and the scales. DaxError for what cannot be."""
    for scheme in linear.schemes:
        if problem := scheme_reason(scheme, machine):
            raise DaxError("unsupported", f"linear.scheme = {scheme}: {problem}")
    if not linear.active or linear.activation != "static":
        return linear, None
    if linear.scales == "none":
        raise DaxError("bad_request", "linear.activation = static needs linear.scales = FILE: see dax.quant.calibrate")
    scales = Scales.load(linear.scales)
    return linear.model_copy(update={"scales": f"sha256:{scales.digest}"}), scales


def kernels_of(plan: Plan) -> str:
    """The arithmetic of a resolved plan that is not exact, as a step plan is calibrated on it: "exact" for none."""
    kernel = plan.attention.kernel
    lossy = [] if kernel == "auto" or attention.KERNELS[kernel].exact else [f"{kernel} attention"]
    return ", ".join([*lossy, *(f"{scheme} linears" for scheme in plan.linear.schemes)]) or "exact"


def without_fused_blocks(resolved: Resolved, problem: str | None, strict: bool) -> Resolved:
    """The vendor's own blocks, by name, where DAX's would compute something else; the same plan where there is none."""
    if problem is None:
        return resolved
    if strict:
        raise DaxError("unsupported", f"--strict: blocks.fused = true: {problem}")
    plan = resolved.plan.model_copy(update={"blocks": resolved.plan.blocks.model_copy(update={"fused": False})})
    return replace(
        resolved, plan=plan, fallbacks=(*resolved.fallbacks, f"blocks.fused = true: {problem}; false instead")
    )
