"""What a plan costs, counted in work and not in this machine's seconds: forwards, weighted with measured kernels.

A search on a small model on a CPU would otherwise optimise for that CPU, where 8-bit kernels run their slow references.
The weights are milliseconds per layer of Wan2.1 14B at 720p (75 600 tokens): benchmarks/block.h100.json by kind of
kernel, and, measured apart on an H200, which has the same arithmetic, the attention kernels that are not in it and
compiled blocks. A predicted step costs nothing beside a forward. The cost of a plan is its share of what exact costs.
"""

from dax.plan import Plan
from dax.quant.scheme import NONE, match

COST_OF = "forwards x ms per layer of Wan2.1 14B 720p on one H100 or H200"
ATTENTION_MS = {"sdpa": 207.8, "cudnn": 207.8, "flash": 172.8, "sage": 143.6, "int8": 118.3}
LINEAR_MS = {NONE: 59.6, "int8": 33.3, "fp8": 34.4, "fp8_e5m2": 34.4, "int8_weight_only": 59.6}
REST_MS = {"stock": 48.0, "compiled": 12.0, "fused": 7.4, "fused in 8 bits": 5.2}  # elementwise work
C, F = 5120, 13824
FLOPS = {  # multiply-adds per token of each linear layer of a block; text keys and values see 512 tokens only
    "attn1.to_q": C * C, "attn1.to_k": C * C, "attn1.to_v": C * C, "attn1.to_out.0": C * C,
    "attn2.to_q": C * C, "attn2.to_out.0": C * C, "ffn.net.0.proj": C * F, "ffn.net.2": F * C,
}  # fmt: skip


def layer_ms(plan: Plan, num_layers: int) -> float:
    """Milliseconds of one layer, on average over the model's, under a resolved plan."""
    names = {f"blocks.{index}.{name}": flops for index in range(num_layers) for name, flops in FLOPS.items()}
    rules = {"*": plan.linear.scheme, **plan.linear.rules}
    schemes = match(names, rules, optional=rules)
    linear = sum(flops * LINEAR_MS[schemes.get(name, NONE)] for name, flops in names.items()) / sum(names.values())
    fused = "fused in 8 bits" if plan.linear.active else "fused"
    rest = "compiled" if plan.compile == "blocks" else fused if plan.blocks.fused else "stock"
    return ATTENTION_MS[plan.attention.kernel] + linear + REST_MS[rest]


def runs_references(plan: Plan, device: str) -> bool:
    """Whether a resolved plan runs references of GPU kernels there: its time then says nothing about a GPU."""
    return device == "cpu" and (plan.linear.active or plan.attention.kernel == "int8")


def cost(plan: Plan, forwards: int, exact: Plan, all_forwards: int, num_layers: int) -> float:
    """The share of exact's work: 1 for exact itself."""
    return forwards * layer_ms(plan, num_layers) / (all_forwards * layer_ms(exact, num_layers))
