"""Verdicts that are given later: a heap by time. Pure: the time comes in with every call."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict


class DelayedVerdicts:
    """Packets that are retained until their verdict is due, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        # The packet's number breaks ties: packets have no order.
        self._heap: list[tuple[float, int, Packet, Verdict]] = []

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, packet: Packet, verdict: Verdict, now: float) -> None:
        """Keep a verdict until its delay is over. What it injects is sent without delay, by the caller."""
        heapq.heappush(self._heap, (now + verdict.delay, packet.id, packet, replace(verdict, delay=0.0, inject=())))

    def due(self, until: float) -> Iterator[tuple[Packet, Verdict]]:
        """Take out the verdicts that are due, in order."""
        while self._heap and self._heap[0][0] <= until:
            _, _, packet, verdict = heapq.heappop(self._heap)
            yield packet, verdict

    def wait(self, longest: float, now: float) -> float:
        """Seconds until the next one is due; `longest` at most, 0 at least."""
        if not self._heap:
            return longest
        return min(longest, max(0.0, self._heap[0][0] - now))
