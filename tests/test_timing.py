"""The stopwatch: turns, warm-up, sustained samples, sensors off without a GPU."""

import time

import pytest

from dax.bench.report import shown
from dax.bench.timing import Sensors, measure, summarise


def sleeper(log, name, seconds):
    def call():
        log.append(name)
        time.sleep(seconds)

    return call


def test_variants_take_turns_and_each_gets_its_share_of_time():
    log = []
    calls = {"a": sleeper(log, "a", 0.004), "b": sleeper(log, "b", 0.008)}
    timings = measure(calls, device="cpu", warm_up_s=0.02, timed_s=0.08, rounds=2, log=log.append)
    turns = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    told = [
        f"round {turn + 1} of 2, {name}: {shown(timings[name].visits[turn])} ms a call"
        for turn in (0, 1)
        for name in "ab"
    ]
    assert turns == ["a", told[0], "b", told[1], "a", told[2], "b", told[3]]
    for name, floor in (("a", 4.0), ("b", 8.0)):
        timing = timings[name]
        assert timing.low_ms >= floor
        assert timing.low_ms <= timing.ms <= timing.high_ms
        assert timing.timed_s >= 0.08
        assert len(timing.visits) == 2


def test_warm_up_is_not_counted():
    log = []
    first = [True]

    def call():
        log.append(1)
        if first[0]:
            first[0] = False
            time.sleep(0.05)  # the compile
        time.sleep(0.002)

    timing = measure({"a": call}, device="cpu", warm_up_s=0.01, timed_s=0.02, rounds=1)["a"]
    assert timing.count < len(log)
    assert timing.high_ms < 50


def test_short_calls_are_timed_in_groups():
    timing = measure({"a": lambda: None}, device="cpu", warm_up_s=0.01, timed_s=0.01, rounds=1)["a"]
    assert timing.count > 1000
    assert 0 < timing.ms < 0.01


def test_a_call_longer_than_the_budget_is_still_timed_in_every_visit():
    timing = measure({"a": lambda: time.sleep(0.02)}, device="cpu", warm_up_s=0.0, timed_s=0.001, rounds=2)["a"]
    assert timing.count == 2


def test_without_a_sensor_nothing_is_read():
    with Sensors(None) as sensors:
        time.sleep(0.01)
    assert sensors.rows == []
    assert summarise([]).watts is None


def test_sensors_are_read_while_the_block_runs_and_not_after():
    reads = []
    with Sensors(lambda: reads.append(1) or (1.0, 2.0, 3.0), interval_s=0.005) as sensors:
        time.sleep(0.05)
    count = len(reads)
    assert 2 <= count <= 11
    assert sensors.rows == [(1.0, 2.0, 3.0)] * count
    time.sleep(0.02)
    assert len(reads) == count


def test_readings_are_medians():
    reading = summarise([(1000.0, 500.0, 50.0), (1500.0, 690.0, 60.0), (1400.0, 700.0, 61.0)])
    assert (reading.sm_mhz, reading.watts, reading.celsius) == (1400.0, 690.0, 60.0)


@pytest.mark.gpu
def test_cuda_events_agree_with_the_wall_clock():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timing = measure({"a": lambda: a @ a}, device="cuda", warm_up_s=0.5, timed_s=0.5)["a"]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        a @ a
    torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - start) / 200
    assert timing.ms == pytest.approx(wall_ms, rel=0.3)
    assert timing.reading.sm_mhz is None or timing.reading.sm_mhz > 100
