"""scaled_linear for Hopper (sm_90a) in Gluon: persistent, warp-specialised, fed and drained by the copy engine.

One block per SM; tiles of 128 x 256, K in steps of 128. Two consumer warpgroups of 64 x 256 and one warp that loads.
One wgmma group stays in flight, so a stage is free when the next step has been issued. Tiles go in groups of 16 row
blocks: a wave then covers a square of the output, which moves the fewest bytes, and power is what limits. The loader
runs ahead into the next tile during the epilogue. The residual comes through the buffer that the output leaves by.
"""

from functools import cache

import torch

from dax.kernels.language import (
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from dax.kernels.quantize import LARGEST
from dax.kernels.start import start

BM = gl.constexpr(64)  # rows of one warpgroup
BN = gl.constexpr(256)
HALF = gl.constexpr(128)  # of a tile's columns, which the epilogue takes at once
BK = gl.constexpr(128)
STAGES = gl.constexpr(3)
GROUP = gl.constexpr(16)
REGISTERS = gl.constexpr(232)


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
    xs, ws, outs, full, empty, ready = buffers
    OutTiles, ResidualTiles, XScale, WScale, Bias, OutScale, M, N, K, blocks = operands
    ACC: gl.constexpr = gl.int32 if xs.dtype == gl.int8 else gl.float32
    WIDE: gl.constexpr = HALF if xs.dtype == gl.int8 else BN  # Triton's table of int8 instructions ends below 256
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    zeros = gl.zeros([BM, BN], ACC, layout)
    rows_of = gl.arange(0, BM, gl.SliceLayout(1, half))
    rows, columns, steps = gl.cdiv(M, 2 * BM), gl.cdiv(N, BN), gl.cdiv(K, BK)
    warm = gl.minimum(steps, 4)  # steps before the residual is asked for: by then the last tile has left the buffer
    done, turn = 0, 0
    for tile in range(gl.program_id(0), rows * columns, blocks):
        i, j = tile_of(tile, rows, columns)
        row0, column0 = (i * 2 + WG) * BM, j * BN
        acc = warpgroup_mma_init(zeros)
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        x = xs.index(stage).slice(WG * BM, BM, 0)
        acc = warpgroup_mma(x, ws.index(stage).permute((1, 0)), acc, use_acc=False, is_async=True)
        for step in range(done + 1, done + warm):
            acc = accumulate(xs, ws, full, empty, acc, step, WG)
        if RESIDUAL:
            tma.store_wait(0)
            mbarrier.expect(ready.index(WG), BM * BN * 2)
            load_tile(ResidualTiles, [row0, column0], ready.index(WG), outs.index(WG))
        for step in range(done + warm, done + steps):
            acc = accumulate(xs, ws, full, empty, acc, step, WG)
        product = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((done + steps - 1) % STAGES), count=1)
        done += steps
        x_scale = gl.load(XScale + row0 + rows_of, mask=row0 + rows_of < M, other=0.0)
        if RESIDUAL:
            mbarrier.wait(ready.index(WG), turn & 1)
        else:
            tma.store_wait(0)
        left, right = gl.split(product.reshape([BM, 2, HALF]).permute([0, 2, 1]))  # by halves: fewer live registers
        out = outs.index(WG)
        finish(left, 0, out, column0, x_scale, WScale, Bias, OutScale, N, GELU, RESIDUAL, LARGEST, half)
        finish(right, HALF, out, column0, x_scale, WScale, Bias, OutScale, N, GELU, RESIDUAL, LARGEST, half)
        fence_async_shared()
        store_tile(OutTiles, [row0, column0], out)
        turn += 1
    tma.store_wait(0)


@gluon.jit
def finish(
    product,
    first: gl.constexpr,
    out,
    column0,
    x_scale,
    WScale,
    Bias,
    OutScale,
    N,
    GELU: gl.constexpr,
    RESIDUAL: gl.constexpr,
    LARGEST: gl.constexpr,
    half: gl.constexpr,
):
    """The epilogue of half a tile: columns `first` to `first + HALF`, from the product to the output's buffer."""
    n = column0 + first + gl.arange(0, HALF, gl.SliceLayout(0, half))
    w_scale = gl.load(WScale + n, mask=n < N, other=0.0)
    bias = gl.load(Bias + n, mask=n < N, other=0.0)
    y = gl.convert_layout(product, half, assert_trivial=True).to(gl.float32)
    y = y * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    out = out.slice(first, HALF, 1)
    if GELU:
        y = gelu_tanh(y)
    if RESIDUAL:
        y += out.load(half).to(gl.float32)
    if LARGEST > 0:
        y = gl.minimum(gl.maximum(y * (1.0 / gl.load(OutScale)), -LARGEST), LARGEST)
        if out.dtype == gl.int8:
            y = (y + 12582912.0) - 12582912.0  # rounds, see quantize.store_codes
    out.store(y.to(out.dtype))


@gluon.jit
def accumulate(xs, ws, full, empty, acc, step, WG: gl.constexpr):
    """Issue one K step, then free the stage of the one before it."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    x = xs.index(stage).slice(WG * BM, BM, 0)
    acc = warpgroup_mma(x, ws.index(stage).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return acc


@gluon.jit
def producer(XTiles, WTiles, xs, ws, full, empty, M, N, K, blocks):
    """One warp that keeps the stages full, tile after tile."""
    rows, columns, steps = gl.cdiv(M, 2 * BM), gl.cdiv(N, BN), gl.cdiv(K, BK)
    done = 0
    for tile in range(gl.program_id(0), rows * columns, blocks):
        i, j = tile_of(tile, rows, columns)
        for k in range(steps):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), (2 * BM + BN) * BK)
            load_tile(XTiles, [i * 2 * BM, k * BK], full.index(stage), xs.index(stage))
            load_tile(WTiles, [j * BN, k * BK], full.index(stage), ws.index(stage))
            done += 1


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
    xs = gl.allocate_shared_memory(XTiles.dtype, [STAGES, 2 * BM, BK], XTiles.layout)
    ws = gl.allocate_shared_memory(WTiles.dtype, [STAGES, BN, BK], WTiles.layout)
    outs = gl.allocate_shared_memory(OutTiles.dtype, [2, BM, BN], OutTiles.layout)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(ready.index(group), count=1)
    buffers = (xs, ws, outs, full, empty, ready)
    operands = (OutTiles, ResidualTiles, XScale, WScale, Bias, OutScale, M, N, K, blocks)
    gl.warp_specialize(
        [
            (consumer, (buffers, operands, 0, GELU, RESIDUAL, LARGEST)),
            (consumer, (buffers, operands, 1, GELU, RESIDUAL, LARGEST)),
            (producer, (XTiles, WTiles, xs, ws, full, empty, M, N, K, blocks)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def product(x, x_scale, weight, weight_scale, bias, residual, out_scale, out, gelu) -> None:
    """Write `out` [M, N]: bf16, fp16 or, with `out_scale`, 8 bits. See scaled_linear.product."""
    (M, K), N = x.shape, len(weight)
    blocks = num_sms(x.device.index)
    out_tiles = tiles(out, BM.value, BN.value)
    start(
        linear_kernel,
        (blocks,),
        tiles(x, 2 * BM.value, BK.value),
        tiles(weight, BN.value, BK.value),
        out_tiles,
        out_tiles if residual is None else tiles(residual.to(out.dtype), BM.value, BN.value),
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
