"""A clip decoded in strips equals the clip decoded whole, halo by halo."""

import pytest

from dax.errors import DaxError
from dax.parallel.vae import check_columns
from tests.parallel import tasks


@pytest.mark.parametrize(("count", "columns"), ((2, 5), (4, 11), (8, 8)))
def test_split_decode_equals_the_whole(ranks, count, columns):
    for difference, layers, repeatable in ranks(count).run(tasks.vae_decode, columns):
        assert difference < 1e-5
        assert layers > 15 and repeatable


def test_too_few_columns_are_refused():
    with pytest.raises(DaxError, match="8 latent columns on 9 ranks; set parallel.vae = none"):
        check_columns(8, 9)
