"""What tap and inline link share as sources of packets (see `PacketSource`): interfaces, counts, and the turns of a queue."""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from nfq_agent.answering import Answering
from nfq_agent.capture.following import Table
from nfq_agent.packet import Hook, Packet
from nfq_agent.verdict import RewriteError, Verdict, VerdictError

# The longest time that a turn waits for packets, in seconds: counters and control words wait no longer.
LONGEST_WAIT: Final = 0.1


@dataclass(slots=True, eq=False)
class Taken:
    """One interface that a source takes packets from, and the row in which it is counted."""

    index: int
    row: int


I = TypeVar("I", bound=Taken)  # noqa: E741  # an interface


class InterfaceSource(ABC, Generic[I]):
    """Packets of interfaces that come and go.

    where: ends the message of a packet that cannot be rewritten.
    """

    where: ClassVar[str]

    def __init__(self, table: Table) -> None:
        """table: counts by interface."""
        self._table = table
        self._taken: dict[int, I] = {}
        self._poll = select.epoll()
        self._last = 0
        self._lost = 0
        self.unanswered = 0

    # The interfaces.

    @abstractmethod
    def add(self, *arguments: Any) -> None:
        """Take packets from one more interface: its descriptors, then the words of the supervisor's line."""

    def gone(self, index: str) -> None:
        """Release an interface: it is gone, or no longer chosen."""
        taken = self._taken.pop(int(index), None)
        if taken is not None:
            self._release(taken)

    @abstractmethod
    def _release(self, taken: I) -> None:
        """Close what belongs to an interface, now or once its last packets are read."""

    def _count(self, interface: int, column: str, number: int) -> None:
        """Count at an interface; one that is gone has no row any more."""
        taken = self._taken.get(interface)
        if taken is not None:
            self._table.add(taken.row, column, number)

    # Called by the worker's loop.

    @property
    def kernel(self) -> Self:
        """The turns without an object for each packet: this source has them too."""
        return self

    # It has turns that wait; and the packets of a dead worker are lost with it.
    may_wait = True
    lanes = ()
    # Not measured.
    first_took = 0.0
    # It does not poll.
    polled = (0, 0, 0.0)

    @property
    def last(self) -> int:
        """The number of the latest packet that was read."""
        return self._last

    @property
    def cut(self) -> int:
        """None: a frame of many datagrams is read as it is."""
        return 0

    def start(self, control: int) -> None:
        """Let `wait` return for this descriptor too."""
        self._poll.register(control, select.EPOLLIN)

    @abstractmethod
    def wait(self, timeout: float) -> list[int]:
        """Wait for packets or the control descriptor. Returns the readable descriptors."""

    @abstractmethod
    def read(self, budget: int) -> list[Packet]:
        """Up to `budget` packets."""

    def check(self, packet: Packet, verdict: object) -> None:
        """Raise VerdictError unless it is a verdict, RewriteError for new bytes."""
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is not a verdict; allowed: a Verdict")
        if verdict.payload is not None:
            raise RewriteError(f"packet {packet.id} {self.where}; it cannot be rewritten")

    # The turns without an object for each packet (see `KernelQueue`).

    def be_patient(self, seconds: float) -> None:
        """Nothing to set: a wait lasts LONGEST_WAIT at most."""

    def poll_for(self, seconds: float) -> None:
        """Nothing to set: it does not poll."""

    def note_flows(self, table: Answering | None, now: float) -> None:
        """Nothing to count: a frame that is not looked at is not read either."""

    @abstractmethod
    def skim(self, verdict: Verdict, budget: int) -> int:
        """Give up to `budget` packets the same verdict. Returns how many."""

    def skim_each(self, verdict: Verdict, budget: int) -> int:
        """Wait for packets, and give them the verdict. Returns how many."""
        self._wait_for_packets()
        return self.skim(verdict, budget)

    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[Packet, bytes | None], Verdict],
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        """Look up the verdicts of up to `budget` packets. Returns how many, and runs of equal verdicts (`KernelQueue.sort`)."""
        if each:
            self._wait_for_packets()
        return self._sort(known, decide, budget)

    @abstractmethod
    def _sort(
        self, known: dict[bytes, Verdict], decide: Callable[[Packet, bytes | None], Verdict], budget: int
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        """`sort` without the wait."""

    def _wait_for_packets(self) -> None:
        self.wait(LONGEST_WAIT)


def packet_of(payload: bytes, interface: int, *, outgoing: bool, **shown: Any) -> Packet:
    """A packet of an interface. outgoing: it leaves the host there. shown: what else `Packet` is given."""
    return Packet(
        payload,
        hook=Hook.POSTROUTING if outgoing else Hook.PREROUTING,
        indev=0 if outgoing else interface,
        outdev=interface if outgoing else 0,
        **shown,
    )
