"""What a plan costs, counted in work and not in this machine's seconds: forwards, weighted with measured kernels.

A search on a small model on a CPU would otherwise optimise for that CPU, where 8-bit kernels run their slow references.
The weights are milliseconds per layer of Wan2.1 14B at 720p (75 600 tokens) on one H200; a predicted step costs nothing
beside a forward (38 MB moved, some 20 us). The cost of a plan is its share of what exact costs.
"""

from dax.plan import Plan

COST_OF = "forwards x ms per layer of Wan2.1 14B 720p on one H200"
ATTENTION_MS = {"sdpa": 206.2, "cudnn": 206.2, "flash": 172.8, "sage": 143.6, "int8": 118.3}
LINEAR_MS = {"none": 59.0, "int8": 32.3, "fp8": 34.2, "fp8_e5m2": 34.2, "int8_weight_only": 59.0}
REST_MS = {"stock": 44.0, "compiled": 12.0, "fused": 9.0}  # elementwise work and cross-attention's core


def layer_ms(plan: Plan, quantised: float = 1.0) -> float:
    """Milliseconds of one layer under a resolved plan; `quantised` is the share of the linears' FLOPs in 8 bits."""
    attention = ATTENTION_MS[plan.attention.kernel]
    scheme, fused = "none", False
    if hasattr(plan, "linear"):
        scheme, fused = plan.linear.scheme, plan.blocks.fused
    linear = quantised * LINEAR_MS[scheme] + (1 - quantised) * LINEAR_MS["none"]
    rest = REST_MS["compiled" if plan.compile == "blocks" else "fused" if fused else "stock"]
    return attention + linear + rest


def cost(plan: Plan, forwards: int, exact: Plan, all_forwards: int, quantised: float = 1.0) -> float:
    """The share of exact's work: 1 for exact itself."""
    return forwards * layer_ms(plan, quantised) / (all_forwards * layer_ms(exact))
