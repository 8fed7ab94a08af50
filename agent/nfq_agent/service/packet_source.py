"""The interface of a source of packets for a worker's loop. Types only: a queue, a tap and an inline link each implement it.

One thread uses a source. Every packet that `read` returns gets exactly one verdict, through `answer` or `verdict`; `finish`
answers the packets that still wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from nfq_agent.answering import Answering
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict


class Control(Protocol):
    """The worker's end of the socket to the supervisor: a socket, or what takes descriptors out of it first."""

    def fileno(self) -> int:
        """Readable when the supervisor has sent something."""

    def send(self, data: bytes, /) -> int:
        """Send bytes to the supervisor."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """The bytes that the supervisor has sent; none once it has ended. Raises BlockingIOError."""


class Lane(Protocol):
    """One kernel queue of a source, whose packets a dead predecessor may have read."""

    number: int

    def read(self, budget: int) -> list[Packet]:
        """Up to `budget` waiting packets; does not wait."""

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        """Answer every packet numbered up to `below` that a dead predecessor had read."""


class KernelQueue(Protocol):
    """What only a kernel queue can do: answer packets without making an object of each, and outlive its worker."""

    @property
    def may_wait(self) -> bool:
        """Whether it has turns that wait for packets."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """The queues that it consists of: the one of new flows, or of all; and the one of known flows, if there is one."""

    @property
    def last(self) -> int:
        """The number of the latest packet that was read; 0 before the first."""

    @property
    def first_took(self) -> float:
        """Seconds from when the latest turn that waits took its first packet until that was answered; 0 if it answered none."""

    @property
    def polled(self) -> tuple[int, int, float]:
        """How often the turns that wait have polled so far, how often a packet came of it, and the seconds of all."""

    @property
    def cut(self) -> int:
        """How many packets were cut into datagrams that are read one by one."""

    def be_patient(self, seconds: float) -> None:
        """Set how long waiting turns wait for the next packet, in seconds."""

    def note_flows(self, table: Answering | None, now: float) -> None:
        """Count packets in this flow table that are judged without it; None to count none. now: monotonic seconds."""

    def poll_for(self, seconds: float) -> None:
        """Set how long turns that wait poll before they sleep, in seconds. A confined worker may change it."""

    def skim(self, verdict: Verdict, budget: int) -> int:
        """Give up to `budget` waiting packets the same verdict. Returns how many."""

    def skim_each(self, verdict: Verdict, budget: int) -> int:
        """Wait for packets and answer each as it comes. Returns how many."""

    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[Packet, bytes | None], Verdict],
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]]]:
        """Answer packets with verdicts known by five-tuple, hook and interfaces. Returns how many, and runs of equal verdicts."""


class FlowQueue(Protocol):
    """What only a queue can do that reads by flows: answer packets that no element has to be shown without an object for each."""

    def judge(
        self,
        table: Answering,
        ask: Callable[[Packet], Verdict],
        now: float,
        budget: int,
        each: bool = False,
    ) -> tuple[int, list[tuple[int, int, Verdict]], tuple[Packet, Verdict] | None]:
        """Answer packets with the verdicts of their flows.

        Returns how many, runs of equal verdicts, and a packet with the verdict that it still has to be given.
        """

    @property
    def last(self) -> int:
        """The number of the latest packet that was read; 0 before the first."""

    @property
    def first_took(self) -> float:
        """As in `KernelQueue`."""

    @property
    def must_answer_each(self) -> bool:
        """True while packets wait for a verdict of their own: `judge` is not to be called then."""


class PacketSource(Protocol):
    """Gives packets and takes their verdicts."""

    @property
    def kernel(self) -> KernelQueue | None:
        """The turns without an object for each packet, and the takeover; None if the source has none."""

    @property
    def unanswered(self) -> int:
        """How many packets were answered by policy."""

    def start(self, control: int) -> None:
        """Make sure that verdicts are accepted, and let `wait` return when the descriptor `control` is readable too.

        Raises QueuePermissionError where this process may not answer packets.
        """

    def wait(self, timeout: float) -> list[int]:
        """Wait until packets or a message on `control` come, at most `timeout` seconds. Returns the readable descriptors."""

    def read(self, budget: int) -> list[Packet]:
        """Up to `budget` waiting packets; does not wait."""

    def check(self, packet: Packet, verdict: Verdict) -> None:
        """Raise VerdictError or RewriteError unless this packet can be given this verdict."""

    def answer(self, answers: Sequence[tuple[Packet, Verdict]]) -> None:
        """Send the verdicts of packets just read, in the order of reading. RETAIN keeps a packet for `verdict`."""

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Send the verdict of one retained packet. Raises VerdictError if it has been answered."""

    def finish(self) -> None:
        """Answer the packets that still wait by policy."""

    def drops(self) -> int:
        """Packets that did not fit into the receive buffer so far."""
