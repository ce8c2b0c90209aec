"""Timesteps that differ from token to token, as Wan2.2 TI2V-5B has them: 0 for a given first frame, t for the others.

The vendor embeds the timestep of every token and lets every block add its table to all of them: 2 GB a block at 704p.
But no more than two timesteps are distinct, and the tokens of the first come first. So only those are embedded, and a
fused block is told which tokens have which.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from dax.edits import Edits
from dax.errors import DaxError
from dax.kernels.token_rows import rows_of_tokens


@dataclass(frozen=True)
class Modulation:
    """What the vendor's forward hands to its blocks as `temb`, by rows instead of by tokens.

    rows   [B, R, ...]  R = 1: for all tokens; R = 2: row 0 for the first `split` tokens, row 1 for the others
    """

    rows: torch.Tensor
    split: int = 0

    def unflatten(self, dim: int, sizes) -> "Modulation":
        """As of a tensor; it is all that the vendor's forward does with it."""
        return replace(self, rows=self.rows.unflatten(dim, sizes))


def modulation(temb) -> Modulation:
    """The modulation of a block's tokens: `temb` itself, or the vendor's [B, 6, C] as one row [B, 1, 6, C] for all."""
    return temb if isinstance(temb, Modulation) else Modulation(temb[:, None])


def for_blocks(blocks, temb, tokens: int):
    """`temb` as the vendor's forward hands it to these blocks: unless they are fused, a row for every token."""
    if not isinstance(temb, Modulation) or "forward" in vars(blocks[0]):
        return temb
    return rows_of_tokens(temb.rows.flatten(2), tokens, temb.split).unflatten(2, (6, -1))


def apply_token_time(target, fused: bool, edits: Edits) -> None:
    """Let the transformers embed each distinct timestep once.

    fused   the blocks take a Modulation; the vendor's own take what it hands them, for every token where two differ
    """
    for transformer in target.transformers:
        embedder = transformer.condition_embedder
        edits.set_attribute(embedder, "forward", partial(embed, embedder.forward, fused))


def embed(inner, fused: bool, timestep, *args, timestep_seq_len=None, **kwargs):
    """What the vendor's condition_embedder computes, by rows.

    timestep          [B] or, with timestep_seq_len = s, [B s]
    returns           time [B, C] or [B, 1 or s, C], its projection likewise or a Modulation, text, image
    DaxError("bad_request") for more than two timesteps, or two in another order, where the blocks are fused. Waits for
    the device once, to read the timesteps.
    """
    if timestep_seq_len is None:
        return inner(timestep, *args, **kwargs)
    times = timestep.unflatten(0, (-1, timestep_seq_len))
    split = leading(times.cpu())
    if split is None:
        if fused:
            raise DaxError(
                "bad_request",
                "timestep: more than two values, or not one for the first tokens and one for the others: set "
                "blocks.fused = false",
            )
        return inner(timestep, *args, timestep_seq_len=timestep_seq_len, **kwargs)
    rows = times[:, :1] if split == 0 else times[:, [0, -1]]
    time, projected, *rest = inner(rows.flatten(), *args, timestep_seq_len=rows.shape[1], **kwargs)
    tokens = times.shape[1]
    projected = Modulation(projected, split) if fused else rows_of_tokens(projected, tokens, split)
    return rows_of_tokens(time, tokens, split), projected, *rest


def leading(times: torch.Tensor) -> int | None:
    """Of timesteps [B, s] on the CPU, how many tokens come before the second one; 0 if there is none, None if two do
    not do, or not in that order, or not at the same token in all videos.
    """
    split = int((times == times[:, :1]).all(0).long().cumprod(0).sum()) % times.shape[1]
    return split if (times[:, split:] == times[:, -1:]).all() else None
