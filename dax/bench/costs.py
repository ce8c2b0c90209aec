"""What a plan costs, counted in work and not in this machine's seconds: the roofline over what kernels reach of it.

A search on a small model on a CPU would otherwise optimise for that CPU, where 8-bit kernels run their slow references.
The cost of a plan is its share of what exact costs, both counted for Wan2.1 14B at 720p on an H100. A predicted step
costs nothing beside a forward.
"""

from functools import cache

from dax.attention import choose
from dax.bench import roofline
from dax.facts import FACTS
from dax.hardware import ATTENTION_DTYPE, LINEAR_REACHES, MACHINES, TRAFFIC_REACHES, attention_reaches
from dax.parallel.cost import Cluster, cluster_of
from dax.plan import Plan
from dax.quant.scheme import NONE, match

COST_OF = "forwards x ms per layer of Wan2.1 14B 720p on one H100, where exact attention is DAX's bf16"
CARD, MODEL, TOKENS = MACHINES["h100"], FACTS["wan2.1-t2v-14b"], 75600
C, F = MODEL.width, MODEL.ffn_dim
FLOPS = {  # multiply-adds per token of each linear layer of a block; text keys and values see 512 tokens only
    "attn1.to_q": C * C, "attn1.to_k": C * C, "attn1.to_v": C * C, "attn1.to_out.0": C * C,
    "attn2.to_q": C * C, "attn2.to_out.0": C * C, "ffn.net.0.proj": C * F, "ffn.net.2": F * C,
}  # fmt: skip


def arithmetic(plan: Plan) -> dict[str, str]:
    """The dtypes that a plan's kernels multiply in, as roofline's functions take them."""
    return {
        "gemm_dtype": roofline.LINEAR.get(plan.linear.scheme, "bf16"),
        "attention_dtype": ATTENTION_DTYPE.get(plan.attention.kernel, "bf16"),
    }


def way(plan: Plan) -> str:
    """How a plan runs what stands between the products of a block: "stock", "compiled" or "fused"."""
    return "compiled" if plan.compile == "blocks" else "fused" if plan.blocks.fused else "stock"


def expected_s(op: roofline.Operation, plan: Plan, machine) -> float:
    """Seconds that all `count` of an operation should take under a resolved plan on a card with a data sheet.

    The bound of its kind, over the share of it that such kernels were seen to reach.
    """
    if op.kind == "elementwise":
        reached = TRAFFIC_REACHES[way(plan)]
    elif op.kind == "gemm":
        reached = LINEAR_REACHES[op.dtype]
    else:
        reached = attention_reaches(plan.attention.kernel if op.name == "self-attention" else "cudnn", machine)
    return op.seconds(machine, fused=way(plan) != "stock")[0] / reached


@cache
def block_ms(scheme: str, attention: str, compile: str, fused: bool) -> float:
    """Milliseconds of one block with one scheme for all its linear layers."""
    plan = Plan(linear={"scheme": scheme}, attention={"kernel": attention}, compile=compile, blocks={"fused": fused})
    operations = roofline.block_operations(MODEL, TOKENS, **arithmetic(plan))
    return 1e3 * sum(expected_s(op, plan, CARD) for op in operations)


def layer_ms(plan: Plan, num_layers: int) -> float:
    """Milliseconds of one layer, on average over the model's, under a resolved plan.

    `sdpa`, which is what auto means on a CPU, counts as what auto means on the card that is counted for. A layer whose
    linears follow several schemes costs each scheme's block, weighted with its share of the arithmetic.
    """
    names = {f"blocks.{index}.{name}": flops for index in range(num_layers) for name, flops in FLOPS.items()}
    rules = {"*": plan.linear.scheme, **plan.linear.rules}
    schemes = match(names, rules, optional=rules)
    kernel = choose(CARD) if plan.attention.kernel == "sdpa" else plan.attention.kernel
    others = kernel, plan.compile, plan.blocks.fused
    total = sum(flops * block_ms(schemes.get(name, NONE), *others) for name, flops in names.items())
    return total / sum(names.values())


def runs_references(plan: Plan, device: str) -> bool:
    """Whether a resolved plan runs references of GPU kernels there: its time then says nothing about a GPU."""
    return device == "cpu" and (plan.linear.active or plan.attention.kernel == "int8")


def cost(plan: Plan, forwards: int, exact: Plan, all_forwards: int, num_layers: int) -> float:
    """The share of exact's work: 1 for exact itself."""
    return forwards * layer_ms(plan, num_layers) / (all_forwards * layer_ms(exact, num_layers))


def cluster(plan: Plan, machine, node: int = 8) -> Cluster | None:
    """Such cards as the planner sees them under a resolved plan, `node` of them per node; None without a data sheet."""
    return cluster_of(machine, plan.attention.kernel, "8bit" if plan.linear.active else "bf16", node)
