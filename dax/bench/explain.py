"""`dax explain`: what a plan does to a model and what the model costs, on paper. No torch, no weights, no GPU.

Counts come from Facts alone. Times are said twice: from the roofline of a card's data sheet, a lower bound, and as
expected, the bound over the share of it that kernels of that kind were seen to reach (`dax.bench.costs`).
"""

import subprocess
from dataclasses import asdict, replace
from pathlib import Path

from dax.bench import costs, roofline
from dax.bench.gains import gains
from dax.bench.model import facts_of, read_json
from dax.bench.size import checked_size
from dax.cache.policy import resolve_cache
from dax.cache.step_plan import flow_sigmas
from dax.errors import DaxError, nearest
from dax.facts import Facts
from dax.generate.steps import schedule
from dax.parallel.cost import window_bytes
from dax.parallel.planner import Ranks, predictions
from dax.parallel.topology import Topology, topologies
from dax.plan import DEFAULT_PRESET, Plan, parse_set, plan_layer
from dax.quant.stored import held_to, stored_layers

FORWARDS_PER_STEP = 2  # guidance runs the model with the prompt and without


def explain(
    model: str | None,
    plan: str | None,
    sets: list[str],
    size: tuple[int | None, int | None, int | None],
    steps: int | None,
    hardware: str | None,
    strict: bool = False,
    gpus: int = 1,
    per_node: int = 8,
) -> dict:
    """Everything `dax explain` prints, as one JSON-ready object. DaxError for a bad model, plan, size or card."""
    facts = facts_of(model or "tiny")
    pixels = checked_size(facts, size)
    if steps is not None and steps < 1:
        raise DaxError("bad_request", f"--steps {steps}: must be at least 1")
    steps = steps or facts.defaults.steps
    asked, provenance = Plan.from_layers(layers_of(plan, sets))
    machine = card(hardware)
    tokens = facts.tokens(**asdict(pixels))
    if gpus < 1 or per_node < 1:
        raise DaxError("bad_request", f"--gpus {gpus}, --gpus-per-node {per_node}: at least 1")
    if gpus > 1 and machine is None:
        raise DaxError("bad_request", f"--gpus {gpus}: name the card to expect something of, as in --hardware h200")
    ranks = Ranks(gpus, min(per_node, gpus), tokens=tokens)
    checkpoint = None if asked.cache.policy == "none" else checkpoint_here(model, facts)
    stored = stored_layers(config_here(model), facts)
    found = resolved_plan(asked, facts, machine, strict, ranks, checkpoint, stored)
    cached = step_cache(found, facts, steps, checkpoint)
    resolved = found.plan
    experts = expert_figures(facts, resolved, steps, cached) if facts.num_experts > 1 else None
    forwards = sum(cached["computed"].values()) if cached else FORWARDS_PER_STEP * steps
    better = gains(facts, resolved, asdict(pixels), machine, steps, forwards) if machine else []
    return {
        "model": facts.name,
        **asdict(pixels),
        "steps": steps,
        "tokens": tokens,
        "layers": facts.num_layers,
        "control_blocks": len(facts.control_layers),
        "parameters": facts.num_parameters,
        "weights_gib": roofline.weight_bytes(facts, eight_bits=resolved.linear.scheme != "none") / 2**30,
        "activations_gib": roofline.activation_bytes(facts, tokens) / 2**30,
        "device_gib": device_bytes(facts, resolved, tokens) / 2**30,
        "experts": experts,
        "hardware": machine.name if machine else None,
        "memory_gib": machine.memory_gib if machine else None,
        "plan": {
            key: {"value": value, "asked": asked[key], "from": provenance[key]}
            for key, value in resolved.leaves().items()
            if not key.startswith("cache.") or resolved.cache.policy != "none" or key == "cache.policy"
        },
        "plan_hash": resolved.hash(),
        "changes": changes(resolved, facts, machine),
        "notes": list(found.notes),
        "fallbacks": list(found.fallbacks),
        "step_cache": cached,
        **figures(facts, asdict(pixels), resolved, machine, forwards),
        "gains": [row for row in better if not (stored and row["key"].startswith("linear."))],
        "num_ranks": gpus,
        "ranks_per_node": ranks.node,
        "ranks": expected(resolved, facts, machine, ranks, forwards) if gpus > 1 else None,
    }


def figures(facts: Facts, size: dict, plan: Plan, machine, forwards: int) -> dict:
    """Work and time of one forward, its parts, one layer and the clip's `forwards`; no times without a card."""
    dtypes, fused = costs.arithmetic(plan), costs.way(plan) != "stock"
    operations = roofline.forward_operations(facts, **size, **dtypes)
    flops = roofline.total(operations)[0]
    forward_s = expected_s = layer_s = None
    if machine:
        in_blocks = roofline.block_operations(facts, facts.tokens(**size), **dtypes, count=facts.num_layers)
        layer_s = sum(costs.expected_s(op, plan, machine) for op in in_blocks) / facts.num_blocks
        forward_s = roofline.seconds(operations, machine, fused)
        expected_s = sum(costs.expected_s(op, plan, machine) for op in operations)
    return {
        "forward": {"tflop": flops / 1e12, "seconds_at_least": forward_s, "seconds_expected": expected_s},
        "ms_per_layer_expected": 1e3 * layer_s if machine else None,
        "video": {
            "forwards": forwards,
            "pflop": forwards * flops / 1e15,
            "seconds_at_least": forwards * forward_s if machine else None,
            "seconds_expected": forwards * expected_s if machine else None,
        },
        "parts": [part(op, machine, plan, fused) for op in operations if op.flops or moved(op, fused)],
    }


def device_bytes(facts: Facts, plan: Plan, tokens: int) -> int:
    """Weights of all transformers that lie on the device at a time, activations, and what is remembered of the text."""
    weights = roofline.device_weight_bytes(facts, plan.linear.scheme != "none", plan.offload == "experts")
    remembered = 0 if plan.compile == "blocks" else roofline.text_memory_bytes(facts)
    return weights + roofline.activation_bytes(facts, tokens) + remembered


def expert_figures(facts: Facts, plan: Plan, steps: int, cached: dict | None) -> dict:
    """How two experts share the loop at the model's flow shift, and what each adds to the memory of device and host.

    forwards   that each computes, both branches
    """
    shares = facts.expert_steps(flow_sigmas(steps, facts.defaults.flow_shift), 1)
    masks = [cached[branch] for branch in cached["computed"]] if cached else FORWARDS_PER_STEP * ["1" * steps]
    parts = slice(0, shares[0]), slice(shares[0], steps)
    eight_bits, idle_on_host = plan.linear.scheme != "none", plan.offload == "experts"
    blocks = roofline.weight_bytes(facts, eight_bits=eight_bits) - roofline.weight_bytes(facts, 0)
    return {
        "boundary_ratio": facts.boundary_ratio,
        "steps": list(shares),
        "forwards": [sum(mask[part].count("1") for mask in masks) for part in parts],
        "device_weights_gib": roofline.device_weight_bytes(facts, eight_bits, idle_on_host) / 2**30,
        "host_weights_gib": 2 * blocks * idle_on_host / 2**30,
    }


def expected(plan: Plan, facts: Facts, machine, ranks: Ranks, forwards: int) -> list[dict]:
    """What each way to use all ranks should take, the plan's own first, at rates that such cards were seen to reach."""
    cluster = costs.cluster(plan, machine, ranks.node)
    wire_bytes = plan.parallel.wire_bytes
    own = Topology(plan.parallel.cfg, plan.parallel.ulysses, plan.parallel.rows)
    known = {"cluster": cluster, "wire_bytes": wire_bytes, "eager": plan.compile == "none"}
    (chosen,) = predictions(facts, ranks.tokens, [own], chunks=plan.parallel.overlap, **known)
    others = predictions(facts, ranks.tokens, topologies(ranks.count, facts.num_heads), **known)
    (alone,) = predictions(facts, ranks.tokens, [Topology()], cluster)
    return [
        {
            "topology": str(found.topology),
            "chunks": found.chunks,
            "window_gib": found.window * window_bytes(facts, ranks.tokens, found.topology, wire_bytes) / 2**30,
            "layer_ms": found.layer_ms,
            "exchange_ms": found.exchange_ms,
            "exposed_ms": found.exposed_ms,
            "denoise_s": forwards * facts.num_blocks * alone.layer_ms / found.speedup / 1e3,
            "speedup": found.speedup,
            "efficiency_pct": found.efficiency_pct,
        }
        for found in (chosen, *(p for p in others if p.topology != own))
    ]


def layers_of(plan: str | None, sets: list[str]) -> list[tuple[str, dict]]:
    """The plan's layers, lowest first: preset or file, then each --set."""
    return [plan_layer(plan or DEFAULT_PRESET), *(("--set", parse_set(text)) for text in sets)]


def card(hardware: str | None):
    """The data sheet of `--hardware`, or of the GPU that nvidia-smi names here; None without one."""
    from dax.hardware import MACHINES, card_key

    if hardware is None:
        seen = gpu_name()
        return MACHINES.get(card_key(seen)) if seen else None
    if hardware not in MACHINES:
        raise DaxError("bad_request", f"--hardware: unknown card {hardware!r}{nearest(hardware, MACHINES)}")
    return MACHINES[hardware]


def gpu_name() -> str | None:
    """The first GPU's name as nvidia-smi gives it, since asking torch would take seconds; None without a GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.splitlines()), None)


def resolved_plan(asked: Plan, facts: Facts, machine, strict: bool, ranks: Ranks, checkpoint: str | None, stored: dict):
    """The plan Resolved on that card; where no card is named, as asked but for what needs none: the step cache, and
    `stored` linear layers, which have 8 bits already."""
    from dax.resolve import Resolved, check_reuse, kernels_of, resolve

    if machine is not None:
        return resolve(asked, facts, machine, strict, checkpoint=checkpoint, ranks=ranks, stored=stored)
    check_reuse(asked, facts)
    linear, said, instead = held_to(asked.linear, facts, stored)
    asked = asked.model_copy(update={"linear": linear})
    cache, calibration, notes, fallbacks = resolve_cache(
        asked.cache, facts.name, checkpoint, kernels_of(asked), facts.plain
    )
    plan = asked.model_copy(update={"cache": cache})
    if strict and instead:
        raise DaxError("unsupported", f"--strict: {'; '.join(instead)}")
    return Resolved(plan, (*said, *notes), (*instead, *fallbacks), calibration=calibration)


def config_here(model: str | None) -> dict:
    """The transformer's config of a folder; {} for a name or the embedded model."""
    path = Path(model or "tiny") / "transformer" / "config.json"
    return read_json(path) if path.is_file() else {}


def checkpoint_here(model: str | None, facts: Facts) -> str | None:
    """The digest of the embedded model or of a folder; None for a name, which is shapes alone."""
    from dax.generate.steps import checkpoint_of
    from dax.models.tiny import FOLDER

    folder = FOLDER if model in (None, "tiny") else Path(model)
    return checkpoint_of(folder, facts) if folder.is_dir() else None


def step_cache(resolved, facts: Facts, steps: int, checkpoint: str | None) -> dict | None:
    """The table of steps as ones and zeros; None without a cache, or if it takes weights to know it."""
    found = schedule(resolved.plan.cache, resolved.calibration, facts, replace(facts.defaults, steps=steps), checkpoint)
    if found is None:
        return None
    masks = {branch: found.mask(branch) for branch in found.computed}
    return {"made_by": found.made_by, **masks, "computed": found.computed}


def changes(plan: Plan, facts: Facts, machine) -> list[str]:
    """What the plan does to the model, and on how many of its parts."""
    from dax.attention import kernel_for_cross

    kernel, layers = plan.attention.kernel, facts.num_blocks * facts.num_experts
    cross = kernel_for_cross(kernel, machine, head_dim=facts.head_dim) if machine else kernel
    found = [
        f"attention.kernel = {kernel}: {layers} self-attention layers",
        f"attention.kernel = {cross}: {layers} cross-attention layers",
    ]
    found += [f"linear.scheme = {scheme}: {count} linear layers" for scheme, count in quantized(plan, facts).items()]
    if plan.blocks.fused:
        found.append(f"blocks.fused = true: {layers} transformer blocks")
    if plan.offload == "experts":
        found.append(f"offload = experts: {facts.num_layers} pairs of blocks that take turns")
    if plan.compile == "blocks":
        found.append(f"compile = blocks: {layers} transformer blocks")
    return found


def quantized(plan: Plan, facts: Facts) -> dict[str, int]:
    """{scheme: linear layers} of a plan; DaxError("bad_request") for a rule that matches none."""
    from collections import Counter

    from dax.quant.scheme import match, rules_of

    if not plan.linear.active:
        return {}
    rules, optional = rules_of(plan.linear, facts)
    counts = Counter(match(facts.linear_layers(), rules, optional).values())
    return {scheme: facts.num_experts * count for scheme, count in counts.items()}


def part(op: roofline.Operation, machine, plan: Plan, fused: bool) -> dict:
    """One operation of a forward, all its `count` together."""
    seconds, bound = op.seconds(machine, fused) if machine else (None, None)
    return {
        "name": op.name,
        "kind": op.kind,
        "dtype": op.dtype if op.flops else None,
        "count": op.count,
        "gflop": op.count * op.flops / 1e9 if op.flops else None,
        "gb": op.count * moved(op, fused) / 1e9,
        "ms_at_least": 1e3 * seconds if machine else None,
        "bound": bound,
        "ms_expected": 1e3 * costs.expected_s(op, plan, machine) if machine else None,
    }


def moved(op: roofline.Operation, fused: bool) -> float:
    """Bytes of one of it. A neighbour that was fused away moves none."""
    return op.fused_bytes if fused else op.bytes
