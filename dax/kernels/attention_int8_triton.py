"""8-bit attention in plain Triton: for GPUs without Hopper's warpgroup instructions, and where Gluon is missing.

One program takes ROWS queries of a head through all its keys. The products overlap with nothing but their neighbours on
the same multiprocessor, three of which fit.
"""

import torch

from dax.kernels.language import tl, triton
from dax.kernels.q_quantize import larger
from dax.kernels.start import start

# p = 2^x by the bits of a float, a straight line within each octave (Schraudolph, 1999): an integer product, and no
# exponential. LARGEST is p where x = 0: the line is there above 2^x by the 4 % that it is above it on average.
LARGEST, OCTAVE = 224.0, 2.0**23
SHARPEST = 2.0**-4  # octaves that a step between scores can mean; 8 bits blur scores by hundreds of steps
LOWEST = 100.0  # octaves below the largest that are told apart; p is 0 long before, and a float's bits end later
DEEPEST = tl.constexpr(64.0)  # octaves below the largest where a tile is still summed in its own unit
# as kernels, which read only such globals, have them
STEEP, UNIT, DEPTH = tl.constexpr(SHARPEST), tl.constexpr(OCTAVE), tl.constexpr(LOWEST)
TOP = tl.constexpr(torch.tensor(LARGEST).view(torch.int32).item())

# Compute capability: rows of a program, keys of a step, whether tiles are fetched by descriptor, what Triton is told.
CONFIG = {
    80: {"ROWS": 64, "KEYS": 64, "DESCRIBED": False, "num_warps": 4, "num_stages": 2},
    90: {"ROWS": 64, "KEYS": 128, "DESCRIBED": True, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
}


@triton.jit
def attend_tile(
    q, q_scale, K, KScale, V, largest, unit, total, acc, i, num_keys,
    k_row, v_row, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    DESCRIBED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax over KEYS keys: its largest score, unit and sum [ROWS], its output [ROWS, D]."""
    key, channel = tl.arange(0, KEYS), tl.arange(0, D)
    if DESCRIBED:
        k = K.load([k_row + i * KEYS, 0])
    else:
        k = tl.load(K + (i * KEYS + key)[:, None] * D + channel[None, :])
    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    scale = q_scale * tl.load(KScale + i * KEYS // TILE)
    sharp = tl.minimum(scale, STEEP)
    step = (sharp * UNIT + 0.5).to(tl.int32)
    top = tl.max(s, 1)
    low = top - tl.minimum(DEPTH / sharp, UNIT).to(tl.int32)
    bits = tl.maximum(s, low[:, None]) * step[:, None] + (top * -step + TOP)[:, None]
    p = bits.to(tl.float32, bitcast=True)
    if TAIL:
        p = tl.where((i * KEYS + key < num_keys)[None, :], p, 0.0)
    here = top.to(tl.float32) * scale
    largest = tl.maximum(largest, here)
    here = larger(here, largest - DEEPEST)
    fade = tl.exp2(unit - here)
    total = total * fade + tl.sum(p, 1)
    if DESCRIBED:
        v = V.load([v_row + i * KEYS // TILE * D, i * KEYS % TILE])
    else:
        first = tl.multiple_of(i * KEYS // TILE * D * TILE + i * KEYS % TILE, 16)
        v = tl.load(V + first + channel[:, None] * TILE + key[None, :])
    p = p.to(v.dtype).reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
    acc = acc * fade[:, None] + tl.dot(p, tl.trans(v))  # a fresh sum each step: fp8's accumulator keeps 22 bits
    return largest, here, total, acc


@triton.jit(do_not_specialize=["S", "H", "num_keys", "num_tiles"])
def attention_kernel(
    Q, QScale, K, KScale, V, VScale, Out, S, H, num_keys, num_tiles,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1).to(tl.int64)  # batch and head
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    valid = row < S
    q = tl.load(Q + (index * S + row)[:, None] * D + channel[None, :], valid[:, None], 0)
    q_scale = tl.load(QScale + index * S + row, valid, 0.0)
    k_row, v_row = (index * num_tiles * TILE).to(tl.int32), (index * num_tiles * D).to(tl.int32)
    if not DESCRIBED:
        K += index * num_tiles * TILE * D
        V += index * num_tiles * TILE * D
    KScale += index * num_tiles
    largest = tl.full((ROWS,), -1e30, tl.float32)
    unit = largest
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    whole = num_keys // KEYS
    for i in range(whole):
        largest, unit, total, acc = attend_tile(
            q, q_scale, K, KScale, V, largest, unit, total, acc, i, num_keys,
            k_row, v_row, ROWS, KEYS, TILE, D, DESCRIBED, False,
        )  # fmt: skip
    if whole * KEYS < num_keys:
        largest, unit, total, acc = attend_tile(
            q, q_scale, K, KScale, V, largest, unit, total, acc, whole, num_keys,
            k_row, v_row, ROWS, KEYS, TILE, D, DESCRIBED, True,
        )  # fmt: skip
    o = acc * (1.0 / total)[:, None] * tl.load(VScale + index * D + channel)[None, :]
    out = Out + ((index // H * S + row) * H + index % H)[:, None] * D + channel[None, :]
    tl.store(out, o.to(Out.dtype.element_ty), valid[:, None])


def described(x, rows: int):
    """x as rows of its last dimension, fetched `rows` at a time by the copy engine; at most 128 columns at once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    columns = x.shape[-1]
    return TensorDescriptor.from_tensor(x.view(-1, columns), [rows, min(columns, 128)])


def launch(q, q_scale, k, k_scale, v, v_scale, num_keys: int, sm: int) -> torch.Tensor:
    """See attention_int8."""
    B, H, S, D = q.shape
    _, _, num_tiles, TILE, _ = k.shape
    out = torch.empty(B, S, H, D, device=q.device, dtype=torch.bfloat16)
    config = CONFIG[max(known for known in CONFIG if known <= sm)]
    if config["DESCRIBED"]:
        k, v = described(k, config["KEYS"]), described(v, D)
    with torch.cuda.device_of(q):
        start(
            attention_kernel, (triton.cdiv(S, config["ROWS"]), B * H),
            q, q_scale, k, k_scale, v, v_scale, out, S, H, num_keys, num_tiles,
            TILE=TILE, D=D, enable_fp_fusion=True, **config,
        )  # fmt: skip
    return out
