"""A bound queue, turn by turn: read packets, answer them. `ledger` knows which are owed a verdict; this holds lock and socket."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Final

from nfq_agent.host.nfqueue import messages
from nfq_agent.host.nfqueue.messages import Run
from nfq_agent.packet import Packet
from nfq_agent.queue.binding import Binding
from nfq_agent.queue.ledger import LONGEST_WAIT
from nfq_agent.verdict import Action, RewriteError, Verdict, VerdictError

# Packets a turn: enough to share the cost of a system call, few enough that no packet waits long for its verdict.
BUDGET: Final = 256


class BoundQueue(Binding):
    """One netfilter queue, turn by turn: `read` packets, `answer` them."""

    def read(self, budget: int = BUDGET) -> list[Packet]:
        """Take at most `budget` packets that wait; does not wait for any. Each must be put into `answer`, or answered itself."""
        channel, ledger = self._bound(), self._ledger
        if ledger.read_ahead:
            return ledger.take_read_ahead()
        ledger.begin_turn(channel.taken)
        try:
            packets = channel.read(budget)
            if ledger.interrupted:
                self._answer_lost_before(packets[0].id if packets else None)
            if packets:
                ledger.took(packets)
        except BaseException:
            ledger.interrupted = True
            raise
        return packets

    def _answer_lost_before(self, first: int | None) -> None:
        """Answer by policy the packets that an interrupted turn lost. first: packet of this turn; None if it took none."""
        ledger = self._ledger
        while numbers := ledger.lost(first):
            with self._lock:
                self._bound().answer_each([(number, self._on_unanswered) for number in ledger.to_policy(numbers)])
                ledger.answered_lost(numbers)

    def _answer_by_policy(self, packets: Sequence[Packet]) -> None:
        # Counted before the packets can be observed to have passed.
        self.unanswered += len(packets)
        self._bound().answer_each([(packet.id, self._on_unanswered) for packet in packets])
        for packet in packets:
            self._ledger.answered(packet)

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Send the verdicts of packets that were just read, in the order of reading; RETAIN keeps one for later.

        All of them must have passed `check`.
        """
        channel = self._bound()
        with self._lock:
            given = self._ledger.answer(answers, time.monotonic())
            # A batch answers everything up to its number: not while an older packet waits.
            if len(given) < 2 or self._ledger.must_answer_each:
                channel.answer_each(given)
            else:
                channel.answer_runs(_runs(given))

    def check(self, packet: Packet, verdict: object) -> None:
        """Raise VerdictError or RewriteError unless this packet can get this verdict."""
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is not a Verdict; allowed: a Verdict, or RETAIN to answer later")
        if verdict.payload is None:
            return
        if not 0 < len(verdict.payload) <= messages.MAX_PAYLOAD:
            raise RewriteError(
                f"packet {packet.id}: {len(verdict.payload)} bytes; allowed: 1 to {messages.MAX_PAYLOAD}, what a message holds"
            )
        if packet.truncated:
            raise RewriteError(
                f"packet {packet.id}: {len(packet.payload)} of its {packet.length} bytes were copied; set a larger copy_range"
            )
        if packet.gso:
            raise RewriteError(f"packet {packet.id} is offloaded and not cut into segments yet; rewriting needs gso=False")

    def owes(self, packet: Packet) -> bool:
        """Whether the packet needs a verdict of this queue."""
        return self._ledger.owes(packet)

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Send one packet's verdict now, from any thread. Raises VerdictError, RewriteError, QueueStateError."""
        if self._ledger.has_decided and self._runner == threading.get_ident():
            # In a callback: those that it decided before come before.
            self.answer(self._ledger.take_decided())
        with self._lock:
            channel = self._bound()
            self.check(packet, verdict)
            check_immediate(packet, verdict)
            if not self._ledger.owes(packet):
                # Another thread has answered it.
                raise VerdictError(f"packet {packet.id} has its verdict already")
            if verdict.action is Action.RETAIN:
                return
            channel.answer(packet.id, verdict)
            self._ledger.answered(packet)

    def wait(self, timeout: float | None = None) -> list[int]:
        """Wait until packets come, `stop` is called or `timeout` seconds have passed. Returns the readable descriptors.

        Also answers by policy the packets that were retained for too long.
        """
        channel = self._bound()
        if channel.pending or self._ledger.read_ahead:
            return [channel.fileno()]
        limit = self._answer_late()
        if timeout is not None:
            limit = min(limit, timeout)
        ready = [descriptor for descriptor, _ in self._poll.poll(limit * 1000)]
        if self._wake in ready:
            ready.remove(self._wake)
            self._woken()
        return ready

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def drops(self) -> int:
        """Messages that did not fit into the receive buffer since the queue was opened."""
        return self._bound().drops()

    def _answer_late(self) -> float:
        """Answer by policy the packets that were held for too long, or are too many; seconds until there may be more."""
        if not self._ledger.holds:
            return LONGEST_WAIT
        with self._lock:
            late, left = self._ledger.late(time.monotonic())
            self._answer_by_policy(late)
        return left


def check_immediate(packet: Packet, verdict: Verdict) -> None:
    """Raise VerdictError for a verdict that is delayed or injects packets."""
    if verdict.delay or verdict.inject:
        raise VerdictError(
            f"packet {packet.id}: only the agent's worker delays verdicts and injects packets; retain the packet instead"
        )


def _runs(answers: Sequence[tuple[int, Verdict]]) -> list[Run]:
    """Join neighbours that one message can answer: the same verdict, without a payload."""
    runs: list[Run] = []
    last, current = answers[0]
    count = 0
    for identity, verdict in answers:
        if verdict is not current and (verdict != current or verdict.payload is not None):
            runs.append((last, count, current))
            current, count = verdict, 0
        elif count and verdict.payload is not None:
            runs.append((last, count, current))
            count = 0
        last = identity
        count += 1
    runs.append((last, count, current))
    return runs
