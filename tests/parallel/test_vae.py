"""A clip decoded in strips equals the clip decoded whole, halo by halo."""

import pytest

from tests.parallel import tasks


@pytest.mark.parametrize(("count", "columns"), ((2, 5), (4, 11), (8, 8)))
def test_split_decode_equals_the_whole(ranks, count, columns):
    for difference, layers, repeatable in ranks(count).run(tasks.vae_decode, columns):
        assert difference < 1e-5
        assert layers > 15 and repeatable


def test_the_residual_decoder_in_patches(ranks):
    """That of Wan2.2 TI2V-5B."""
    for difference, layers, repeatable in ranks(2).run(tasks.vae_decode, 5, True):
        assert difference < 1e-5
        assert layers > 15 and repeatable


def test_a_clip_narrower_than_the_ranks_are_many_is_decoded_whole(ranks):
    assert ranks(4).run(tasks.vae_too_narrow) == [(True, True)] * 4
