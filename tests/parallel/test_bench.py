"""The bench of several GPUs: what it times, and what it makes of the times."""

import pytest

from dax.bench.parallel import Way, bench, line, ways
from dax.errors import DaxError
from dax.facts import FACTS

WAN14 = FACTS["wan2.1-t2v-14b"]


def test_every_way_uses_every_gpu():
    for gpus in (2, 3, 4, 8):
        for way in ways(gpus, chunks=5, eight_bits=True):
            degrees = [way.parallel[name] for name in ("cfg", "ulysses", "rows")]
            assert degrees[0] * degrees[1] * degrees[2] == gpus and way.branches == degrees[0]
    wires = {way.parallel.get("wire") for way in ways(2, 5, eight_bits=False)}
    assert "8bit" not in wires, "only 8-bit attention has 8-bit operands"


def test_a_row_is_what_blocks_add():
    class Still:
        sm_mhz = watts = None

    row = line(Way("cfg 2", {}, branches=2), ms=340.0, around_ms=20.0, layers=4, facts=WAN14, error=0.0, clock=Still)
    assert row["ms_per_layer"] == 80 and row["layer_and_branch_ms"] == 40
    assert row["video_s"] == pytest.approx((40 * 40 + 10) * 100 / 1e3)


def test_more_gpus_than_there_are():
    with pytest.raises(DaxError, match="64 ranks need 64 GPUs") as caught:
        bench("tiny", (None,) * 3, None, "exact", 64, 0.1, 0.1)
    assert caught.value.exit_code == 4
    with pytest.raises(DaxError, match="--gpus 2 or more"):
        bench("tiny", (None,) * 3, None, "exact", 1, 0.1, 0.1)
