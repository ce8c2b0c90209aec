"""Times of what several ranks do together: the same number of calls on each, and the slowest counts."""

import time
from collections.abc import Callable
from math import ceil

from dax.bench.timing import Reading, Sensors, sensor, summarise

ROUNDS = 2


class RanksClock:
    """The clock of all ranks: every method is collective and gives the same on each. `log` hears what rank 0 tells."""

    def __init__(self, device: str, warm_up_s: float, timed_s: float, log: Callable[[str], None]):
        self.device, self.warm_up_s, self.timed_s, self.log = device, warm_up_s, timed_s, log
        self.read = sensor(device) if device == "cuda" else None

    def sustained_ms(self, call, share: float = 1.0) -> tuple[float, Reading]:
        """(milliseconds of one call, back to back after a warm-up, what this rank's card read meanwhile).

        share   of the time, for what needs no long look
        """
        first = self.seconds(call)
        self.seconds(call, ceil(share * self.warm_up_s / first))
        count = ceil(share * self.timed_s / ROUNDS / first)
        with Sensors(self.read) as sensors:
            seconds = self.seconds(call, count)
        return 1e3 * seconds / count, summarise(sensors.rows)

    def seconds(self, call, count: int = 1) -> float:
        """Of so many calls that all ranks start together, on the slowest."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return self.together(time.perf_counter() - start)

    def wait(self) -> None:
        import torch
        import torch.distributed as dist

        if self.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def together(self, number: float) -> float:
        """The largest of all ranks' numbers; infinity where one is NaN."""
        import torch
        import torch.distributed as dist

        number = number if number == number else float("inf")
        largest = torch.tensor(number, device=self.device, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def tell(self, text: str) -> None:
        """Rank 0 says it."""
        import torch.distributed as dist

        if dist.get_rank() == 0:
            self.log(text)
