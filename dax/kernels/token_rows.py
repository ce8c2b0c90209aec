"""Which row of a modulation a token has: one for all tokens of a video, or two, parted at `split`.

Tokens whose timestep differs (a given first frame in Wan2.2 TI2V-5B) come first, so that a number says which.
"""

import torch


def rows_of_tokens(v: torch.Tensor, tokens: int, split: int) -> torch.Tensor:
    """[B or 1, R, C] as what broadcasts over [B, tokens, C]: of two rows, the first for the first `split` tokens."""
    if v.shape[1] == 1:
        return v
    return torch.where(torch.arange(tokens, device=v.device)[:, None] < split, v[:, :1], v[:, 1:])


def strides(v: torch.Tensor) -> tuple[int, int]:
    """(elements from one video's rows to the next's, from a row to the next) of a contiguous [B or 1, R, C]."""
    videos, rows, C = v.shape
    return rows * C if videos > 1 else 0, C if rows > 1 else 0
