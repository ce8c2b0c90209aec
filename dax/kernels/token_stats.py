"""What 8-bit attention must know of all tokens: the mean of the keys and the range of the values, channel by channel.

Means are kept per 128 tokens, always the same 128, so that any split of the tokens over ranks comes to the same bits.
"""

import torch
import torch.nn.functional as F

from dax.kernels.language import tl, triton
from dax.kernels.op import Cost, define
from dax.kernels.start import start

TILE = 128
NUM_WARPS = 2


def token_means_reference(x: torch.Tensor) -> torch.Tensor:
    """Means over each 128 tokens, the last over what is left, in fp32.

    x        [B, s, H, D]       tokens may be strided
    returns  [B, T, H, D] fp32  T = ceil(s / 128)
    Reads x once: 2 B s H D bytes in bf16.
    """
    B, S, H, D = x.shape
    sums = F.pad(x.float(), (0, 0, 0, 0, 0, -S % TILE)).view(B, -1, TILE, H, D).sum(2)
    counts = (S - TILE * torch.arange(sums.shape[1], device=x.device)).clamp_max(TILE)
    return sums / counts[:, None, None]


def token_amax_reference(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude over all tokens, in fp32; NaN where there is one.

    x        [B, s, H, D]    tokens may be strided
    returns  [B, H, D] fp32
    Reads x once: 2 B s H D bytes in bf16.
    """
    return x.float().abs().amax(1)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["S"])
def token_stats_kernel(
    X, Out, S, stride_b, stride_s, stride_h, D: tl.constexpr, TILE: tl.constexpr, AMAX: tl.constexpr
):
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = (tile * TILE + tl.arange(0, TILE))[:, None]
    column = tl.arange(0, D)
    at = X + batch * stride_b + token.to(tl.int64) * stride_s + head * stride_h + column[None, :]
    x = tl.load(at, token < S, 0.0).to(tl.float32)
    result = tl.reduce(tl.abs(x), 0, larger) if AMAX else tl.sum(x, 0) / tl.minimum(S - tile * TILE, TILE)
    tl.store(Out + ((batch * tl.num_programs(1) + tile) * tl.num_programs(0) + head) * D + column, result)


def tile_stats(x: torch.Tensor, amax: bool) -> torch.Tensor:
    B, S, H, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    T = -(-S // TILE)
    out = torch.empty(B, T, H, D, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        start(
            token_stats_kernel, (H, T, B), x, out, S, x.stride(0), x.stride(1), x.stride(2),
            D=D, TILE=TILE, AMAX=amax, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def launch_means(x: torch.Tensor) -> torch.Tensor:
    return tile_stats(x, amax=False)


def launch_amax(x: torch.Tensor) -> torch.Tensor:
    return tile_stats(x, amax=True).amax(1)


def case(B, s, H, D, dtype=torch.bfloat16, fused=False):
    def arguments(generator, device):
        x = torch.randn(B, s, (3 if fused else 1) * H * D, generator=generator, device=device).to(dtype)
        return ((x.chunk(3, dim=-1)[2] if fused else x).unflatten(2, (H, D)),)

    return arguments


CASES = {
    "one token": case(1, 1, 3, 128),
    "63 of a fused projection": case(2, 63, 4, 64, fused=True),
    "257": case(1, 257, 2, 128, dtype=torch.float16),
}


def cost(x) -> Cost:
    return Cost(x.numel(), x.numel() * x.element_size(), "fp32")


TOKEN_MEANS = define(token_means_reference, launch_means, cases=CASES, cost=cost)
TOKEN_AMAX = define(token_amax_reference, launch_amax, cases=CASES, cost=cost)
