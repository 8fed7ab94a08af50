"""One queue's worker: packets from the queue, past the elements, verdicts back; turn by turn, until it is told to stop.

It runs in a process of its own, without the right to change a rule. Every packet that it reads gets its verdict, whatever an
element does; what there is to say is said after the verdicts of the turn are on their way.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from socket import MSG_DONTWAIT
from typing import Any, Final
from zlib import crc32

from nfq_agent.checksum import mend
from nfq_agent.counters import VERDICT_COUNTERS, Counters
from nfq_agent.element import ElementChain, Emit, Needs
from nfq_agent.flow import Flow, FlowTable
from nfq_agent.host.child import READY, STOP
from nfq_agent.packet import FiveTuple, Packet, PacketError
from nfq_agent.rate import LimitedEmit
from nfq_agent.repeats import MOST, RepeatBound
from nfq_agent.service.packet_source import Control, KernelQueue, PacketSource
from nfq_agent.service.turn_policy import BUDGET, PATIENCE, TurnPolicy, forgets
from nfq_agent.verdict import ACCEPT, RETAIN, WOULD_DROP, Action, RewriteError, Verdict, VerdictError

# How often the loop looks at what is not a packet, in seconds: the control socket while packets keep coming, the socket's
# drops, a worker's beat while none come.
_LOOK: Final = 0.05
_BEAT: Final = 1.0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings of one queue's worker.

    number: of the queue. default: the verdict if no element answers. on_error: the verdict when an element raises, or a packet
    cannot be decoded. monitor: accept packets that would be dropped, and log that. busy_poll: seconds to poll for packets
    before sleeping. lost_below: the kernel's id sequence, read after the predecessor's death; None if there was none. peers:
    the numbers of all queues among which the kernel spreads the packets of one flow (cpu-fanout), None if it does not.
    """

    number: int
    default: Verdict
    on_error: Verdict
    monitor: bool
    busy_poll: float = 0.0
    lost_below: int | None = None
    peers: range | None = None


# Sends a whole packet; the interface's index is for a destination of link-local scope. Raises OSError.
Inject = Callable[[bytes, int], None]


class WorkerLoop:
    """The loop and its state.

    inject: what sends the packets that a verdict has besides (`Verdict.inject`); without it they are not sent, which is said.
    """

    def __init__(
        self,
        source: PacketSource,
        chain: ElementChain,
        settings: WorkerSettings,
        counters: Counters,
        control: Control,
        emit: Emit,
        inject: Inject | None = None,
    ) -> None:
        self._source = source
        self._kernel = source.kernel
        self._chain = chain
        self._settings = settings
        self._counters = counters
        self._control = control
        self._emit = emit
        self._inject = inject
        self._flows = FlowTable() if chain.needs is Needs.FLOW else None
        self._owners: list[Verdict | None] | None = None
        if settings.peers is not None and self._flows is not None:
            own = settings.number
            self._owners = [None if peer == own else Verdict(Action.QUEUE, queue=peer) for peer in settings.peers]
        self._known: dict[Any, Verdict] = {}
        self._asked = 0
        self._errors = LimitedEmit(emit)
        self._malformed = LimitedEmit(emit)
        self._drops = LimitedEmit(emit)
        self._unsent = LimitedEmit(emit)
        self._loops = LimitedEmit(emit)
        self._repeats = RepeatBound()
        # What is to be said after the verdicts are sent.
        self._later: list[Callable[[float], bool]] = []
        self._delayed: list[tuple[float, int, Packet, Verdict]] = []
        self._now = 0.0
        self._looked = 0.0
        self._counted = 0.0
        self._stopping = False
        self._awaits_first = settings.lost_below is not None
        self._turn = self._choose_turn()
        self._policy = TurnPolicy(self._turn != self._judge, settings.busy_poll)

    def _choose_turn(self) -> Callable[[], int]:
        monitored = self._settings.monitor and self._settings.default.action is Action.DROP
        if self._kernel is None:
            return self._judge
        if len(self._chain) == 0 and not monitored:
            return partial(self._pass_all, self._kernel)
        # A listener has to be shown each packet, so that nothing is saved by knowing the verdict; and whose packet it is, a
        # five-tuple does not tell.
        if self._chain.pure and not self._chain.listens and not self._chain.reads_process:
            return partial(self._look_up, self._kernel)
        return self._judge

    def run(self) -> None:
        """Serve until `stop` is read from `control`, or its other end is gone.

        Raises QueuePermissionError if the kernel does not let this process answer. Whatever else it raises is a fault of ours.
        """
        source, counters = self._source, self._counters
        source.start(self._control.fileno())
        if self._kernel is not None:
            self._kernel.be_patient(PATIENCE, self._settings.busy_poll)
        self._chain.start()
        try:
            self._control.send(READY)
            while not self._stopping:
                self._now = time.monotonic()
                count = self._take_turn()
                if self._policy.sleeps(count):
                    self._wait()
                elif self._now - self._looked > _LOOK:
                    self._look_around(0.0)
                counters.turns += 1
                counters.heartbeat = time.monotonic_ns()
        finally:
            self._release(math.inf)
            source.finish()
            self._count_rare()
            self._chain.stop()

    def _take_turn(self) -> int:
        if self._awaits_first:
            return self._take_over()
        if self._delayed:
            self._release(self._now)
        count = self._turn()
        if self._later:
            suppressed = sum(not say(self._now) for say in self._later)
            self._later.clear()
            self._counters.log_suppressed += suppressed
        return count

    def _wait(self) -> None:
        """Sleep until packets or a control word come; with busy_poll, poll for packets before."""
        if self._policy.polls:
            end = time.monotonic() + self._policy.polls
            while time.monotonic() < end:
                if self._take_turn():
                    return
        self._look_around(_BEAT)

    def _look_around(self, timeout: float) -> None:
        self._looked = self._now
        if self._delayed:
            timeout = min(timeout, max(0.0, self._delayed[0][0] - time.monotonic()))
        if self._control.fileno() in self._source.wait(timeout):
            try:
                said = self._control.recv(4096, MSG_DONTWAIT)
            except BlockingIOError:
                said = b"\n"
            # Nothing at all is the end of the supervisor.
            if not said or STOP in said:
                self._stopping = True
        if self._now - self._counted > _LOOK:
            self._counted = self._now
            self._count_rare()

    def _count_rare(self) -> None:
        counters = self._counters
        counters.enobufs = self._source.drops()
        counters.unanswered = self._source.unanswered
        if self._flows is not None:
            counters.flows = len(self._flows)
            counters.flows_evicted = self._flows.evicted

    # Taking over from a worker that died.

    def _take_over(self) -> int:
        """Answer what the predecessor had taken: all that is older than the first packet found, or, when there is none, all
        that the kernel had numbered when this process was started."""
        source, counters, settings = self._source, self._counters, self._settings
        packets = source.read(1)
        if not packets:
            # A packet gets its number just before it gets into the socket.
            time.sleep(0.001)
            packets = source.read(1)
        assert settings.lost_below is not None
        assert self._kernel is not None
        last = packets[0].id - 1 if packets else settings.lost_below
        self._kernel.answer_lost(last & 0xFFFFFFFF, settings.on_error)
        self._awaits_first = False
        lost = (last - counters.last_id) & 0xFFFFFFFF
        # Beyond half of the number range it lies before, not behind.
        if 0 < lost < 0x80000000:
            counters.lost += lost
            counters.last_id = last
            self._emit(
                f"queue {settings.number}: up to {lost} packets that the worker before had taken got the verdict on_error",
                level="warning",
                lost=lost,
            )
        if packets:
            self._judge_these(packets)
        return len(packets)

    # The three ways of a turn.

    def _pass_all(self, queue: KernelQueue) -> int:
        """No element looks at anything."""
        verdict = self._settings.default
        turn = self._policy.next
        count = queue.skim_each(verdict, turn.budget) if turn.waits else queue.skim(verdict, turn.budget)
        self._policy.ended(turn, count, time.monotonic() - self._now)
        if count:
            self._count(verdict, count)
            self._counters.received += count
            self._counters.last_id = queue.last
        return count

    def _look_up(self, queue: KernelQueue) -> int:
        """Every element promises that its answer follows from the five-tuple and the place."""
        if forgets(len(self._known)):
            self._known.clear()
        self._asked = 0
        turn = self._policy.next
        count, runs = queue.sort(self._known, self._remember, turn.budget, turn.waits)
        self._policy.ended(turn, count, time.monotonic() - self._now)
        if count:
            for _, number, verdict in runs:
                self._count(verdict, number)
            self._counters.received += count
            self._counters.cached += count - self._asked
            self._counters.last_id = queue.last
        return count

    def _remember(self, packet: Packet, key: Any) -> Verdict:
        self._asked += 1
        verdict = self._ask(packet, self._decide_at_once)
        if verdict is None:
            return self._settings.on_error
        if verdict.action is Action.RETAIN or verdict.payload is not None:
            self._failed(packet, TypeError("an element that calls itself pure can't retain or rewrite a packet"))
            return self._settings.on_error
        verdict = self._enforced(packet, verdict)
        # A REPEAT is asked for each time: the compiled reader would not notice that it loops.
        if key is not None and verdict.action is not Action.REPEAT:
            self._known[key] = verdict
        return verdict

    def _judge(self) -> int:
        packets = self._source.read(BUDGET)
        if packets:
            self._judge_these(packets)
        return len(packets)

    def _judge_these(self, packets: list[Packet]) -> None:
        """Show each packet to the elements."""
        answers: list[tuple[Packet, Verdict]] = []
        for packet in packets:
            verdict = self._ask(packet, self._decide)
            answers.append((packet, self._settings.on_error if verdict is None else self._enforced(packet, verdict)))
        self._source.answer([(packet, self._kept_back(packet, v) if v.delay else v) for packet, v in answers])
        for packet, verdict in answers:
            if verdict.inject:
                self._send(packet, verdict.inject)
        listener = self._chain.judged if self._chain.listens else None
        for packet, verdict in answers:
            self._count(verdict, 1)
            if listener is not None:
                self._ask(packet, listener, verdict)
        self._counters.received += len(packets)
        self._counters.last_id = packets[-1].id

    # Packets whose verdict has a delay.

    def _kept_back(self, packet: Packet, verdict: Verdict) -> Verdict:
        """RETAIN, and the verdict later."""
        heapq.heappush(self._delayed, (self._now + verdict.delay, packet.id, packet, replace(verdict, delay=0.0, inject=())))
        return RETAIN

    def _release(self, until: float) -> None:
        """Give the verdicts whose time has come."""
        delayed = self._delayed
        while delayed and delayed[0][0] <= until:
            _, _, packet, verdict = heapq.heappop(delayed)
            # The queue answers by its own policy when too many wait, or too long.
            with contextlib.suppress(VerdictError):
                self._source.verdict(packet, verdict)

    # What all of them share.

    def _decide_at_once(self, packet: Packet) -> Verdict:
        """The verdict on a packet that the queue answers by itself."""
        verdict = self._chain.decide(packet, None)
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is not a verdict; allowed: a Verdict")
        return self._bounded(packet, verdict)

    def _decide(self, packet: Packet) -> Verdict:
        flow: Flow | None = None
        if self._flows is not None:
            five_tuple = packet.headers.five_tuple
            # With cpu-fanout the processor chooses the queue: a flow's packets come to all of them, and its state is in one.
            if self._owners is not None:
                owner = self._owners[_place(five_tuple) % len(self._owners)]
                if owner is not None:
                    return owner
            flow = self._flows.observe(five_tuple, self._now)
        verdict = self._chain.decide(packet, flow)
        if verdict is not ACCEPT:
            self._source.check(packet, verdict)
            if verdict.payload is not None and not verdict.exact:
                verdict = _mended(packet, verdict, verdict.payload)
            verdict = self._bounded(packet, verdict)
        return verdict

    def _bounded(self, packet: Packet, verdict: Verdict) -> Verdict:
        """The verdict, or what a REPEAT stands for where the packet only comes back to us by it."""
        if verdict.action is not Action.REPEAT or self._repeats.allows(packet, self._now):
            return verdict
        last = self._settings.on_error if verdict.means is None else Verdict(verdict.means)
        what = (
            f"packet {packet!r} came back {MOST} times after the verdict REPEAT and gets the verdict {last.action.name} instead"
        )
        if verdict.mark is not None:
            what += (
                f": the mark {verdict.mark:#x} that it was given was gone each time. A rule in front of ours rewrites marks, as "
                "`-j CONNMARK --restore-mark` does; give it a mask that leaves these bits alone. `nfq-agent doctor` names it"
            )
        self._later.append(lambda now: self._loops(now, what, level="warning"))
        return last

    def _ask(self, packet: Packet, question: Callable[..., Any], *arguments: Any) -> Any:
        """What the elements say; None if one of them raises, which is counted and said."""
        try:
            return question(packet, *arguments)
        except PacketError as error:
            self._counters.malformed += 1
            what = f"packet {packet.id} is malformed: {error}; it gets the verdict on_error"
            self._later.append(lambda now: self._malformed(now, what, level="warning", packet=packet.id))
        except Exception as error:
            self._failed(packet, error)
        return None

    def _failed(self, packet: Packet, error: Exception) -> None:
        self._counters.errors += 1
        place = _innermost(error)
        what = f"an element failed on packet {packet.id}: {type(error).__name__}: {error}{place}; it gets the verdict on_error"
        self._later.append(lambda now: self._errors(now, what, level="error", packet=packet.id))

    def _send(self, packet: Packet, others: tuple[bytes, ...]) -> None:
        """Send what goes with a verdict; the verdict itself stands, whatever becomes of them."""
        for other in others:
            try:
                if self._inject is None:
                    raise OSError("there is no raw socket")
                self._inject(other, packet.outdev or packet.indev)
            except OSError as error:
                what = f"packet {packet.id}: the packet that goes with its verdict could not be sent: {error}"
                self._later.append(lambda now, what=what: self._unsent(now, what, level="warning"))  # type: ignore[misc]  # of its own loop turn

    def _enforced(self, packet: Packet, verdict: Verdict) -> Verdict:
        """The verdict, or in monitor mode an accept in the place of a drop."""
        if not self._settings.monitor or verdict.action is not Action.DROP:
            return verdict
        # Written here, since the packet may be gone when it is said.
        what = f"would drop {packet!r}"
        self._later.append(lambda now: self._drops(now, what, packet=packet.id))
        return WOULD_DROP

    def _count(self, verdict: Verdict, number: int) -> None:
        counters = self._counters
        name = VERDICT_COUNTERS[verdict.outcome]
        setattr(counters, name, getattr(counters, name) + number)
        if verdict is WOULD_DROP:
            counters.would_drop += number
        if verdict.mark is not None:
            counters.marked += number
        if verdict.payload is not None:
            counters.rewritten += number


def _place(five_tuple: FiveTuple) -> int:
    """A number that both directions of a flow have in common, in every process."""
    ends = crc32(five_tuple.src) + crc32(five_tuple.dst)
    return ends + (five_tuple.sport or 0) + (five_tuple.dport or 0)


def _mended(packet: Packet, verdict: Verdict, payload: bytes) -> Verdict:
    """The same with lengths and checksums that fit. Raises RewriteError where that can't be done."""
    try:
        return replace(verdict, payload=mend(payload))
    except PacketError as error:
        raise RewriteError(f"packet {packet.id}: the new bytes are no packet that could be mended: {error}") from error


def _innermost(error: Exception) -> str:
    """Where it was raised, as ` (FILE:LINE)`."""
    frame = error.__traceback__
    if frame is None:
        return ""
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})"
