"""Which packets need a verdict: every packet of one bound queue, from the read to its answer. Pure: no socket, no clock, no lock.

The states of a packet and the moves between them are in `MOVES`; nothing else moves a packet. To change it, change the table
first, then the method that makes the move, then the rule of tests/unit/test_ledger.py that drives it. That test fails for a move
that is not in the table, and for a packet that gets no verdict or two. Every state must have a way to ANSWERED.

    READ      taken from the socket; not examined yet
    ASKED     the callback is deciding; one packet at most
    DECIDED   the callback has decided, and the verdict is not sent yet
    HELD      retained: its program answers it later, or the policy does
    ANSWERED  its verdict is sent

A turn that an exception ends (a signal handler may raise anywhere) can lose packets that it had taken from the socket: only their
numbers are known. They are *lost*: `lost` names them in the next turn, and the policy answers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Final

from nfq_agent.packet import Answering, Packet
from nfq_agent.verdict import Action, Verdict, VerdictError


class State(Enum):
    """The states of a packet; see the table."""

    READ = auto()
    ASKED = auto()
    DECIDED = auto()
    HELD = auto()
    ANSWERED = auto()


MOVES: Final[Mapping[State, frozenset[State]]] = {
    # By `ask`; by `hold`, or `answer` with RETAIN; by `answer`, its own methods, or the policy.
    State.READ: frozenset({State.ASKED, State.HELD, State.ANSWERED}),
    # By `decide`, or by `abandon` with the policy's verdict; by its own methods, in the callback.
    State.ASKED: frozenset({State.DECIDED, State.ANSWERED}),
    # By `answer` with RETAIN; by `answer`, or by its own methods in another thread.
    State.DECIDED: frozenset({State.HELD, State.ANSWERED}),
    # By its own methods, or by the policy: too late, too many, or the queue is closed.
    State.HELD: frozenset({State.ANSWERED}),
    State.ANSWERED: frozenset(),
}

# Seconds until the next check for late packets if none is held.
LONGEST_WAIT: Final = 60.0
# Lost packets that are answered at once: a second exception then costs no more than these again.
_LOST_TOGETHER: Final = 64
_NUMBERS: Final = 1 << 32


class Ledger:
    """The packets that one queue has read.

    after: seconds for which a packet may be held. limit: how many may be. Its owner sends what the methods return, and calls
    them under one lock where threads share the queue.
    """

    def __init__(self, after: float, limit: int) -> None:
        self._after = after
        self._limit = limit
        self._owed_to: Answering | None = None
        self._backlog: deque[Packet] = deque()
        self._asking: Packet | None = None
        self._decided: list[tuple[Packet, Verdict]] = []
        # In the order in which they were held, each with the second at which it is late.
        self._held: dict[int, tuple[Packet, float]] = {}
        self.last = 0
        """The number of the latest packet that was read; 0 before the first."""
        # Up to here every packet is answered or in this ledger, unless a turn was interrupted.
        self._accounted = 0
        self.interrupted = False
        """True while there may be lost packets."""

    # Life.

    def begin(self, owed_to: Answering, passed_over: int) -> None:
        """A queue is bound: numbers begin at 1.

        owed_to: what packets answer through. passed_over: the latest number that is lost already; 0 for none.
        """
        self._owed_to = owed_to
        self.last = passed_over
        self._accounted = 0
        self.interrupted = passed_over > 0

    def forget(self) -> None:
        """No packet needs a verdict here any more: the queue is unbound, or belongs to another process."""
        for packet, _ in self._held.values():
            packet._queue = None
        for packet in self._backlog:
            packet._queue = None
        self._held.clear()
        self._backlog.clear()
        self._decided.clear()
        self._asking = None
        self.interrupted = False

    def state(self, packet: Packet) -> State:
        """The state of a packet."""
        if not self.owes(packet):
            return State.ANSWERED
        if packet is self._asking:
            return State.ASKED
        if packet.id in self._held:
            return State.HELD
        if any(other is packet for other, _ in self._decided):
            return State.DECIDED
        return State.READ

    def owes(self, packet: Packet) -> bool:
        """True while the packet needs a verdict from this queue."""
        return packet._queue is not None and packet._queue is self._owed_to

    @property
    def waiting(self) -> list[Packet]:
        """The packets that are held or were read ahead, the ones that the policy has to answer at the end."""
        return [packet for packet, _ in self._held.values()] + list(self._backlog)

    @property
    def read_ahead(self) -> bool:
        """True while packets are read ahead and not examined."""
        return bool(self._backlog)

    @property
    def holds(self) -> bool:
        """True while packets are held."""
        return bool(self._held)

    @property
    def must_answer_each(self) -> bool:
        """True while a batch, which answers every older packet, would answer one that waits for another verdict."""
        return self.interrupted or bool(self._held or self._backlog or self._decided) or self._asking is not None

    # A turn: READ.

    def begin_turn(self, taken: int | None) -> None:
        """A turn begins. taken: the latest number that the turn before took from the socket, if it took any."""
        if not self.interrupted:
            self._accounted = self.last
        elif taken is not None:
            self.last = taken

    def took(self, packets: Sequence[Packet]) -> None:
        """The packets that a read returned, one at least; `lost` comes before."""
        self.last = packets[-1].id
        owed_to = self._owed_to
        for packet in packets:
            packet._queue = owed_to

    def took_and_answered(self, last: int) -> None:
        """A turn took packets up to this number and answered them itself; `lost` comes before."""
        self.last = self._accounted = last

    def lost(self, before: int | None) -> list[int]:
        """The next numbers that an interrupted turn may have lost, for the policy to answer; empty when there are no more.

        before: the first packet of this turn; None if it took none. The kernel ignores a verdict for a packet that has one. To be
        called again after each answer, with the numbers in `answered_lost`.
        """
        if not self.interrupted:
            return []
        end = self.last + 1 if before is None else before
        left = (end - self._accounted - 1) % _NUMBERS
        # Numbers are compared by a difference of 32 bits with a sign.
        if not 0 < left < _NUMBERS >> 1:
            self.last = self._accounted
            self.interrupted = False
            return []
        return [(self._accounted + step) % _NUMBERS for step in range(1, min(left, _LOST_TOGETHER) + 1)]

    def to_policy(self, numbers: Sequence[int]) -> list[int]:
        """Those of the lost that the policy answers: the others are in this ledger."""
        known = {*self._held, *(packet.id for packet in self._backlog), *(packet.id for packet, _ in self._decided)}
        if self._asking is not None:
            known.add(self._asking.id)
        return [number for number in numbers if number not in known]

    def answered_lost(self, numbers: Sequence[int]) -> None:
        """These lost packets are answered."""
        self._accounted = numbers[-1]

    # By callback: READ, ASKED, DECIDED.

    def keep(self, packets: Sequence[Packet]) -> None:
        """Read ahead: these are asked about, or held, one after the other."""
        self._backlog.extend(packets)

    def take_read_ahead(self) -> list[Packet]:
        """What was read ahead, to be answered by `answer`."""
        packets = list(self._backlog)
        self._backlog.clear()
        return packets

    def ask(self) -> Packet | None:
        """The next packet that was read ahead and has no verdict: ASKED. None if there is none."""
        backlog = self._backlog
        while backlog:
            # Until it is decided, the policy is this packet's answer; in this order, whatever comes between.
            packet = self._asking = backlog[0]
            backlog.popleft()
            if packet._queue is not None:
                return packet
        self._asking = None
        return None

    def decide(self, verdict: Verdict) -> None:
        """The verdict of the packet that is asked about: DECIDED. Raises VerdictError if it has one by its own methods."""
        packet = self._asking
        assert packet is not None, "nothing is asked about"
        if packet._queue is None and verdict.action is not Action.RETAIN:
            raise VerdictError(f"packet {packet.id} has its verdict already")
        self._decided.append((packet, verdict))
        self._asking = None

    def abandon(self, policy: Verdict) -> int:
        """The callback did not decide: the packet is DECIDED with the policy's verdict.

        Returns how many packets that is, 0 or 1.
        """
        if self._asking is None:
            return 0
        self._decided.append((self._asking, policy))
        self._asking = None
        return 1

    @property
    def has_decided(self) -> bool:
        """True while decided verdicts are not sent."""
        return bool(self._decided)

    def take_decided(self) -> list[tuple[Packet, Verdict]]:
        """The decided verdicts, to be put into `answer`."""
        decided, self._decided = self._decided, []
        return decided

    def end_run(self) -> None:
        """A run ends. If verdicts are left that it did not send, an exception came between: a batch must not overtake them."""
        if self._decided or self._asking is not None:
            self.interrupted = True

    # By iteration: HELD.

    def hold(self, now: float) -> Packet:
        """The next packet that was read ahead: HELD, unless it has its verdict by its own methods."""
        packet = self._backlog.popleft()
        if packet._queue is not None:
            self._held[packet.id] = packet, now + self._after
        return packet

    # ANSWERED.

    def answer(self, answers: Sequence[tuple[Packet, Verdict]], now: float) -> list[tuple[int, Verdict]]:
        """The verdicts to send, in order: ANSWERED, or HELD for RETAIN. Left out: packets that have been answered by then."""
        given: list[tuple[int, Verdict]] = []
        owed_to = self._owed_to
        for packet, verdict in answers:
            if packet._queue is not owed_to:
                continue
            if verdict.action is Action.RETAIN:
                self._held[packet.id] = packet, now + self._after
                continue
            packet._queue = None
            given.append((packet.id, verdict))
        return given

    def answered(self, packet: Packet) -> None:
        """One packet's verdict is sent: ANSWERED."""
        packet._queue = None
        self._held.pop(packet.id, None)

    def late(self, now: float) -> tuple[list[Packet], float]:
        """The held packets that the policy has to answer, being late or too many; and seconds until there may be more."""
        late: list[Packet] = []
        for number, (packet, deadline) in enumerate(self._held.values()):
            if deadline > now and len(self._held) - number <= self._limit:
                return late, min(deadline - now, LONGEST_WAIT)
            late.append(packet)
        return late, LONGEST_WAIT


class Bond:
    """What a packet answers through. Each bind has its own: numbers begin at 1 again; an old packet must not answer a new one."""

    __slots__ = ("_queue",)

    def __init__(self, queue: Answering) -> None:
        self._queue: Answering | None = queue

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Give the verdict. Raises what `Queue.verdict` does."""
        if self._queue is None:
            raise VerdictError(f"packet {packet.id} waits for no verdict: its queue was unbound, which answered it by policy")
        self._queue.verdict(packet, verdict)

    def end(self) -> None:
        """The queue is unbound."""
        self._queue = None
