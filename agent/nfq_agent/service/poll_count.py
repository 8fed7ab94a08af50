"""What a worker has polled: by the turns of its source, and by the loop where no turn polls. It decides nothing."""

from __future__ import annotations

from nfq_agent.service.auto_poll import Polled
from nfq_agent.service.packet_source import KernelQueue


class PollCount:
    """Counts, for one worker; `take` returns what came since the last call. kernel: the source's turns that poll, if any."""

    def __init__(self, kernel: KernelQueue | None) -> None:
        self._kernel = kernel
        # Of the loop itself.
        self._times = self._found = 0
        self._seconds = 0.0
        self._told = Polled()

    def add(self, found: bool, seconds: float) -> None:
        """The loop has polled once. found: the poll ended with a packet."""
        self._times += 1
        self._found += found
        self._seconds += seconds

    def take(self) -> Polled:
        """What was polled since the last call."""
        times, found, seconds = (0, 0, 0.0) if self._kernel is None else self._kernel.polled
        before, now = self._told, Polled(times + self._times, found + self._found, seconds + self._seconds)
        self._told = now
        return Polled(now.times - before.times, now.found - before.found, now.seconds - before.seconds)
