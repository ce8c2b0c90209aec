"""What only GPUs can show: memory that they see of each other, and streams."""

from itertools import product

import pytest

from dax.parallel.launch import run_ranks
from tests.parallel import runs

IN_A_ROW = [(1, 60_005, 4, 2, 1), (1, 60_005, 4, 2, 1), (2, 3000, 5, 2, 1), (1, 60_005, 4, 1, 2), (1, 60_005, 4, 2, 1)]


@pytest.mark.multigpu
def test_attention_through_a_window_is_that_by_messages():
    """Bit for bit, one attention after the other in one memory, whichever rank is late."""
    kinds = list(product(("sdpa", "int8", "int8, straight", "bf16, straight"), (0, 3), (0, 1)))
    calls = [(kernel, IN_A_ROW, chunks, late, None, "cuda") for kernel, chunks, late in kinds]
    for answers in run_ranks(runs.on_gpus, ("in_a_row", *calls), 2):
        assert [same for same, _, _ in answers] == [True] * len(kinds), kinds
