"""Orthogonal transforms that both factors of a product go through before they are quantised, and so leave it as it is.

They spread a loud channel over its neighbours (Hadamard, as in QuaRot, arXiv:2404.00456): over 32 of a head of queries
and keys, over 8 of a linear layer's inputs. All of it happens inside a thread.
"""

import torch

from dax.kernels.language import tl, triton


def transformed(x: torch.Tensor) -> torch.Tensor:
    """Hadamard over 8 neighbouring channels and over the four quarters of a head: x [..., D] fp32, orthogonal."""
    parts = x.unflatten(-1, (4, -1, 8))
    return torch.einsum("...qgn,qp,nm->...pgm", parts, hadamard(4, x.device), hadamard(8, x.device)).flatten(-3)


def hadamard(size: int, device) -> torch.Tensor:
    """[size, size] fp32, symmetric and its own inverse."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


@triton.jit
def butterflies(x, COLUMNS: tl.constexpr, FIRST: tl.constexpr):
    """Levels of the transform over neighbouring columns of x [R, COLUMNS], without their factors 2^-0.5.

    FIRST 0: over each 8 columns. 1: over each 4, where a column already is the sum or the difference of two.
    """
    for level in tl.static_range(3 - FIRST):
        a, b = tl.split(x.reshape(x.shape[0], COLUMNS // (2 << level), 2, 1 << level).permute(0, 1, 3, 2))
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(x.shape[0], COLUMNS)
    return x


@triton.jit
def mixed(a, b, c, d, COLUMNS: tl.constexpr, FIRST: tl.constexpr):
    """The transform of four quarters, each [R, COLUMNS], without its factor 32^-0.5: all within a thread."""
    a, b, c, d = a + b, a - b, c + d, c - d
    a, b, c, d = a + c, b + d, a - c, b - d
    return (
        butterflies(a, COLUMNS, FIRST),
        butterflies(b, COLUMNS, FIRST),
        butterflies(c, COLUMNS, FIRST),
        butterflies(d, COLUMNS, FIRST),
    )
