"""A wire as slow as one likes."""

import time

from dax.parallel.wire import Wire


class DelayedWire:
    """A wire that behaves like a slow link, to see on any machine what an order of work hides.

    Exchanges take turns on the link; each takes latency_s plus the bytes that leave this rank over bytes_per_s.
    `exposed_s` adds up the time that wait() really waited for the link.
    """

    def __init__(self, wire: Wire, bytes_per_s: float, latency_s: float = 0.0):
        self.wire, self.bytes_per_s, self.latency_s = wire, bytes_per_s, latency_s
        self.rank, self.ranks = wire.rank, wire.ranks
        self.free_at = self.busy_s = self.exposed_s = 0.0

    def issue(self, send, send_sizes, receive_sizes):
        leaving = sum(send_sizes) - send_sizes[self.rank]
        seconds = self.latency_s + leaving / self.bytes_per_s
        self.free_at = max(self.free_at, time.perf_counter()) + seconds
        self.busy_s += seconds
        return self.wire.issue(send, send_sizes, receive_sizes), self.free_at

    def wait(self, handle):
        handle, arrival = handle
        received = self.wire.wait(handle)
        missing = arrival - time.perf_counter()
        if missing > 0:
            time.sleep(missing)
            self.exposed_s += missing
        return received
