"""Honest times: rivals interleaved in one process, warmed up, sustained, with the card's clock and watts beside them.

A power-capped card runs the first launches of a burst faster than it can go on, so every visit to a variant begins with
back-to-back warm-up, and variants take turns (A B A B) so that drift touches all of them alike.
"""

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from statistics import median

from dax.bench.report import shown

WARM_UP_S = 5.0
TIMED_S = 5.0
ROUNDS = 2
GROUP_MS = 1.0  # calls shorter than this are timed several at once


@dataclass
class Reading:
    """Medians of the card's sensors over the timed part; None where there is no sensor."""

    sm_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None


@dataclass
class Timing:
    """Milliseconds per call. `visits` are the medians of each visit, so that drift shows; `count` calls in all."""

    ms: float
    low_ms: float
    high_ms: float
    visits: list[float]
    count: int
    timed_s: float
    reading: Reading = field(default_factory=Reading)


def measure(
    variants: dict[str, Callable[[], object]],
    device: str = "cuda",
    warm_up_s: float = WARM_UP_S,
    timed_s: float = TIMED_S,
    log: Callable[[str], None] = lambda text: None,
    rounds: int = ROUNDS,
) -> dict[str, Timing]:
    """Time every variant, taking turns: `rounds` visits of `warm_up_s` unmeasured and `timed_s / rounds` measured s.

    A variant must be ready (compiled, checked) when it comes here. Calls too short for the clock are timed in groups of
    at least a millisecond. The figure is the median over all visits. `log` hears the median of each as it is known, so
    that a run that is cut short has told something.
    """
    watch = stopwatch(device)
    read = sensor(device) if device.startswith("cuda") else None
    samples: dict[str, list[list[float]]] = {name: [] for name in variants}
    readings: dict[str, list[tuple]] = {name: [] for name in variants}
    counts = dict.fromkeys(variants, 0)
    for turn in range(rounds):
        for name, call in variants.items():
            group = watch.warm_up(call, warm_up_s)
            with Sensors(read) as sensors:
                samples[name].append(watch.time(call, timed_s / rounds, group))
            readings[name] += sensors.rows
            counts[name] += group * len(samples[name][-1])
            log(f"round {turn + 1} of {rounds}, {name}: {shown(median(samples[name][-1]))} ms a call")
    result = {}
    for name in variants:
        flat = sorted(ms for visit in samples[name] for ms in visit)
        group_s = counts[name] / len(flat) * sum(flat) / 1e3
        visits = [median(visit) for visit in samples[name]]
        result[name] = Timing(median(flat), flat[0], flat[-1], visits, counts[name], group_s, summarise(readings[name]))
    return result


def stopwatch(device: str) -> "Stopwatch":
    """The clock for a torch device name."""
    return CudaStopwatch() if device.startswith("cuda") else Stopwatch()


class Stopwatch:
    """Wall-clock times of calls that return when they are done (CPU)."""

    def warm_up(self, call: Callable, seconds: float) -> int:
        """Run back to back for that long, at least once; returns how many calls make one sample."""
        start = time.perf_counter()
        count = 0
        while count < 1 or time.perf_counter() - start < seconds:
            call()
            count += 1
        self.finish()
        each_ms = 1e3 * (time.perf_counter() - start) / count
        return max(1, ceil(GROUP_MS / each_ms))

    def time(self, call: Callable, seconds: float, group: int) -> list[float]:
        """Milliseconds per call, one figure per group of calls, for at least that long."""
        samples: list[float] = []
        start = time.perf_counter()
        while not samples or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            for _ in range(group):
                call()
            samples.append(1e3 * (time.perf_counter() - before) / group)
        return samples

    def finish(self) -> None:
        pass


class CudaStopwatch(Stopwatch):
    """CUDA events, with the next group queued while one runs, so that the card never waits for the host."""

    def warm_up(self, call: Callable, seconds: float) -> int:
        import torch

        def paced():
            call()
            event = torch.cuda.Event()
            event.record()
            pending.append(event)
            if len(pending) > 1:
                pending.pop(0).synchronize()

        pending: list = []
        return super().warm_up(paced, seconds)

    def time(self, call: Callable, seconds: float, group: int) -> list[float]:
        import torch

        marks = [torch.cuda.Event(enable_timing=True)]
        marks[0].record()
        start = time.perf_counter()
        while len(marks) < 2 or time.perf_counter() - start < seconds:
            for _ in range(group):
                call()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            marks[-2].synchronize()
        self.finish()
        return [before.elapsed_time(after) / group for before, after in zip(marks, marks[1:])]

    def finish(self) -> None:
        import torch

        torch.cuda.synchronize()


class Sensors:
    """Calls `read` for SM clock, watts and temperature while the block runs, ten times a second; None reads nothing."""

    def __init__(self, read: Callable | None, interval_s: float = 0.1):
        self.read = read
        self.interval_s = interval_s
        self.rows: list[tuple[float, float, float]] = []

    def __enter__(self) -> "Sensors":
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if self.read:
            self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(self.interval_s):
            row = self.read()
            if row is None:
                return
            self.rows.append(row)

    def __exit__(self, *_) -> None:
        self.done.set()
        if self.read:
            self.thread.join()


def summarise(rows: list[tuple[float, float, float]]) -> Reading:
    """Medians of (MHz, W, degrees C) rows; an empty Reading for none."""
    return Reading(*(round(median(column), 1) for column in zip(*rows))) if rows else Reading()


def sensor(device: str) -> Callable[[], tuple[float, float, float] | None] | None:
    """A function that reads (SM MHz, W, degrees C) of the torch device, through NVML, else nvidia-smi; None without."""
    import torch

    if not torch.cuda.is_available():
        return None
    identity = f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    return nvml_sensor(identity) or smi_sensor(identity)


def nvml_sensor(identity: str):
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(identity)
    except Exception:  # no NVML here, or a driver that does not know the card by that name: nvidia-smi is asked instead
        return None

    def read():
        try:
            return (
                float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            )
        except pynvml.NVMLError:
            return None

    return read if read() else None


def smi_sensor(identity: str):
    query = ["nvidia-smi", "-i", identity, "--query-gpu=clocks.sm,power.draw,temperature.gpu"]

    def read():
        try:
            answer = subprocess.run(
                [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5, check=True
            )
            clock, watts, celsius = (float(cell) for cell in answer.stdout.strip().split(","))
            return clock, watts, celsius
        except (OSError, subprocess.SubprocessError, ValueError):
            return None

    return read if read() else None
