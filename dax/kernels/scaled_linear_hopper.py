"""scaled_linear for Hopper (sm_90a) in Gluon: persistent, warp-specialised, fed and drained by the copy engine.

One block per SM; tiles of 192 x 256, K in steps of 128. Three consumer warpgroups of 64 x 256 share what a warp loads.
Power is what limits, so bytes and pauses are saved. Tiles are as large as the registers can hold, and go in groups of
12 row blocks: a wave then covers a square of the output. A tile's results leave by quarters through two small buffers,
its column scales wait in shared memory, a residual comes through the ring of stages as two more of them, and the next
tile's first step is multiplied for the left half while the right half is still being finished.
"""

from functools import cache

import torch

from dax.kernels.language import (
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    reinterpret,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from dax.kernels.quantize import LARGEST
from dax.kernels.start import start

WARPGROUPS = gl.constexpr(3)
BM = gl.constexpr(64)  # rows of one warpgroup
ROWS = gl.constexpr(192)  # of a tile
BN = gl.constexpr(256)
HALF = gl.constexpr(128)  # columns of one product: Triton's table of int8 instructions ends below 256
PART = gl.constexpr(64)  # of a tile's columns, which leave at once
BK = gl.constexpr(128)
STAGES = gl.constexpr(3)
GROUP = gl.constexpr(12)
REGISTERS = gl.constexpr(160)


@gluon.jit
def tile_of(tile, rows, columns):
    """(row block, column block) of a tile: down a group of GROUP row blocks, then to the right."""
    group = tile // (GROUP * columns)
    first = group * GROUP
    height = gl.minimum(rows - first, GROUP)
    inside = tile - group * GROUP * columns
    return first + inside % height, inside // height


@gluon.jit
def gelu_tanh(y):
    u = y * (0.7978845608 + 0.0356774081 * y * y)
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [u], dtype=gl.float32, is_pure=True, pack=1)
    half = 0.5 * y
    return half * tanh + half


@gluon.jit
def consumer(buffers, operands, WG: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, LARGEST: gl.constexpr):
    """One warpgroup: its 64 rows of every tile of this block."""
    xs, ws, outs, scales, full, empty = buffers
    OutTiles, XScale, WScale, Bias, OutScale, M, N, K, blocks = operands
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    zeros = gl.zeros([BM, HALF], gl.int32 if xs.dtype == gl.int8 else gl.float32, layout)
    row = WG * BM + gl.arange(0, BM, gl.SliceLayout(1, part))
    column = gl.arange(0, BN, gl.BlockedLayout([2], [32], [4], [0]))
    rows, columns, steps = gl.cdiv(M, ROWS), gl.cdiv(N, BN), gl.cdiv(K, BK)
    wait_for(full, 0)
    left = multiply(zeros, xs, ws, 0, 0, WG, False)
    right = multiply(zeros, xs, ws, 0, HALF, WG, False)
    done = 0
    for tile in range(gl.program_id(0), rows * columns, blocks):
        i, j = tile_of(tile, rows, columns)
        row0, column0 = i * ROWS, j * BN
        x_scale = gl.load(XScale + row0 + row, mask=row0 + row < M, other=0.0)
        w_scale = gl.load(WScale + column0 + column, mask=column0 + column < N, other=0.0)
        bias = gl.load(Bias + column0 + column, mask=column0 + column < N, other=0.0)
        for step in range(done + 1, done + steps):
            wait_for(full, step)
            left = multiply(left, xs, ws, step, 0, WG, True)
            right = multiply(right, xs, ws, step, HALF, WG, True)
            left, right = warpgroup_mma_wait(2, deps=(left, right))  # the step before is done: its stage is free
            left, right = warpgroup_mma_init(left), warpgroup_mma_init(right)
            release(empty, step - 1)
        scales.index(WG * 2).store(w_scale)
        scales.index(WG * 2 + 1).store(bias)
        left_done, right_done = warpgroup_mma_wait(0, deps=(left, right))
        done += steps
        release(empty, done - 1)
        where = (row0 + WG * BM, column0, x_scale)
        finish(left_done, 0, done, where, buffers, operands, part, WG, GELU, RESIDUAL, LARGEST)
        of_right = done + 1
        done += 2 if RESIDUAL else 0
        wait_for(full, done)
        left = multiply(zeros, xs, ws, done, 0, WG, False)
        finish(right_done, HALF, of_right, where, buffers, operands, part, WG, GELU, RESIDUAL, LARGEST)
        right = multiply(zeros, xs, ws, done, HALF, WG, False)
    warpgroup_mma_wait(0, deps=(left, right))
    tma.store_wait(0)


@gluon.jit
def multiply(acc, xs, ws, step, first: gl.constexpr, WG: gl.constexpr, use_acc: gl.constexpr):
    """Issue one K step for half of the tile's columns, from column `first`."""
    stage = step % STAGES
    w = ws.index(stage).slice(first, HALF, 0).permute((1, 0))
    return warpgroup_mma(xs.index(stage * WARPGROUPS + WG), w, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def wait_for(full, step):
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)


@gluon.jit
def release(empty, step):
    mbarrier.arrive(empty.index(step % STAGES), count=1)


@gluon.jit
def finish(
    product,
    first: gl.constexpr,
    step,
    where,
    buffers,
    operands,
    part: gl.constexpr,
    WG: gl.constexpr,
    GELU: gl.constexpr,
    RESIDUAL: gl.constexpr,
    LARGEST: gl.constexpr,
):
    """The epilogue of half a tile, from the product to memory; `step` is the one that brings its residual."""
    xs, ws, outs, scales, full, empty = buffers
    a, b = gl.split(product.reshape([BM, 2, PART]).permute([0, 2, 1]))
    a_out, b_out = outs.index(WG * 2), outs.index(WG * 2 + 1)
    a_residual, b_residual = a_out, b_out  # unless there is one
    if RESIDUAL:
        wait_for(full, step)
        a_residual, b_residual = residual_tiles(xs, ws, outs, step, WG)
    finish_part(a, first, a_out, a_residual, where, scales, operands, part, WG, GELU, RESIDUAL, LARGEST)
    finish_part(b, first + PART, b_out, b_residual, where, scales, operands, part, WG, GELU, RESIDUAL, LARGEST)
    if RESIDUAL:
        release(empty, step)


@gluon.jit
def residual_tiles(xs, ws, outs, step, wg):
    """Where a warpgroup's residual for half a tile lies in a stage, [64, 64] twice: one over x's rows, one over w's."""
    stage = step % STAGES
    over_x = reinterpret(xs, outs.dtype, [STAGES * WARPGROUPS, BM, PART], outs.layout)
    over_w = reinterpret(ws, outs.dtype, [STAGES * (BN // BM), BM, PART], outs.layout)
    return over_x.index(stage * WARPGROUPS + wg), over_w.index(stage * (BN // BM) + wg)


@gluon.jit
def finish_part(
    product,
    first: gl.constexpr,
    out,
    residual,
    where,
    scales,
    operands,
    part: gl.constexpr,
    WG: gl.constexpr,
    GELU: gl.constexpr,
    RESIDUAL: gl.constexpr,
    LARGEST: gl.constexpr,
):
    """The same for a quarter, columns from `first`; its buffer was last used by the quarter before the last one."""
    OutTiles, XScale, WScale, Bias, OutScale, M, N, K, blocks = operands
    row0, column0, x_scale = where
    w_scale = scales.index(WG * 2).slice(first, PART, 0).load(gl.SliceLayout(0, part))
    bias = scales.index(WG * 2 + 1).slice(first, PART, 0).load(gl.SliceLayout(0, part))
    y = gl.convert_layout(product, part, assert_trivial=True).to(gl.float32)
    y = y * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    if GELU:
        y = gelu_tanh(y)
    if RESIDUAL:
        y += residual.load(part).to(gl.float32)
    if LARGEST > 0:
        y = gl.minimum(gl.maximum(y * (1.0 / gl.load(OutScale)), -LARGEST), LARGEST)
        if out.dtype == gl.int8:
            y = (y + 12582912.0) - 12582912.0  # rounds, see quantize.store_codes
    tma.store_wait(1)
    out.store(y.to(out.dtype))
    fence_async_shared()
    store_tile(OutTiles, [row0, column0 + first], out)


@gluon.jit
def producer(XTiles, WTiles, ResidualTiles, buffers, M, N, K, blocks, RESIDUAL: gl.constexpr):
    """One warp that keeps the stages full, tile after tile; behind the last, a step whose product nobody reads."""
    xs, ws, outs, scales, full, empty = buffers
    rows, columns, steps = gl.cdiv(M, ROWS), gl.cdiv(N, BN), gl.cdiv(K, BK)
    done = 0
    for tile in range(gl.program_id(0), rows * columns, blocks):
        i, j = tile_of(tile, rows, columns)
        row0, column0 = i * ROWS, j * BN
        for k in range(steps):
            load_step(XTiles, WTiles, xs, ws, full, empty, done, row0, column0, k * BK)
            done += 1
        if RESIDUAL:
            for first in range(0, BN, HALF):
                load_residual(ResidualTiles, xs, ws, outs, full, empty, done, row0, column0 + first)
                done += 1
    load_step(XTiles, WTiles, xs, ws, full, empty, done, 0, 0, 0)


@gluon.jit
def expect(full, empty, step, size: gl.constexpr):
    """Wait until a step's stage is free, and announce so many bytes; returns the barrier they arrive at."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), size)
    return full.index(stage)


@gluon.jit
def load_step(XTiles, WTiles, xs, ws, full, empty, step, row0, column0, k):
    arrived = expect(full, empty, step, (ROWS + BN) * BK)
    stage = step % STAGES
    for wg in gl.static_range(WARPGROUPS):
        load_tile(XTiles, [row0 + wg * BM, k], arrived, xs.index(stage * WARPGROUPS + wg))
    load_tile(WTiles, [column0, k], arrived, ws.index(stage))


@gluon.jit
def load_residual(ResidualTiles, xs, ws, outs, full, empty, step, row0, column0):
    arrived = expect(full, empty, step, ROWS * HALF * 2)
    for wg in gl.static_range(WARPGROUPS):
        over_x, over_w = residual_tiles(xs, ws, outs, step, wg)
        load_tile(ResidualTiles, [row0 + wg * BM, column0], arrived, over_x)
        load_tile(ResidualTiles, [row0 + wg * BM, column0 + PART], arrived, over_w)


@gluon.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["XScale"])
def linear_kernel(
    XTiles,
    WTiles,
    OutTiles,
    ResidualTiles,
    XScale,
    WScale,
    Bias,
    OutScale,
    M,
    N,
    K,
    blocks,
    GELU: gl.constexpr,
    RESIDUAL: gl.constexpr,
    LARGEST: gl.constexpr,
):
    xs = gl.allocate_shared_memory(XTiles.dtype, [STAGES * WARPGROUPS, BM, BK], XTiles.layout)
    ws = gl.allocate_shared_memory(WTiles.dtype, [STAGES, BN, BK], WTiles.layout)
    outs = gl.allocate_shared_memory(OutTiles.dtype, [WARPGROUPS * 2, BM, PART], OutTiles.layout)
    scales = gl.allocate_shared_memory(gl.float32, [WARPGROUPS * 2, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    buffers = (xs, ws, outs, scales, full, empty)
    operands = (OutTiles, XScale, WScale, Bias, OutScale, M, N, K, blocks)
    gl.warp_specialize(
        [
            (consumer, (buffers, operands, 0, GELU, RESIDUAL, LARGEST)),
            (consumer, (buffers, operands, 1, GELU, RESIDUAL, LARGEST)),
            (consumer, (buffers, operands, 2, GELU, RESIDUAL, LARGEST)),
            (producer, (XTiles, WTiles, ResidualTiles, buffers, M, N, K, blocks, RESIDUAL)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


def product(x, x_scale, weight, weight_scale, bias, residual, out_scale, out, gelu) -> None:
    """Write `out` [M, N]: bf16, fp16 or, with `out_scale`, 8 bits. See scaled_linear.product."""
    (M, K), N = x.shape, len(weight)
    blocks = num_sms(x.device.index)
    out_tiles = tiles(out, BM.value, PART.value)
    start(
        linear_kernel,
        (blocks,),
        tiles(x, BM.value, BK.value),
        tiles(weight, BN.value, BK.value),
        out_tiles,
        out_tiles if residual is None else tiles(residual.to(out.dtype), BM.value, PART.value),
        x_scale,
        weight_scale,
        bias,
        weight_scale if out_scale is None else out_scale,
        M,
        N,
        K,
        blocks,
        GELU=gelu,
        RESIDUAL=residual is not None,
        LARGEST=LARGEST.get(out.dtype, 0.0),
        num_warps=4,
    )


def tiles(matrix: torch.Tensor, rows: int, columns: int):
    """The copy engine's description of a row-major matrix in tiles; what lies outside reads as zero."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gluon_dtype(matrix.dtype))
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


def gluon_dtype(dtype: torch.dtype):
    return {
        torch.int8: gl.int8,
        torch.float8_e4m3fn: gl.float8e4nv,
        torch.float8_e5m2: gl.float8e5,
        torch.bfloat16: gl.bfloat16,
        torch.float16: gl.float16,
    }[dtype]


@cache
def num_sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
