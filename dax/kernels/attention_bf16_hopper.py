"""Attention in 16 bits for Hopper (compute capability 9.0), in Gluon. docs/attention.md tells what else was tried.

A block takes 192 queries of a head through all its keys: three warpgroups of 64 rows, and one warp that fetches tiles
by descriptor, straight from [B, S, H, D]. A warpgroup turns s = q k^T into p = 2^(s - max), rounds it to 16 bits where
it lies, as the first operand of p v, and that product adds to its fp32 output.
- A token goes around the warpgroups: from p v to the issue of the next q k^T the tensor cores are one's own, while the
  two others compute softmax.
- The row maximum's scale, with log2 e, is folded into the exponent: one multiply-add and one exponential a score.
- Row sums are added up in each thread, of p before rounding, and joined once, at the end.
- The last tile comes first: keys past the end, which the copy fills with zeros, are masked there and nowhere else.
"""

import torch

from dax.kernels.hopper import barriers
from dax.kernels.language import gl, gluon, load_tile, mbarrier, triton, warpgroup_mma, warpgroup_mma_wait
from dax.kernels.start import start

WARPGROUPS, ROWS = gl.constexpr(3), gl.constexpr(64)  # rows: of a warpgroup
TILE, STAGES = gl.constexpr(128), gl.constexpr(2)  # keys of a tile; tiles of keys and values in flight
REGISTERS = gl.constexpr(160)
LOG2_E = 1.4426950408889634


@gluon.jit
def scores(q, k_tiles, k_full, step, no_s):
    """Issue q k^T of a step once its keys are there."""
    stage = step % STAGES
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    keys = k_tiles.index(stage).reshape([TILE, q.shape[1]])
    return warpgroup_mma(q, keys.permute((1, 0)), no_s, use_acc=False, is_async=True)


@gluon.jit
def weigh(p, v_tiles, step, o):
    """o + p v of a step, whose values must be there."""
    values = v_tiles.index(step % STAGES).reshape([TILE, o.shape[1]])
    return warpgroup_mma_wait(0, deps=(warpgroup_mma(p, values, o, is_async=True),))


@gluon.jit
def row_sums(p):
    """[ROWS, 4]: what each of a row's four threads holds, added up."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def attend_rows(tiles, bars, sizes, Out, Rows, scale, TURN: gl.constexpr):
    """One warpgroup: rows [first + TURN * ROWS, first + TURN * ROWS + ROWS) of a head against n tiles of keys."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, v_full, k_emptied, v_emptied, tokens = bars
    first, S, H, num_keys, n = sizes
    D: gl.constexpr = k_tiles.shape[4]
    NEXT: gl.constexpr = (TURN + 1) % WARPGROUPS
    LEADS: gl.constexpr = 1 if TURN == 0 else 0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_tiles.index(TURN).reshape([ROWS, D])
    no_s = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    o = gl.zeros([ROWS, D], gl.float32, o_layout)

    mbarrier.wait(q_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(scores(q, k_tiles, k_full, 0, no_s),))
    mbarrier.arrive(k_emptied.index(0), count=1)
    key = (n - 1) * TILE + gl.arange(0, TILE, gl.SliceLayout(0, s_layout))
    s = gl.where((key < num_keys)[None, :], s, float("-inf"))
    largest = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - largest[:, None])
    total = row_sums(p)
    mbarrier.wait(v_full.index(0), 0)
    for i in range(1, n):
        p16 = gl.convert_layout(p.to(q.dtype), p_layout, assert_trivial=True)
        mbarrier.wait(tokens.index(TURN), ((i - 1) & 1) ^ LEADS)
        o = weigh(p16, v_tiles, i - 1, o)
        s = scores(q, k_tiles, k_full, i, no_s)
        mbarrier.arrive(tokens.index(NEXT), count=1)
        mbarrier.arrive(v_emptied.index((i - 1) % STAGES), count=1)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_emptied.index(i % STAGES), count=1)
        new = gl.maximum(largest, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - new[:, None])
        fade = gl.exp2(largest - new)
        largest = new
        total = total * gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout))[:, None] + row_sums(p)
        mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
        o = o * gl.convert_layout(fade, o_rows)[:, None]
    p16 = gl.convert_layout(p.to(q.dtype), p_layout, assert_trivial=True)
    o = weigh(p16, v_tiles, n - 1, o)

    index = gl.program_id(1).to(gl.int64)
    o = o * (1.0 / gl.convert_layout(gl.sum(total, 1), o_rows))[:, None]
    row = first + TURN * ROWS + gl.arange(0, ROWS, o_rows)
    channel = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    token = index // H * S + row
    if Rows is None:
        at = (token * H + index % H) * D
    else:
        at = gl.load(Rows + token, mask=row < S, other=0) * 8 + index % H * D
    gl.store(Out + at[:, None] + channel[None, :], o.to(q.dtype), mask=(row < S)[:, None])


@gluon.jit
def fetch(Q, K, V, tiles, bars, sizes):
    """The fetching warp: queries once, then keys and values as stages are emptied, from the last tile to the first."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, v_full, k_emptied, v_emptied, tokens = bars
    first, S, H, num_keys, n = sizes
    D: gl.constexpr = k_tiles.shape[4]
    batch, head = gl.program_id(1) // H, gl.program_id(1) % H
    mbarrier.expect(q_full.index(0), WARPGROUPS * ROWS * D * 2)
    for turn in gl.static_range(WARPGROUPS):
        load_tile(Q, [batch, first + turn * ROWS, head, 0], q_full.index(0), q_tiles.index(turn))
    for i in range(n):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        token = (n - 1 - i) * TILE
        mbarrier.wait(k_emptied.index(stage), phase)
        mbarrier.expect(k_full.index(stage), TILE * D * 2)
        load_tile(K, [batch, token, head, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_emptied.index(stage), phase)
        mbarrier.expect(v_full.index(stage), TILE * D * 2)
        load_tile(V, [batch, token, head, 0], v_full.index(stage), v_tiles.index(stage))


@gluon.jit(do_not_specialize=["S", "H", "num_keys"])
def attention_kernel(Q, K, V, Out, Rows, S, H, num_keys, scale, D: gl.constexpr):
    sizes = (gl.program_id(0) * WARPGROUPS * ROWS, S, H, num_keys, gl.cdiv(num_keys, TILE))
    tiles = (
        gl.allocate_shared_memory(Q.dtype, [WARPGROUPS, 1, ROWS, 1, D], Q.layout),
        gl.allocate_shared_memory(K.dtype, [STAGES, 1, TILE, 1, D], K.layout),
        gl.allocate_shared_memory(V.dtype, [STAGES, 1, TILE, 1, D], V.layout),
    )
    q_full, tokens = barriers(1, 1), barriers(WARPGROUPS, 1)
    k_full, v_full = barriers(STAGES, 1), barriers(STAGES, 1)
    k_emptied, v_emptied = barriers(STAGES, WARPGROUPS), barriers(STAGES, WARPGROUPS)
    bars = (q_full, k_full, v_full, k_emptied, v_emptied, tokens)
    gl.warp_specialize(
        [
            (attend_rows, (tiles, bars, sizes, Out, Rows, scale, 0)),
            (attend_rows, (tiles, bars, sizes, Out, Rows, scale, 1)),
            (attend_rows, (tiles, bars, sizes, Out, Rows, scale, 2)),
            (fetch, (Q, K, V, tiles, bars, sizes)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


def launch(q, k, v, scale: float, out=None, rows=None) -> torch.Tensor:
    """See attention_bf16. q, k, v as `readable` gives them.

    rows [B, S] int64: where each token goes, in units of 16 bytes after out's first.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def tiles(x, rows: int):
        box = [1, rows, 1, x.shape[-1]]
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
        strides = [step if size > 1 else box[-1] for size, step in zip(x.shape, x.stride())]  # of one, any will do
        return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], box, layout)

    B, S, H, D = q.shape
    out = torch.empty(B, S, H, D, device=q.device, dtype=q.dtype) if out is None else out
    with torch.cuda.device_of(q):
        start(
            attention_kernel, (triton.cdiv(S, WARPGROUPS.value * ROWS.value), B * H),
            tiles(q, ROWS.value), tiles(k, TILE.value), tiles(v, TILE.value), out, rows, S, H, k.shape[1],
            scale * LOG2_E, D=D, num_warps=4,
        )  # fmt: skip
    return out


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a dense copy where the copy engine cannot read it: it wants places in multiples of 16 bytes."""
    steps = [step for size, step in zip(x.shape[:3], x.stride()) if size > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
