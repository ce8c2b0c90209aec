"""8-bit attention for Hopper (compute capability 9.0), in Gluon. docs/attention.md tells what each choice was worth.

A block takes 192 queries of a head through all its keys: three warpgroups of 64 rows, and one warp that fetches. A
warpgroup turns s = q k^T (int8, exact in int32) into p = 224 2^(s - max) in fp8, and adds p v to its fp32 output. The
maximum is that of a row in one tile of keys, an integer as its scores are.
- 2^x is made of integers: a product whose result is the bits of p as a float (see attention_int8_triton).
- A token goes around the warpgroups: p v is one's own to begin. It is passed on when half of the channels are done; the
  other half is multiplied while the first is added up, and the next scores come when the tensor cores have room.
- Each p v is a fresh sum, added in fp32 with the rescaling: fp8's accumulator keeps 22 bits, too few for 75 600 keys.
- p times a column of ones gives the row sums, on tensor cores. For the last tile the ones end where the keys end.
- The row maximum takes two scores to an instruction; p needs no shuffle, since v's tokens lie in its order.
"""

import torch

from dax.kernels.attention_int8_triton import DEEPEST, DEPTH, STEEP, TOP, UNIT
from dax.kernels.hopper import barriers
from dax.kernels.language import (
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    triton,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from dax.kernels.q_quantize import larger
from dax.kernels.start import start

WARPGROUPS, ROWS, STAGES = 3, 64, 2  # rows: of a warpgroup; stages: tiles of keys and values in flight
REGISTERS = 160


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def to_fp8(p):
    """Four to a register; written out so that ptxas folds the packing into the conversion."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;"
        " mov.b32 $0, {lo, hi}; }",
        "=r,r,r,r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def attend_rows(
    q_tile, k_tiles, v_tiles, ones, q_full, k_full, v_full, emptied, tokens, QScale, KScale, VScale, Out, Rows,
    first, S, H, head, batch, n,
    TURN: gl.constexpr, TURNS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows [first, first + ROWS) of a head against n tiles of keys."""
    NEXT: gl.constexpr = (TURN + 1) % TURNS
    LEADS: gl.constexpr = 1 if TURN == 0 else 0
    HALF: gl.constexpr = D // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    row = gl.arange(0, ROWS, s_rows)
    index = batch * H + head
    q_scale = gl.load(QScale + index * S + first + row, mask=first + row < S, other=0.0)
    largest = gl.full([ROWS], -1e30, gl.float32, s_rows)
    unit = largest  # of o and total, in log2
    no_s = gl.zeros([ROWS, TILE], gl.int32, s_layout)
    no_o = gl.zeros([ROWS, HALF], gl.float32, o_layout)
    no_sum = gl.zeros([ROWS, 8], gl.float32, sum_layout)
    left, right = no_o, no_o
    total, _ = no_sum.reshape([ROWS, 4, 2]).split()  # one column of eight equal ones is enough
    mbarrier.wait(q_full, 0)
    for i in range(n):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        scale = q_scale * gl.load(KScale + i)
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        top = gl.max(s, 1)
        here = top.to(gl.float32) * scale
        largest = gl.maximum(largest, here)
        here = larger(here, largest - DEEPEST)
        sharp = gl.minimum(scale, STEEP)
        step = (sharp * UNIT + 0.5).to(gl.int32)
        reach = gl.minimum(DEPTH * reciprocal(sharp), UNIT).to(gl.int32)
        p = gl.maximum(s, (top - reach)[:, None]) * step[:, None] + (top * -step + TOP)[:, None]
        p = p.reshape([ROWS, TILE // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, TILE])
        p = gl.convert_layout(p.to(gl.float32, bitcast=True), p_layout, assert_trivial=True)
        p = to_fp8(p)
        fade = gl.exp2(unit - here)
        unit = here
        o_fade = gl.convert_layout(fade, o_rows)[:, None]
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.wait(tokens.index(TURN), (i & 1) ^ LEADS)
        v_left, v_right = v_tiles.index(stage).slice(0, HALF, 0), v_tiles.index(stage).slice(HALF, HALF, 0)
        new_left = warpgroup_mma(p, v_left.permute((1, 0)), no_o, use_acc=False, is_async=True)
        counted = ones.index((i == n - 1).to(gl.int32)).permute((1, 0))
        new_sum = warpgroup_mma(p, counted, no_sum, use_acc=False, is_async=True)
        new_right = warpgroup_mma(p, v_right.permute((1, 0)), no_o, use_acc=False, is_async=True)
        new_left = warpgroup_mma_wait(2, deps=(new_left,))
        mbarrier.arrive(tokens.index(NEXT), count=1)
        left = left * o_fade + new_left
        new_right, new_sum = warpgroup_mma_wait(0, deps=(new_right, new_sum))
        mbarrier.arrive(emptied.index(stage), count=1)
        right = right * o_fade + new_right
        part, _ = new_sum.reshape([ROWS, 4, 2]).split()
        total = total * gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout))[:, None] + part
    row = gl.arange(0, ROWS, o_rows)
    channel = gl.arange(0, HALF, gl.SliceLayout(0, o_layout))
    inverse = (1.0 / gl.convert_layout(gl.max(total, 1), o_rows))[:, None]
    scales = VScale + index * D + channel
    if Rows is None:
        at = (batch * S + first + row) * (H * D)
    else:
        at = gl.load(Rows + batch * S + first + row, mask=first + row < S, other=0) * 8
    out = Out + (at + head * D)[:, None] + channel[None, :]
    within = (first + row < S)[:, None]
    gl.store(out, (left * inverse * gl.load(scales)[None, :]).to(gl.bfloat16), mask=within)
    gl.store(out + HALF, (right * inverse * gl.load(scales + HALF)[None, :]).to(gl.bfloat16), mask=within)


@gluon.jit
def fetch(
    Q, K, V, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, emptied, q_row, k_row, v_row, n,
    TURNS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: queries once, then keys and values tile by tile as stages are emptied."""
    mbarrier.expect(q_full, TURNS * ROWS * D)
    for turn in gl.static_range(TURNS):
        load_tile(Q, [q_row + turn * ROWS, 0], q_full, q_tiles.index(turn))
    for i in range(n):
        stage = i % STAGES
        mbarrier.wait(emptied.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(stage), TILE * D)
        load_tile(K, [k_row + i * TILE, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.expect(v_full.index(stage), TILE * D)
        load_tile(V, [v_row + i * D, 0], v_full.index(stage), v_tiles.index(stage))


@gluon.jit(do_not_specialize=["S", "H", "num_keys", "num_tiles"])
def attention_kernel(
    Q, K, V, QScale, KScale, VScale, Out, Rows, S, H, num_keys, num_tiles,
    TURNS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    index = gl.program_id(1).to(gl.int64)
    batch, head = index // H, index % H
    first = gl.program_id(0) * TURNS * ROWS
    n = num_tiles
    q_tiles = gl.allocate_shared_memory(gl.int8, [TURNS, ROWS, D], Q.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, TILE, D], K.layout)
    v_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, TILE], V.layout)

    ones_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, TILE], gl.float8e4nv)
    ones = gl.allocate_shared_memory(gl.float8e4nv, [2, 8, TILE], ones_shared)
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    place = gl.arange(0, TILE, gl.SliceLayout(0, flat))
    token = (n - 1) * TILE + place // 16 * 16 + ((place & 1) | ((place & 2) << 2) | ((place & 12) >> 1))  # v's order
    # 1.0 in fp8, by its bits: ptxas 12.9 miscompiles the conversion of a constant that fills a register
    one = gl.full([8, TILE], 0x38, gl.int8, flat)
    real = gl.where((token < num_keys)[None, :], one, gl.zeros([8, TILE], gl.int8, flat))
    ones.index(0).store(one.to(gl.float8e4nv, bitcast=True))
    ones.index(1).store(real.to(gl.float8e4nv, bitcast=True))
    fence_async_shared()

    q_full, tokens = barriers(1, 1).index(0), barriers(TURNS, 1)
    k_full, v_full, emptied = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, TURNS)

    q_row = (index * S).to(gl.int32) + first
    k_row = (index * n).to(gl.int32) * TILE
    v_row = (index * n).to(gl.int32) * D
    scales = KScale + index * n
    gl.warp_specialize(
        [
            (attend_rows, (q_tiles.index(0), k_tiles, v_tiles, ones, q_full, k_full, v_full, emptied, tokens, QScale,
                           scales, VScale, Out, Rows, first, S, H, head, batch, n, 0, TURNS, ROWS, TILE, D, STAGES)),
            (attend_rows, (q_tiles.index(1), k_tiles, v_tiles, ones, q_full, k_full, v_full, emptied, tokens, QScale,
                           scales, VScale, Out, Rows, first + ROWS, S, H, head, batch, n, 1, TURNS, ROWS, TILE, D,
                           STAGES)),
            (attend_rows, (q_tiles.index(2), k_tiles, v_tiles, ones, q_full, k_full, v_full, emptied, tokens, QScale,
                           scales, VScale, Out, Rows, first + 2 * ROWS, S, H, head, batch, n, 2, TURNS, ROWS, TILE, D,
                           STAGES)),
            (fetch, (Q, K, V, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, emptied, q_row, k_row, v_row, n,
                     TURNS, ROWS, TILE, D, STAGES)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )  # fmt: skip


def launch(q, q_scale, k, k_scale, v, v_scale, num_keys: int, out=None, rows=None) -> torch.Tensor:
    """See attention_int8. rows [B, S] int64: where each token goes, in units of 16 bytes after out's first."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def tiles(x, rows: int, dtype):
        columns = x.shape[-1]
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
        return TensorDescriptor.from_tensor(x.view(-1, columns), [rows, columns], layout)

    B, H, S, D = q.shape
    T, TILE = k.shape[2:4]
    out = torch.empty(B, S, H, D, device=q.device, dtype=torch.bfloat16) if out is None else out
    with torch.cuda.device_of(q):
        start(
            attention_kernel, (triton.cdiv(S, WARPGROUPS * ROWS), B * H),
            tiles(q, ROWS, gl.int8), tiles(k, TILE, gl.int8), tiles(v, D, gl.float8e4nv), q_scale, k_scale, v_scale,
            out, rows, S, H, num_keys, T,
            TURNS=WARPGROUPS, ROWS=ROWS, TILE=TILE, D=D, STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4,
        )  # fmt: skip
    return out
