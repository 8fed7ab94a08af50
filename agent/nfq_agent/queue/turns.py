"""A queue as the agent's worker serves it: whole turns of packets, answered without an object for each.

For a supervisor that binds the queue and forks, one after the other, the workers that serve it. Implements the worker loop's
`PacketSource` and `KernelQueue` (nfq_agent.service.packet_source).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Final, Self

from nfq_agent.answering import Answering
from nfq_agent.host.nfqueue.channel import Channel
from nfq_agent.host.nfqueue.messages import FlowKey, Run
from nfq_agent.packet import Packet
from nfq_agent.queue.bound import BUDGET, BoundQueue
from nfq_agent.queue.errors import QueuePermissionError, QueueStateError
from nfq_agent.queue.ledger import Bond
from nfq_agent.queue.settings import QueueSettings
from nfq_agent.verdict import Verdict

# Packets that are answered at once where they are answered as they come: their sender waits for it.
_TOGETHER: Final = 64


class WorkerQueue(BoundQueue):
    """One netfilter queue, served in turns. See `Queue` for the settings."""

    @property
    def kernel(self) -> Self:
        """The queue itself: it is a kernel queue."""
        return self

    # It has turns that wait for packets.
    may_wait = True

    @property
    def lanes(self) -> tuple[WorkerQueue, ...]:
        """Itself alone."""
        return (self,)

    @property
    def last(self) -> int:
        """The number of the latest packet that was read; 0 before the first."""
        return self._ledger.last

    @property
    def first_took(self) -> float:
        """Seconds from when the latest turn that waits took its first packet until that was answered; 0 if it answered none."""
        return self._bound().first_took

    @property
    def polled(self) -> tuple[int, int, float]:
        """How often the turns that wait have polled so far, how often a packet came of it, and the seconds of all."""
        return self._bound().polled

    @property
    def cut(self) -> int:
        """How many packets of many datagrams this process had the kernel cut."""
        return self._opened().cut

    def cut_joined(self) -> None:
        """Have the kernel cut offloaded packets that are not TCP from now on (see `Channel.cut_joined`)."""
        self._bound().cut_joined()

    # Begin, end, and the handover between two workers.

    def start(self, control: int) -> None:
        """Confirm that this process may answer; `wait` also returns when `control` is readable. Raises QueuePermissionError."""
        self.confirm()
        self._poll.register(control, select.POLLIN)

    def wake_on(self, descriptor: int) -> None:
        """`wait` also returns when this is readable."""
        self._poll.register(descriptor, select.POLLIN)

    def confirm(self) -> None:
        """Ask the kernel whether this process may answer packets. Raises QueuePermissionError if not (see `Queue`)."""
        channel = self._bound()
        try:
            self._on_runner(channel.confirm)
        except PermissionError as error:
            raise QueuePermissionError(self.number, "answering packets needs CAP_NET_ADMIN") from error

    def finish(self) -> None:
        """Answer by policy the packets that are retained, or were read ahead."""
        with self._lock:
            self._answer_by_policy(self._ledger.waiting)
            self._ledger.take_read_ahead()

    @property
    def descriptors(self) -> set[int]:
        """The descriptors of the queue's socket."""
        return self._opened().descriptors

    def fix(self) -> tuple[tuple[int, int, int], frozenset[int]]:
        """Send nothing but verdicts of this queue from now on (see `Channel.fix`)."""
        return self._bound().fix()

    def leave_to_child(self) -> None:
        """After a fork: the child serves the queue, and the packets that this process received and did not read."""
        self._opened().forget_pending()

    def adopt(self, descriptor: int, settings: QueueSettings) -> Self:
        """Take over the socket of this queue, which another process has bound, instead of `open` and `bind`.

        settings: those that the kernel has acknowledged. Packets that wait there keep waiting. Raises OSError.
        """
        if self._channel is not None:
            raise QueueStateError(self.number, "it is already open")
        channel = Channel(bound=(descriptor, self.number))
        self._opened_as(channel)
        self.receive_buffer = channel.set_receive_buffer(self._wanted_buffer)
        self._bond = Bond(self)
        self._ledger.begin(self._bond, 0)
        self._settings = settings
        return self

    def leave(self) -> None:
        """Do not unbind the queue when this process ends: another one has its socket. Packets that wait keep waiting."""
        self._opened().keep()

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        """Answer every packet numbered up to `below` that still waits: a process read them and died.

        Only before any packet is retained.
        """
        with self._lock:
            self._refuse_if_held()
            self._bound().answer_up_to(below, verdict)

    # Turns.

    def be_patient(self, seconds: float) -> None:
        """Set how long waiting turns wait for the next packet, in seconds."""
        self._bound().be_patient(seconds)

    def note_flows(self, table: Answering | None, now: float) -> None:
        """Count packets in this flow table that are judged without it; None to count none. now: monotonic seconds."""
        self._bound().note_flows(table, now)

    def poll_for(self, seconds: float) -> None:
        """Set how long turns that wait poll before they sleep, in seconds. A confined worker may change it."""
        self._bound().poll_for(seconds)

    def skim(self, verdict: Verdict, budget: int = BUDGET) -> int:
        """Give up to `budget` waiting packets the same verdict, without looking at them.

        Returns how many. This is the fastest turn.
        """
        try:
            count, first, last = self._begin_turn().skim(budget)
            if count:
                self._answer_runs([(last, count, verdict)], first)
        except BaseException:
            self._ledger.interrupted = True
            raise
        return count

    def skim_each(self, verdict: Verdict, budget: int = BUDGET) -> int:
        """Wait for packets and give each the same verdict as it comes. Returns how many.

        The turn ends when no packet has come for a while (`be_patient`), after `budget` packets, or after 50 milliseconds.
        It is faster than `skim` if few packets arrive at a time.
        """
        try:
            count, first, last = self._begin_turn().skim_each(budget, verdict, self._together())
            if count:
                self._were_answered(first, last)
        except BaseException:
            self._ledger.interrupted = True
            raise
        return count

    def sort(
        self,
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
        budget: int = BUDGET,
        each: bool = False,
    ) -> tuple[int, list[Run]]:
        """Answer up to `budget` packets with verdicts known by five-tuple, hook and interfaces.

        `decide` is asked about packets that are not in `known`, and puts a verdict that may be kept there, under the key that it
        is given. It must not raise; its verdicts change nothing and retain nothing. The turn ends when it was asked 256 times.
        Returns how many packets, and the runs of equal verdicts: number of the last, how many, verdict. each: wait and answer as
        `skim_each` does.
        """
        try:
            count, first, runs = self._begin_turn().sort(budget, known, decide, self._together() if each else 0)
            if count and each:
                self._were_answered(first, runs[-1][0])
            elif count:
                self._answer_runs(runs, first)
        except BaseException:
            # A signal handler raised, for example: the next turn answers the packets of this one.
            self._ledger.interrupted = True
            raise
        return count, runs

    def judge(
        self,
        table: Answering,
        ask: Callable[[Packet], Verdict],
        now: float,
        budget: int = BUDGET,
        each: bool = False,
    ) -> tuple[int, list[Run], tuple[Packet, Verdict] | None]:
        """Answer up to `budget` packets with the verdicts of their flows.

        `ask` is asked about a packet that has to be looked at, settles its flow in `table`, and must not raise. now: seconds, for
        the ages of flows. The turn ends when it was asked 256 times, or where a verdict needs more than a short message: that
        packet is the caller's to answer, as one that `read` returned. Returns how many packets, the runs (number of the
        last, how many, verdict), and that packet with its verdict or None. each: wait and answer as `skim_each` does.
        """
        try:
            count, first, runs, left = self._begin_turn().judge(budget, table, now, ask, self._together() if each else 0)
            if runs and each:
                self._were_answered(first, runs[-1][0])
            elif runs:
                self._answer_runs(runs, first)
            if left is not None:
                if self._ledger.interrupted:
                    self._answer_lost_before(left[0].id)
                self._ledger.took([left[0]])
        except BaseException:
            self._ledger.interrupted = True
            raise
        return count, runs, left

    @property
    def must_answer_each(self) -> bool:
        """True while packets wait for a verdict of their own: `judge` is not to be called then."""
        return self._ledger.must_answer_each and not self._ledger.interrupted

    def _begin_turn(self) -> Channel:
        channel = self._bound()
        if self._ledger.interrupted:
            self._ledger.begin_turn(channel.taken)
        return channel

    def _together(self) -> int:
        """How many may be answered at once: one, where a batch would answer older packets that wait for another verdict."""
        return 1 if self._ledger.must_answer_each else _TOGETHER

    def _were_answered(self, first: int, last: int) -> None:
        if self._ledger.interrupted:
            self._answer_lost_before(first)
        self._ledger.took_and_answered(last)

    def _answer_runs(self, runs: list[Run], first: int) -> None:
        channel = self._bound()
        if self._ledger.interrupted:
            self._answer_lost_before(first)
        with self._lock:
            self._refuse_if_held()
            self._ledger.took_and_answered(runs[-1][0])
            channel.answer_runs(runs)

    def _refuse_if_held(self) -> None:
        if self._ledger.holds:
            raise QueueStateError(self.number, "packets are retained; a batch would answer them too")
