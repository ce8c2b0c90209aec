"""Attention over ranks equals attention in one process, for every layout; head chunks hide the exchange."""

import pytest
import torch

from dax.parallel.admit import ways_of
from dax.parallel.messages import Axes, words
from tests.parallel import tasks

LAYOUTS = [  # ranks, B, S, H, ulysses, rows, align, chunks
    (2, 1, 37, 4, 2, 1, 1, 1),
    (2, 1, 37, 12, 2, 1, 8, 3),
    (2, 2, 21, 3, 2, 1, 1, 2),
    (2, 1, 37, 4, 1, 2, 1, 1),
    (4, 1, 65, 12, 4, 1, 16, 2),
    (4, 2, 50, 5, 2, 2, 1, 2),
    (4, 1, 40, 3, 1, 4, 1, 3),
    (4, 1, 40, 12, 4, 1, 16, 1),  # the last rank has no token
    (8, 1, 75, 12, 8, 1, 1, 2),  # 12 heads on 8 ranks: 2 2 2 2 1 1 1 1
    (8, 1, 75, 12, 4, 2, 8, 3),
    (8, 1, 75, 12, 2, 4, 1, 1),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_attention_equals_one_process(ranks, case):
    count, *layout = case
    for difference in ranks(count).run(tasks.attention, *layout):
        assert difference <= 2e-7


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_so_it_does_through_a_window(ranks, case):
    count, *layout = case
    for difference in ranks(count).run(tasks.attention, *layout, torch.float32, True):
        assert difference <= 2e-7


@pytest.mark.parametrize("count", (2, 4))
def test_bfloat16_travels_too(ranks, count):
    for difference in ranks(count).run(tasks.attention, 1, 37, 4, count, 1, 1, 1, torch.bfloat16):
        assert difference < 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn))
def test_gather_joins_uneven_shares_of_any_type(ranks, dtype):
    assert all(ranks(4).run(tasks.gather_of, (3, 1, 0, 4), dtype, 1))
    assert all(ranks(4).run(tasks.gather_of, (3, 1, 0, 4), dtype, 0))


EIGHT_BITS = [  # ranks, B, S, H, ulysses, rows, chunks
    (2, 1, 391, 4, 2, 1, 1),
    (4, 2, 520, 5, 2, 2, 2),
    (8, 1, 1000, 12, 8, 1, 2),
    (8, 1, 1000, 3, 1, 8, 1),
    (2, 1, 389, 3, 2, 1, 2),  # an odd number of scales, and after them rows of 16-byte words
]


@pytest.mark.parametrize("window", (False, True), ids=("messages", "window"))
@pytest.mark.parametrize("case", EIGHT_BITS, ids=str)
def test_eight_bits_on_the_wire_change_no_bit(ranks, case, window):
    """Scales, shift and range come from all tokens, whoever holds them: any number of ranks gives the same integers."""
    count, *layout = case
    assert set(ranks(count).run(tasks.int8, *layout, "8bit", window)) == {0.0}


@pytest.mark.parametrize("window", (False, True), ids=("messages", "window"))
def test_eight_bits_made_after_a_plain_wire(ranks, window):
    """Then keys and queries are rounded to 16 bits on the way, and a few integers may come out next to the others."""
    assert max(ranks(2).run(tasks.int8, 1, 391, 4, 2, 1, 2, "plain", window)) < 0.003


IN_A_ROW = [  # ranks, (B, S, H, ulysses, rows) of one attention after the other
    (2, [(1, 391, 4, 2, 1), (1, 391, 4, 2, 1), (2, 260, 3, 2, 1), (1, 780, 5, 1, 2)]),
    (3, [(1, 400, 4, 3, 1), (1, 391, 4, 3, 1)]),
    (4, [(2, 520, 5, 2, 2), (1, 520, 5, 4, 1)]),
]


@pytest.mark.parametrize("chunks", (0, 3))
@pytest.mark.parametrize("kernel", ("sdpa", "int8", "bf16, straight"))
@pytest.mark.parametrize("case", IN_A_ROW, ids=lambda case: f"{case[0]} ranks")
def test_one_memory_serves_one_attention_after_the_other(ranks, case, kernel, chunks):
    """Of other sizes and other data, bit for bit as by messages, whichever rank is late."""
    count, layouts = case
    answers = ranks(count).run(tasks.in_a_row, kernel, layouts, chunks, 1)
    assert all(same for same, _, _ in answers)
    (held,) = {tuple(held.items()) for _, held, _ in answers}
    assert dict(held).keys() == {"operands", "output"} and not any(left for _, _, left in answers)


@pytest.mark.parametrize("without", (0, 1), ids=("operands", "outputs"))
def test_a_missing_barrier_would_be_seen(ranks, without):
    layouts = [(1, 391, 4, 2, 1)] * 3
    assert not all(same for same, _, _ in ranks(2).run(tasks.in_a_row, "sdpa", layouts, 0, 1, without))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", ["rank 1 of the group cannot", "RuntimeError: no memory to be seen"]),
        ("unseen", ["not what was written"] * 2),
        (None, [None] * 2),
    ],
)
def test_a_window_is_tried_before_it_is_used(ranks, fault, told):
    """All ranks come to the same answer, and say why there is none."""
    assert ranks(2).run(tasks.not_opened, fault) == [(why is not None, why) for why in told]


ATTEMPTS = 3  # on a machine that does other things too, a sleep may last longer than it should


def test_head_chunks_hide_the_exchange(ranks):
    """On a link where the exchange takes half as long as attention; on PCIe it is a tenth to a third."""
    attend_s, exchange_s = 0.4, 0.2

    def exposed(chunks: int) -> float:
        """The share of the exchange that is waited for."""
        (total_s, busy_s, exposed_s), _ = ranks(2).run(tasks.delayed, 64, 16, chunks, attend_s, exchange_s)
        assert busy_s == pytest.approx(exchange_s, rel=0.01) and total_s >= attend_s
        hidden = 100 * (1 - exposed_s / busy_s)
        print(f"{chunks} head chunks: {1e3 * total_s:.0f} ms, {hidden:.0f} % of the exchange hidden")
        return exposed_s / busy_s

    tries = range(ATTEMPTS)
    assert any(exposed(1) > 0.9 for _ in tries), "without chunks, all of it is seen"
    assert any(exposed(2) > exposed(4) for _ in tries)
    assert any(exposed(8) < 0.3 for _ in tries)


def test_the_way_that_is_fastest_here_is_taken(ranks):
    """On a link with bandwidth to wait for, head chunks are; where every message costs and attention is short they are
    not; and a window beside a slow link is."""

    def admitted(*link) -> tuple:
        answers = ranks(2).run(tasks.admission, *link)
        assert len(set(answers)) == 1, "all ranks come to the same answer"
        return answers[0]

    def pay() -> bool:
        chunks, _, without_ms, with_ms = admitted(0.0, 0.05, 0.1)
        return chunks == 8 and with_ms < 0.9 * without_ms

    assert any(pay() for _ in range(ATTEMPTS))
    assert any(admitted(0.01, 1e-6, 0.002)[0] == 0 for _ in range(ATTEMPTS))
    assert any(admitted(0.005, 0.02, 0.002, True)[1] for _ in range(ATTEMPTS))


def test_every_way_there_is_is_tried():
    told = [str(way) for way in ways_of(5, True, object())]
    assert told == ["serial", "in 5 chunks", "serial through the window", "in 5 chunks through the window"]
    assert [str(way) for way in ways_of(5, False, None)] == ["in 5 chunks"]
    assert [str(way) for way in ways_of(0, True, object())] == ["serial", "serial through the window"]


@pytest.mark.parametrize("chunks", (1, 2, 3, 5))
@pytest.mark.parametrize("link", ((0.1, 0.0), (0.1, 0.02), (0.6, 0.01)), ids=("fast", "latency", "slow"))
def test_the_planner_knows_what_is_hidden(ranks, chunks, link):
    """Its arithmetic and the real order of work come to one time, on a clock that only links and attention move."""
    for seen, arithmetic in ranks(2).run(tasks.schedule, 24, chunks, 1.0, *link):
        assert seen == pytest.approx(arithmetic, rel=1e-6)


def test_queries_are_quantised_while_the_statistics_travel(ranks):
    for events in ranks(2).run(tasks.order_of_int8):
        assert events == ["issue", "Q_QUANTIZE", "wait", "K_QUANTIZE", "V_QUANTIZE", "issue"]


def test_rows_of_features_are_copied_as_words():
    """As wide as fits; not where a row does not lie on words: there the values would be torn."""
    axis, x = Axes(1, 2), torch.arange(240, dtype=torch.int8).view(1, 5, 4, 12)
    assert words(x, axis).dtype == torch.int32 and torch.equal(words(x, axis).view(torch.int8), x)
    assert words(x[..., 1:9], axis).dtype == words(x[..., :6], axis).dtype == torch.uint8
    assert words(x[0], Axes(0, 1)).dtype == torch.int32 and words(x[0], Axes(1, 2)).dtype == torch.uint8
    halves = x.to(torch.bfloat16)
    assert words(halves, axis).dtype == torch.int64 and words(halves[..., 1:], axis).dtype == torch.bfloat16
    assert words(halves[:, 1:], axis).dtype == torch.int64 and words(x.float(), axis).dtype == torch.complex128
    flat = torch.zeros(481, dtype=torch.int8)
    for first, word in ((0, torch.complex128), (8, torch.int64), (4, torch.int32), (2, torch.uint8)):
        assert words(flat[first : first + 320].view(1, 5, 4, 16), axis).dtype == word


@pytest.mark.parametrize("dtype", (torch.int8, torch.bfloat16, torch.float32))
def test_words_are_moved_bit_by_bit(dtype):
    """Whatever the bits mean in the word that carries them, signalling NaNs among it."""
    axis, generator = Axes(1, 2), torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**63), 2**63 - 1, (1, 6, 4, 32), generator=generator)
    bits[0, 0] = torch.tensor([0x7FF0000000000001, -0x000FFFFFFFFFFFFF, -(2**63), 2**63 - 1] * 8)
    x, into = bits.view(dtype), torch.zeros(1, 6, 8, 32, dtype=torch.int64).view(dtype)
    assert words(x, axis).dtype == torch.complex128
    words(into, axis)[:, :, 2:6].copy_(words(x, axis))
    assert torch.equal(into.view(torch.int64)[:, :, 2:6], bits)
    joined = torch.cat([words(x, axis)[:, 3:], words(x, axis)[:, :3]], 1)
    assert torch.equal(joined.view(torch.int64), bits.roll(3, 1))
