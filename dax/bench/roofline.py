"""What a Wan forward costs on paper: operations, FLOPs and bytes from Facts and a size alone, no torch.

Each operation is bound by arithmetic or by traffic; its time on a machine is the larger of the two. A multiply-add is
two FLOPs. `U` is one activation of the video, S tokens of C channels. Elementwise traffic is given twice: as stock
diffusers moves it (every intermediate goes to memory) and with neighbours fused, a GELU with the product before it.
"""

from dataclasses import dataclass
from math import prod

from dax.facts import Facts

EIGHT_BITS = ("int8", "fp8")
LINEAR = {"int8": "int8", "fp8": "fp8", "fp8_e5m2": "fp8"}  # of each scheme


@dataclass(frozen=True)
class Operation:
    """One step of a forward, `count` times over. `flops` and `bytes` are for one of them.

    kind is gemm, attention or elementwise; `dtype` is the arithmetic's; `fused_bytes` the traffic after fusion.
    """

    name: str
    kind: str
    flops: float
    bytes: float
    fused_bytes: float
    dtype: str = "bf16"
    count: int = 1

    def seconds(self, machine, fused: bool = False) -> tuple[float, str]:
        """(time of all `count`, "compute" or "memory") on a machine with `peak_tflops[dtype]` and `bandwidth_tbs`."""
        arithmetic = self.flops / (machine.peak_tflops[self.dtype] * 1e12) if self.kind != "elementwise" else 0.0
        traffic = (self.fused_bytes if fused else self.bytes) / (machine.bandwidth_tbs * 1e12)
        return self.count * max(arithmetic, traffic), "compute" if arithmetic >= traffic else "memory"


def gemm(name: str, rows: int, inner: int, columns: int, dtype: str = "bf16", count: int = 1) -> Operation:
    """[rows, inner] @ [inner, columns] + bias; bf16 in and out, 8-bit operands when dtype has 8 bits."""
    size = 1 if dtype in EIGHT_BITS else 2
    moved = size * (rows * inner + inner * columns) + 2 * rows * columns
    return Operation(name, "gemm", 2 * rows * inner * columns, moved, moved, dtype, count)


def attention(name: str, queries: int, keys: int, width: int, dtype: str = "bf16", count: int = 1) -> Operation:
    """softmax(q k^T) v over all heads: 4 x queries x keys x width FLOPs; q, k, v read once, the output written."""
    size = 1 if dtype in EIGHT_BITS else 2
    moved = size * (queries + 2 * keys) * width + 2 * queries * width
    return Operation(name, "attention", 4 * queries * keys * width, moved, moved, dtype, count)


def elementwise(name: str, eager: float, fused: float, count: int = 1) -> Operation:
    """Traffic only, in bytes."""
    return Operation(name, "elementwise", 0, eager, fused, count=count)


def block_operations(
    facts: Facts, tokens: int, gemm_dtype: str = "bf16", attention_dtype: str = "bf16", count: int = 1
) -> list[Operation]:
    """One transformer block over `tokens` tokens at batch 1, `count` times over, in the order it runs.

    Of VACE the first `count` blocks, and what it takes to make and add their hints.
    The elementwise rows count every read and write of the stock block, in units of U = 2 S C bytes. Fused, a group that
    spans two rows (a gate and the norm after it) is booked on the later one, the last gate on the next norm1.
    """
    S, C, F, T = tokens, facts.width, facts.ffn_dim, facts.text_tokens
    U = 2 * S * C
    out = 0.5 if gemm_dtype in EIGHT_BITS else 1  # of what a fused pass writes for the next product
    gelu = 2 * 2 * S * F  # read and write S x F in bf16
    requantise = gelu * (1 + out) / 2 if gemm_dtype in EIGHT_BITS else 0  # after a product that has computed it
    affine = 10 * U if facts.cross_attn_norm else 0
    # a row of fp32 modulation for every token: 42 U to cast and add the six, 20 U more for where they are used
    token_time = [elementwise("modulation of every token", 62 * U, 0, count)] if facts.token_time else []
    image = []
    if tokens_of_image := facts.image_tokens:
        image = [
            gemm("cross k, v of the image", tokens_of_image, C, C, "bf16", 2 * count),
            attention("image attention", S, tokens_of_image, C, "bf16", count),
            elementwise("add image attention", 3 * U, 3 * U, count),
        ]
    control = []
    if hints := len(facts.cut(count).control_layers):
        control = [
            gemm("control in", S, C, C, gemm_dtype),
            gemm("hints", S, C, C, gemm_dtype, hints),
            elementwise("add control, hints", (3 + 5 * hints) * U, (1 + 5 * hints) * U),
        ]
        count += hints
    return [
        *control,
        *token_time,
        elementwise("norm1, modulate", 18 * U, (3 + out) * U, count),
        gemm("self q, k, v", S, C, C, gemm_dtype, 3 * count),
        elementwise("self q, k RMS norm", 4 * U, 0, count),
        elementwise("rotary embedding", 36 * U, 4 * U, count),
        attention("self-attention", S, S, C, attention_dtype, count),
        gemm("self out", S, C, C, gemm_dtype, count),
        elementwise("gate, residual", 15 * U, 0, count),
        elementwise("norm2", affine, (3 + out) * U, count),
        gemm("cross q", S, C, C, gemm_dtype, count),
        gemm("cross k, v of the text", T, C, C, "bf16", 2 * count),
        elementwise("cross q RMS norm", 2 * U, 2 * U, count),
        attention("cross-attention", S, T, C, "bf16", count),
        *image,
        gemm("cross out", S, C, C, gemm_dtype, count),
        elementwise("residual", 3 * U, 0, count),
        elementwise("norm3, modulate", 18 * U, (3 + out) * U, count),
        gemm("ffn in", S, C, F, gemm_dtype, count),
        elementwise("GELU", gelu, requantise, count),
        gemm("ffn out", S, F, C, gemm_dtype, count),
        elementwise("ffn gate, residual", 19 * U, 0, count),
    ]


def forward_operations(
    facts: Facts,
    height: int,
    width: int,
    num_frames: int,
    gemm_dtype: str = "bf16",
    attention_dtype: str = "bf16",
    num_layers: int | None = None,
) -> list[Operation]:
    """Every operation of one forward of one branch (batch 1): embeddings, the blocks, the head."""
    S, C, T = facts.tokens(height, width, num_frames), facts.width, facts.text_tokens
    cells = prod(facts.patch)
    U = 2 * S * C
    layers = facts.num_layers if num_layers is None else num_layers
    control = [gemm("control patch embedding", S, facts.control_channels * cells, C)] if facts.control_layers else []
    times = 1 + facts.token_time  # distinct ones; stock diffusers embeds every token's
    image = []
    if features := facts.image_dim:
        image = [
            gemm("image embedding, in", facts.image_tokens, features, features),
            gemm("image embedding, out", facts.image_tokens, features, C),
        ]
    return [
        gemm("patch embedding", S, facts.in_channels * cells, C),
        *control,
        gemm("time embedding, in", times, facts.freq_dim, C),
        gemm("time embedding, out", times, C, C),
        gemm("time projection", times, C, 6 * C),
        gemm("text embedding, in", T, facts.text_dim, C),
        gemm("text embedding, out", T, C, C),
        *image,
        *block_operations(facts, S, gemm_dtype, attention_dtype, layers),
        elementwise("head norm, modulate", 18 * U, 2 * U),
        gemm("head", S, C, facts.out_channels * cells),
    ]


def total(operations: list[Operation], kind: str | None = None) -> tuple[float, float, float]:
    """(FLOPs, bytes, fused bytes) of all operations, or of those of one kind."""
    chosen = [op for op in operations if kind in (None, op.kind)]
    return (
        sum(op.count * op.flops for op in chosen),
        sum(op.count * op.bytes for op in chosen),
        sum(op.count * op.fused_bytes for op in chosen),
    )


def seconds(operations: list[Operation], machine, fused: bool = False) -> float:
    """Lower bound of the time of all operations, one after the other, on a machine."""
    return sum(op.seconds(machine, fused)[0] for op in operations)


def weight_bytes(facts: Facts, num_layers: int | None = None, eight_bits: bool = False) -> int:
    """Bytes of the transformer's weights in bf16 with the parts that stay fp32 (time embedder, norm2, modulation).

    eight_bits   the blocks' linear layers in 8 bits with an fp32 scale for each channel
    """
    facts = facts if num_layers is None else facts.cut(num_layers)
    C, blocks = facts.width, facts.num_blocks
    time_embedder = (facts.freq_dim * C + C) + (C * C + C)
    image_norms = 2 * (facts.image_dim + C) if facts.image_dim else 0
    kept = time_embedder + 2 * C + image_norms + blocks * (6 * C + 2 * C * facts.cross_attn_norm)
    square = 10 if facts.image_tokens else 8  # products of C columns and C rows
    saved = blocks * (square * C * C + 2 * C * facts.ffn_dim - 4 * ((square + 1) * C + facts.ffn_dim))
    if facts.control_layers:
        saved += (1 + len(facts.control_layers)) * (C * C - 4 * C)
    return 2 * facts.num_parameters + 2 * kept - saved * eight_bits


def device_weight_bytes(facts: Facts, eight_bits: bool = False, idle_on_host: bool = False) -> int:
    """Bytes of all transformers' weights on the device at a time: of two experts' both.

    idle_on_host   the blocks of both take turns in the memory of one's; what is outside the blocks is there twice
    """
    own = weight_bytes(facts, eight_bits=eight_bits)
    return own + (facts.num_experts - 1) * (weight_bytes(facts, 0) if idle_on_host else own)


def text_memory_bytes(facts: Facts) -> int:
    """Bytes of the keys and values, of text and image and both branches, that cross-attention keeps, in bf16."""
    return 2 * facts.num_blocks * 2 * (facts.text_tokens + facts.image_tokens) * facts.width * 2


def activation_bytes(facts: Facts, tokens: int) -> int:
    """Bytes alive at the peak of a stock block: at a gate or around the GELU, whichever is larger. An estimate."""
    U = 2 * tokens * facts.width
    gate = 8 * U  # residual, branch output, and three fp32 intermediates of 2 U
    gelu = 2 * U + 2 * 2 * tokens * facts.ffn_dim  # residual, normed input, GELU's input and output
    rotary = 2 * tokens * facts.head_dim * 4 + len(facts.control_layers) * U  # and the hints
    if facts.token_time:  # six modulations of every token, in bf16 and fp32; another six while they are cast and added
        return max(31 * U, 18 * U + gate, 18 * U + gelu) + rotary
    return max(gate, gelu) + rotary
