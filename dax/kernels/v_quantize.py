"""Values in fp8, as the second product of attention wants them: scaled per channel, transposed, tiled, permuted.

Tensor cores take 8-bit operands with the summed dimension innermost, so a tile of 128 tokens lies transposed, [D, 128].
Within each 16 tokens the order is ORDER: a thread that holds scores in the layout of the first product's result then
holds probabilities in the layout of the second one's operand, and nothing moves (SageAttention2, arXiv:2411.10958).
"""

import torch
import torch.nn.functional as F

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.qk_norm_rope import rows_of
from dax.kernels.rooms import UNIT, addresses, fill
from dax.kernels.start import start

TILE = 128
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float16: 448.0}
SMALLEST = 1e-20
NUM_WARPS = 4


def v_quantize_reference(v: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values over their channel's scale, in tiles.

    v        [B, s, H, D]             tokens may be strided
    amax     [B, H, D] fp32           token_amax over all tokens, of all ranks
    dtype    float8_e4m3fn; float16 for GPUs without fp8
    returns  [B, H, T, D, 128] dtype  T = ceil(s / 128); tokens in ORDER within each 16; zeros beyond the last
             [B, H, D] fp32           what the codes are multiplied by
    Reads v once and writes half of it: 3 B s H D bytes from bf16 to fp8. Bandwidth-bound.
    """
    B, S, H, D = v.shape
    scale = (amax / LARGEST[dtype]).clamp_min(SMALLEST)
    x = F.pad(v.float() / scale[:, None], (0, 0, 0, 0, 0, -S % TILE))
    x = x.view(B, -1, TILE // 16, 16, H, D)[:, :, :, list(ORDER)]
    return x.permute(0, 4, 1, 5, 2, 3).flatten(-2).to(dtype).contiguous(), scale


@triton.jit(do_not_specialize=["S"])
def v_quantize_kernel(
    V, Scale, Out, Heads, S, stride_b, stride_s, stride_h,
    D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, TILE)
    token = tile * TILE + place // 16 * 16 + ((place & 1) | ((place & 2) << 2) | ((place & 12) >> 1))  # ORDER
    column = tl.arange(0, D)
    at = V + batch * stride_b + token.to(tl.int64)[:, None] * stride_s + head * stride_h + column[None, :]
    v = tl.load(at, (token < S)[:, None], 0.0).to(tl.float32)
    index = batch * tl.num_programs(0) + head
    v = v * (1.0 / tl.load(Scale + index * D + column))[None, :]
    v = tl.minimum(tl.maximum(v, -448.0), 448.0).to(Out.dtype.element_ty)
    # a head begins at a multiple of 16 bytes
    begin = index * tl.num_programs(1) * TILE * D if Heads is None else tl.load(Heads + index) * UNIT
    out = Out + begin + tile * TILE * D + column[:, None] * TILE + place[None, :]
    tl.store(out, tl.trans(v))


def launch(v: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, D = v.shape
    out = torch.empty(B, H, -(-S // TILE), D, TILE, device=v.device, dtype=dtype)
    return out, start_v_quantize(v, amax, out)


def v_quantize_into(v, amax, rooms: list) -> torch.Tensor:
    """v_quantize with its codes written to `rooms`, [B, h, T, D, 128] of its dtype each; returns the scales."""
    if v.is_cuda:
        return start_v_quantize(v, amax, rooms[0], addresses(rooms, 1))
    quantized, scale = V_QUANTIZE(v, amax, rooms[0].dtype)
    fill(rooms, quantized, 1)
    return scale


def start_v_quantize(v, amax, out, places=None) -> torch.Tensor:
    B, S, H, D = v.shape
    v, scale = rows_of(v), (amax / LARGEST[out.dtype]).clamp_min(SMALLEST)
    with torch.cuda.device_of(v):
        start(
            v_quantize_kernel, (H, -(-S // TILE), B), v, scale, out, places, S, v.stride(0), v.stride(1), v.stride(2),
            D=D, TILE=TILE, UNIT=UNIT // out.element_size(), num_warps=NUM_WARPS,
        )  # fmt: skip
    return scale


def restored(outputs) -> torch.Tensor:
    """[B, H, T 128, D] fp32: the values that codes and scales stand for, in the tokens' own order."""
    quantized, scale = outputs
    B, H, T, D, _ = quantized.shape
    inverse = [ORDER.index(token) for token in range(16)]
    x = quantized.float().view(B, H, T, D, TILE // 16, 16)[..., inverse].flatten(-2)
    return x.transpose(3, 4).flatten(2, 3) * scale[:, :, None]


def exact(v, amax, dtype):
    return F.pad(v.float(), (0, 0, 0, 0, 0, -v.shape[1] % TILE)).transpose(1, 2)


def case(B, s, H, D, *, fused=False, dtype=torch.float8_e4m3fn, source=torch.bfloat16):
    def arguments(generator, device):
        v = torch.randn(B, s, (3 if fused else 1) * H * D, generator=generator, device=device).to(source)
        v = (v.chunk(3, dim=-1)[2] if fused else v).unflatten(2, (H, D))
        return v, v.float().abs().amax(1), dtype

    return arguments


V_QUANTIZE = define(
    v_quantize_reference,
    launch,
    cases={
        "one token": case(1, 1, 3, 128),
        "63 of a fused projection": case(2, 63, 4, 64, fused=True),
        "257": case(1, 257, 2, 128),
        "257 to fp16": case(1, 257, 2, 64, dtype=torch.float16, source=torch.float16),
    },
    cost=lambda v, amax, dtype: Cost(2 * v.numel(), v.numel() * (v.element_size() + dtype.itemsize), "fp32"),
    exact=exact,
    decode=restored,
)
