"""Two queues that one worker serves as one source: new flows in the first, flows that were answered before in the second.

Each has its socket, its length and its numbers; a flood of new flows fills the first alone. The second is read first.
Implements the worker loop's `PacketSource`, `KernelQueue` and `FlowQueue` (nfq_agent.service.packet_source).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from nfq_agent.answering import Answering
from nfq_agent.counters import Counters
from nfq_agent.host.nfqueue.messages import FlowKey, Run
from nfq_agent.packet import Packet
from nfq_agent.queue.bound import BUDGET
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.verdict import Verdict


class PairedQueue:
    """Both are bound, and stay the caller's. What is read from `known` is counted in `counters` too."""

    # A turn that waits for one of them would not see the other.
    may_wait = False

    def __init__(self, new: WorkerQueue, known: WorkerQueue, counters: Counters) -> None:
        self._new = new
        self._known = known
        self._counters = counters

    @property
    def kernel(self) -> Self:
        """Both are kernel queues."""
        return self

    @property
    def lanes(self) -> tuple[WorkerQueue, ...]:
        """The queues."""
        return self._new, self._known

    @property
    def last(self) -> int:
        """The number of the latest packet that was read from the queue of new flows; 0 before the first."""
        return self._new.last

    @property
    def first_took(self) -> float:
        """No turn waits."""
        return 0.0

    # No turn polls either.
    polled = (0, 0, 0.0)

    @property
    def cut(self) -> int:
        """How many packets of the queue of new flows were cut."""
        return self._new.cut

    @property
    def unanswered(self) -> int:
        """How many packets were answered by policy."""
        return self._new.unanswered + self._known.unanswered

    def start(self, control: int) -> None:
        """Confirm that this process may answer; `wait` also returns when `control` is readable. Raises QueuePermissionError."""
        self._new.start(control)
        self._known.confirm()
        self._new.wake_on(self._known.fileno())

    def be_patient(self, seconds: float) -> None:
        """Nothing: no turn waits."""

    def note_flows(self, table: Answering | None, now: float) -> None:
        """Count packets in this flow table that are judged without it, of both queues; None to count none."""
        self._known.note_flows(table, now)
        self._new.note_flows(table, now)

    def poll_for(self, seconds: float) -> None:
        """Nothing: no turn polls."""

    def wait(self, timeout: float) -> list[int]:
        """Wait until packets or a message on `control` come, at most `timeout` seconds. Returns the readable descriptors."""
        # It answers what was retained for too long.
        if self._known.wait(0.0):
            timeout = 0.0
        return self._new.wait(timeout)

    def drops(self) -> int:
        """Messages that did not fit into the receive buffers since the queues were opened."""
        return self._new.drops() + self._known.drops()

    def finish(self) -> None:
        """Answer by policy the packets that are retained, or were read ahead."""
        self._known.finish()
        self._new.finish()

    def read(self, budget: int = BUDGET) -> list[Packet]:
        """Up to `budget` packets of each; does not wait."""
        packets = self._known.read(budget)
        self._took(len(packets))
        return packets + self._new.read(budget)

    def check(self, packet: Packet, verdict: Verdict) -> None:
        """Raise VerdictError or RewriteError unless this packet can be given this verdict."""
        self._new.check(packet, verdict)

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Send the verdicts of packets just read, in the order of reading. RETAIN keeps a packet for `verdict`."""
        # Each ignores packets that are not its own.
        self._known.answer(answers)
        self._new.answer(answers)

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Send the verdict of one retained packet. Raises VerdictError if it has been answered."""
        (self._known if self._known.owes(packet) else self._new).verdict(packet, verdict)

    # Turns.

    def skim(self, verdict: Verdict, budget: int = BUDGET) -> int:
        """Give up to `budget` waiting packets of each the same verdict. Returns how many."""
        count = self._known.skim(verdict, budget)
        self._took(count)
        return count + self._new.skim(verdict, budget)

    def skim_each(self, verdict: Verdict, budget: int = BUDGET) -> int:
        """`skim`: no turn waits."""
        return self.skim(verdict, budget)

    def sort(
        self,
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
        budget: int = BUDGET,
        each: bool = False,  # noqa: ARG002  # no turn waits
    ) -> tuple[int, list[Run]]:
        """Answer up to `budget` packets of each with verdicts known by five-tuple. Returns how many, and the runs of both."""
        count, runs = self._known.sort(known, decide, budget)
        self._took(count)
        more, others = self._new.sort(known, decide, budget)
        return count + more, runs + others

    def judge(
        self,
        table: Answering,
        ask: Callable[[Packet], Verdict],
        now: float,
        budget: int = BUDGET,
        each: bool = False,  # noqa: ARG002  # no turn waits
    ) -> tuple[int, list[Run], tuple[Packet, Verdict] | None]:
        """Answer up to `budget` packets of each with the verdicts of their flows; see `WorkerQueue.judge`."""
        count, runs, left = self._known.judge(table, ask, now, budget)
        self._took(count)
        if left is not None:
            return count, runs, left
        more, others, left = self._new.judge(table, ask, now, budget)
        return count + more, runs + others, left

    @property
    def must_answer_each(self) -> bool:
        """True while packets of either wait for a verdict of their own."""
        return self._known.must_answer_each or self._new.must_answer_each

    def _took(self, count: int) -> None:
        if count:
            self._counters.known_received += count
            self._counters.known_last_id = self._known.last
