"""Splits and degrees: whole numbers that must add up, whatever the counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dax.errors import DaxError
from dax.parallel.topology import Layout, Topology, chunk_sizes, complete, ranges, split_sizes, topologies


@given(st.integers(0, 5000), st.integers(1, 40), st.sampled_from((1, 8, 64, 128)))
def test_a_split_covers_everything_once_on_block_boundaries(total, parts, align):
    sizes = split_sizes(total, parts, align)
    assert len(sizes) == parts and sum(sizes) == total
    blocks = [-(-size // align) for size in sizes]
    assert max(blocks) - min(blocks) <= 1
    assert all(start % align == 0 for (start, end) in ranges(sizes) if end > start)


def test_a_video_of_720p_on_eight_ranks():
    assert split_sizes(75600, 8, 128) == (9472,) * 7 + (9296,)


@given(st.integers(1, 48), st.integers(1, 8), st.integers(1, 6))
def test_head_chunks_cover_every_head_once(heads, ulysses, chunks):
    layout = Layout(1000, heads, ulysses)
    carried = [
        head
        for column in range(ulysses)
        for chunk in range(chunks)
        for head in range(*layout.head_chunk(column, chunk, chunks))
    ]
    assert carried == list(range(heads))


@given(st.integers(1, 48), st.integers(1, 8))
def test_the_first_and_the_last_head_chunk_are_small(heads, chunks):
    """What travels unseen by attention is theirs; no chunk with heads comes after one without."""
    sizes = chunk_sizes(heads, chunks)
    assert sum(sizes) == heads and [bool(size) for size in sizes] == [chunk < heads for chunk in range(chunks)]
    if heads >= chunks > 2:
        between = sizes[1:-1]
        assert sizes[-1] == 1 and sizes[0] <= max(between) and max(between) - min(between) <= 1


def test_head_chunks_of_wan():
    assert chunk_sizes(20, 5) == (3, 5, 6, 5, 1) and chunk_sizes(20, 1) == (20,) and chunk_sizes(5, 5) == (1,) * 5


def test_ranks_are_numbered_with_head_groups_innermost():
    topology = Topology(cfg=2, ulysses=4, rows=2)
    assert topology.num_ranks == 16 and [topology.branch(rank) for rank in (0, 7, 8)] == [0, 0, 1]
    layout = Layout(4096, 40, 4, 2)
    assert list(layout.peers(5)) == [4, 5, 6, 7]
    assert layout.token_range(4) == (2048, 2560)


def test_every_topology_uses_every_rank():
    for num_ranks in range(1, 33):
        for topology in topologies(num_ranks, heads=12):
            assert topology.num_ranks == num_ranks and topology.ulysses <= 12
    assert Topology(1, 8, 1) in topologies(8, heads=12)  # 12 heads on 8 ranks
    assert all(topology.cfg == 1 for topology in topologies(8, heads=12, guided=False))


@pytest.mark.fault(51)
def test_degrees_that_do_not_fit_name_those_that_do():
    with pytest.raises(DaxError, match=r"parallel.ulysses = 3: not possible on 4 ranks with 12 heads; usable: cfg 1 x"):
        complete({"cfg": None, "ulysses": 3, "rows": None}, 4, 12)
    with pytest.raises(DaxError, match="usable: cfg 1 x ulysses 1 x rows 4; cfg 1 x ulysses 2 x rows 2; cfg 2"):
        complete({"ulysses": 4}, 4, heads=3)
    with pytest.raises(DaxError, match="on 2 ranks with 12 heads without guidance; usable: cfg 1 x"):
        complete({"cfg": 2}, 2, 12, guided=False)
    assert complete({"cfg": 2, "ulysses": None}, 4, 12) == [Topology(2, 1, 2), Topology(2, 2, 1)]


@pytest.mark.fault(51)
def test_too_few_tokens_or_heads_for_the_ranks():
    with pytest.raises(DaxError, match="320 tokens in blocks of 128 do not give each of 4 ranks a share; .* 1, 2, 3$"):
        Layout(320, 12, 4, align=128).check()
    with pytest.raises(DaxError, match="parallel.ulysses = 8: the model has 3 heads; use 1 to 3"):
        Layout(4096, 3, 8).check()
