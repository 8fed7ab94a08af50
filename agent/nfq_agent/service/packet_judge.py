"""Asks the elements about packets. There is always a verdict, whatever an element does; errors are counted and logged with a
limit.

It sends no verdict and reads no clock. Events wait for `log_pending`, after the verdicts of the turn are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from zlib import crc32

from nfq_agent.answering import Answering
from nfq_agent.checksum import mend
from nfq_agent.compiled import Compiled
from nfq_agent.counters import VERDICT_COUNTERS, Counters
from nfq_agent.element import Emit, Needs
from nfq_agent.element_chain import ElementChain
from nfq_agent.flow import Account, Flow
from nfq_agent.flow_table import FlowTable
from nfq_agent.foresight import APART, Foresight
from nfq_agent.lapsed import LAPSED, keep_lapsed
from nfq_agent.openings import Openings
from nfq_agent.packet import UDP, FiveTuple, Packet, PacketError
from nfq_agent.protocols import http1
from nfq_agent.rate import LimitedEmit
from nfq_agent.repeats import MOST, RepeatBound
from nfq_agent.service.drop_trace import DropTrace
from nfq_agent.service.element_errors import ElementErrors
from nfq_agent.service.flow_watch import FlowWatch
from nfq_agent.service.order import NOTHING_LOST, Order
from nfq_agent.step_chain import Steps
from nfq_agent.verdict import ACCEPT, WOULD_DROP, Action, RewriteError, Verdict, VerdictError

# The environment, set to anything: every packet is shown to the elements, also those that they need not be shown.
EVERY_PACKET: Final = "NFQ_AGENT_EVERY_PACKET"
# A question and its answer.
_EXCHANGE: Final = 2


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings of one queue's worker.

    number: of the queue. default: the verdict if no element answers. on_error: the verdict when an element raises, or a
    packet cannot be decoded. monitor: accept packets that would be dropped, and log that. busy_poll: seconds to poll for
    packets before sleeping, or "auto". lost: what a dead predecessor may have left without a verdict. waits: serve only when
    told to. lingers: without a supervisor continue until no packet comes any more: another supervisor may take over, or the
    rules go. peers: the numbers of all queues among which the kernel spreads the packets of one flow (cpu-fanout), None if it
    does not. drop_lines: the elements that log their own drops; None where the worker logs no dropped flow.
    """

    number: int
    default: Verdict
    on_error: Verdict
    monitor: bool
    busy_poll: float | Literal["auto"] = 0.0
    lost: Order = field(default=NOTHING_LOST)
    waits: bool = False
    lingers: bool = False
    peers: range | None = None
    drop_lines: frozenset[str] | None = None


class PacketJudge:
    """The elements of one worker, and what they need: flows, and the bound on REPEAT.

    check: raises VerdictError or RewriteError if the packet's source cannot give it this verdict. moment: when a packet passed,
    in seconds of the monotonic clock; None where that is the time of its turn.
    """

    def __init__(
        self,
        chain: ElementChain,
        settings: WorkerSettings,
        counters: Counters,
        emit: Emit,
        check: Callable[[Packet, Verdict], None],
        moment: Callable[[Packet], float] | None = None,
    ) -> None:
        self._chain = chain
        self._settings = settings
        self._counters = counters
        self._check = check
        self._moment = moment
        self._flows = FlowTable() if chain.needs is Needs.FLOW else None
        self._memory = chain.context.flows
        if self._flows is not None and self._memory is not None:
            self._flows.lapsed = []
        self._settles = False
        self._foresight: Foresight | None = None
        self._compiled: Compiled | None = None
        # The same, where an element follows flows to their end.
        self._followed = self._flows if chain.follows else None
        if self._followed is not None:
            self._followed.keep_forgotten()
        self._owners: list[Verdict | None] | None = None
        if settings.peers is not None and self._flows is not None:
            own = settings.number
            self._owners = [None if peer == own else Verdict(Action.QUEUE, queue=peer) for peer in settings.peers]
        # Of the packet that is being judged.
        self._flow: Flow | None = None
        self._repeats = RepeatBound()
        self._errors = ElementErrors(counters, emit)
        self._malformed = LimitedEmit(emit)
        self._unsent = LimitedEmit(emit)
        self._loops = LimitedEmit(emit)
        self._drops = None if settings.drop_lines is None else DropTrace(chain, settings.drop_lines, emit, counters.suppress)
        self._pending: list[Callable[[float], bool]] = []
        # The lines of dropped flows.
        self._lines: list[Callable[[], None]] = []
        self.watch: FlowWatch | None = None
        """Set while the flows are watched."""
        self.now = 0.0
        """The time of this turn, in seconds of the monotonic clock."""

    def verdict(self, packet: Packet) -> Verdict:
        """The verdict on a packet."""
        if self._moment is not None:
            self.now = self._moment(packet)
        verdict: Verdict | None = self._ask(packet, self._decide)
        if verdict is None:
            return self._on_error(packet)
        verdict = self._enforced(verdict)
        flow = self._flow
        if verdict is not ACCEPT and self._drops is not None:
            self._trace(self._drops, packet, flow, verdict)
        if self.watch is not None:
            self._ask(packet, self.watch.saw, flow, verdict, self.now)
        # What is asked and answered once, as names are, is over before a packet could profit from it. Unsettled, all is shown.
        if self._settles and flow is not None and (flow.packets > _EXCHANGE or flow.origin.protocol != UDP):
            self._ask(packet, self._settle, verdict)
        if self._followed is not None and flow is not None:
            self._ask(packet, self._chain.follow, flow, verdict, self._followed.account)
        return verdict

    def tend(self) -> None:
        """Tell the elements which flows have ended, and the time."""
        flows = self._followed
        if flows is not None:
            self._errors.call(self._chain.ends(flows.take_forgotten(self.now)), "at the end of a flow")
        self._errors.call(self._chain.ticks(self.now, _unknown if flows is None else flows.account), "when it was told the time")

    def end_flows(self) -> None:
        """Tell the elements that all flows have ended: the worker stops."""
        self.tend()
        if self._followed is not None:
            self._errors.call(self._chain.ends(self._followed.flows(), stopped=True), "at the end of a flow")
        self.log_pending()

    def stop(self) -> None:
        """Stop the elements. What they log then is the last of this worker."""
        self._errors.call(self._chain.stops(), "when it was stopped")
        self.log_pending()
        self._errors.finish()
        self._malformed.finish("packets were malformed")

    def keep_lapsed(self) -> None:
        """Remember where silent connections began that the flow table has forgotten. Part of each turn: the table has little room
        for them.
        """
        if self._flows is not None and self._flows.lapsed:
            keep_lapsed(self._memory, self._flows.lapsed)

    def keep_silent(self) -> None:
        """Remember where the connections began that have said nothing yet, for the next worker. Part of the end of this one."""
        self.keep_lapsed()
        if self._flows is not None and self._memory is not None:
            silent = [flow for flow, _ in self._flows.flows(undecided=True)]
            silent += self._flows.show_openings(self.now, LAPSED, silent=True)
            keep_lapsed(self._memory, [flow for flow in silent if flow.packets > 1][:LAPSED])

    def _settle(self, packet: Packet, verdict: Verdict) -> None:  # noqa: ARG002  # `_ask` gives it
        assert self._flow is not None
        assert self._flows is not None
        self._flows.settle(self._chain.watch(self._flow), self._flow, verdict)

    @property
    def flows(self) -> FlowTable | None:
        """The flows; None where the chain follows none."""
        return self._flows

    def settle_flows(self) -> Answering | None:
        """Let the flows know the verdicts of packets that no element has to be shown. None where every packet is shown."""
        self._settles = False
        if not self._chain.watched or self._flows is None:
            return None
        settings = self._settings
        self._compiled = self._chain.compiled_beside(self._flows, settings.monitor, settings.drop_lines, self._owners is None)
        if self._compiled is None:
            return None
        self._settles = True
        if self._owners is None and (foresight := self._chain.foresight()) is not None:
            self._foresight = foresight
            told = foresight.names, foresight.tell, foresight.questions, foresight.patience
            openings = Openings(foresight.answer, foresight.reads, APART, foresight.memory, foresight.decisions, *told)
            self._flows.judge_openings(openings, foresight.lasting or ACCEPT)
        return self._compiled.steps if self._chain.has_steps else self._flows

    def show_openings(self, most: int) -> list[Flow]:
        """Flows of connections that were accepted by their openings alone, which the elements take over now; `most` at once."""
        if self._flows is None or self._foresight is None or not most:
            return []
        found = self.openings(most)
        try:
            for flow in found:
                self._foresight.adopt(flow)
        except Exception as error:
            self._errors.add(error, "when it took over a connection")
        return found

    def openings(self, most: int) -> list[Flow]:
        """The same flows, which the elements take over with their next packet. What each said is in its `opening`."""
        return [] if self._flows is None else self._flows.show_openings(self.now, most)

    def compile_chain(self) -> Steps | None:
        """The elements as compiled steps, which get packets by `tell`; None where an element has no such form."""
        if self._flows is None:
            self._compiled = self._chain.compiled(self._settings.monitor, self._settings.drop_lines)
        return None if self._compiled is None else self._compiled.steps

    def tell(self, packet: Packet, verdict: Verdict, which: int) -> None:
        """Tell the elements that listen which verdict the packet got. which: a bit for each element, 0 for all."""
        if which and self._compiled is not None:
            flow = None if self._flows is None else self._flows.find(packet.headers.five_tuple)
            self._ask(packet, self._compiled.tell, flow, verdict, which)
        else:
            self.judged(packet, verdict)

    def pure_verdict(self, packet: Packet) -> tuple[Verdict, bool]:
        """The verdict of elements whose answers follow from the five-tuple and the place; and whether it may be remembered."""
        verdict: Verdict | None = self._ask(packet, self._decide_pure)
        if verdict is None:
            return self._on_error(packet), False
        if verdict.action is Action.RETAIN or verdict.payload is not None:
            self._failed(packet, TypeError("an element with pure = True cannot retain or rewrite a packet"))
            return self._settings.on_error, False
        # A REPEAT is asked for each time: the compiled reader would not notice that it loops.
        final = self._enforced(verdict)
        if final is not ACCEPT and self._drops is not None:
            self._trace(self._drops, packet, None, final)
        return final, not self._comes_back(verdict)

    def judged(self, packet: Packet, verdict: Verdict) -> None:
        """Tell the elements that listen which verdict the packet got."""
        self._ask(packet, self._chain.judged, verdict)

    def unsent(self, packet: Packet, error: OSError) -> None:
        """A packet that goes with a verdict could not be sent."""
        what = f"packet {packet.id}: the packet that goes with its verdict could not be sent: {error}"
        self._pending.append(lambda now: self._unsent(now, what, level="warning"))

    def count(self, verdict: Verdict, number: int) -> None:
        """Count packets that got this verdict."""
        counters = self._counters
        name = VERDICT_COUNTERS[verdict.outcome]
        setattr(counters, name, getattr(counters, name) + number)
        if verdict is WOULD_DROP:
            counters.would_drop += number
        if verdict.mark is not None:
            counters.marked += number
        if verdict.payload is not None:
            counters.rewritten += number

    def count_flows(self) -> None:
        """Put the size of the flow table into the counters."""
        if self._flows is not None:
            self._counters.flows = len(self._flows)
            self._counters.flows_evicted = self._flows.evicted

    def count_drops(self, stopping: bool = False) -> None:
        """Log how many dropped flows got no line, now and then."""
        if self._drops is not None:
            self._drops.count_left(self.now, stopping)

    def log_pending(self) -> None:
        """Log the events of this turn."""
        for write in self._lines:
            write()
        self._lines.clear()
        if self._pending:
            self._counters.log_suppressed += sum(not log(self.now) for log in self._pending)
            self._pending.clear()
        self._errors.log(self.now)

    def _decide_pure(self, packet: Packet) -> Verdict:
        verdict = self._chain.decide(packet, None)
        if not isinstance(verdict, Verdict):
            raise VerdictError(f"packet {packet.id}: {verdict!r} is not a verdict; allowed: a Verdict")
        return self._bounded(packet, verdict)

    def _decide(self, packet: Packet) -> Verdict:
        flow: Flow | None = None
        self._flow = None
        if self._flows is not None:
            five_tuple = packet.headers.five_tuple
            # With cpu-fanout the processor chooses the queue: the packets of a flow reach all of them, and its state is in one.
            if self._owners is not None:
                owner = self._owners[_place(five_tuple) % len(self._owners)]
                if owner is not None:
                    return owner
            flow = self._flow = self._flows.observe(five_tuple, self.now, packet.length)
            if self._flows.lapsed:
                keep_lapsed(self._memory, self._flows.lapsed)
            if flow.heard is not None and flow.heard.next is not None:
                # What else a request says that was not shown is not known.
                for fact in http1.BESIDE_HOST & flow.facts.keys():
                    del flow.facts[fact]
            if flow.opening is not None and self._foresight is not None:
                self._foresight.adopt(flow)
        verdict = self._chain.decide(packet, flow)
        if verdict is not ACCEPT:
            self._check(packet, verdict)
            if verdict.payload is not None and not verdict.exact:
                verdict = _mended(packet, verdict, verdict.payload)
            verdict = self._bounded(packet, verdict)
        return verdict

    def _bounded(self, packet: Packet, verdict: Verdict) -> Verdict:
        """The verdict; for one whose packet only comes back, the verdict that it stands for."""
        if not self._comes_back(verdict) or self._repeats.allows(packet, self.now, verdict.payload):
            return verdict
        last = self._settings.on_error if verdict.means is None else Verdict(verdict.means)
        if verdict.mark not in (None, packet.mark):
            # A rule before ours took the mark away. The supervisor sees the count, and names that rule: a worker may not look.
            self._counters.unmarked += 1
            return last
        what = (
            f"packet {packet!r} came back {MOST} times after the verdict {verdict.action.name} and gets the verdict "
            f"{last.action.name} instead"
        )
        self._pending.append(lambda now: self._loops(now, what, level="warning"))
        return last

    def _comes_back(self, verdict: Verdict) -> bool:
        """Whether the packet of this verdict comes to this queue again."""
        return verdict.action is Action.REPEAT or (verdict.action is Action.QUEUE and verdict.queue == self._settings.number)

    def _ask(self, packet: Packet, question: Callable[..., Any], *arguments: Any) -> Any:
        """What the elements answer; None if one of them raises, which is counted and logged."""
        try:
            return question(packet, *arguments)
        except PacketError as error:
            self._counters.malformed += 1
            what = f"packet {packet.id} is malformed: {error}; it gets the verdict on_error"
            self._pending.append(lambda now: self._malformed(now, what, level="warning", packet=packet.id))
        except Exception as error:
            self._failed(packet, error)
        return None

    def _failed(self, packet: Packet, error: Exception) -> None:
        self._errors.add(error, f"on packet {packet.id}", "; it gets the verdict on_error", packet=packet.id)

    def _enforced(self, verdict: Verdict) -> Verdict:
        """The verdict; in monitor mode an accept instead of a drop."""
        return WOULD_DROP if self._settings.monitor and verdict.action is Action.DROP else verdict

    def _on_error(self, packet: Packet) -> Verdict:
        verdict = self._settings.on_error
        if self._drops is not None:
            self._trace(self._drops, packet, self._flow, verdict, failed=True)
        if self._followed is not None and self._flow is not None:
            self._ask(packet, self._chain.follow, self._flow, verdict, self._followed.account, True)
        return verdict

    def _trace(self, drops: DropTrace, packet: Packet, flow: Flow | None, verdict: Verdict, failed: bool = False) -> None:
        """Have a line written about a dropped flow, when the verdicts are sent: the packet may be gone by then."""
        if verdict.outcome is not Action.DROP and verdict is not WOULD_DROP:
            return
        write = self._ask(packet, lambda _: drops.line(packet, flow, verdict, failed, self.now))
        if write is not None:
            self._lines.append(write)


def _place(five_tuple: FiveTuple) -> int:
    """A number that both directions of a flow have in common, in every process."""
    ends = crc32(five_tuple.src) + crc32(five_tuple.dst)
    return ends + (five_tuple.sport or 0) + (five_tuple.dport or 0)


def _mended(packet: Packet, verdict: Verdict, payload: bytes) -> Verdict:
    """The same with correct lengths and checksums. Raises RewriteError where the bytes are not a packet."""
    try:
        return replace(verdict, payload=mend(payload))
    except PacketError as error:
        raise RewriteError(f"packet {packet.id}: the new bytes are not a valid packet: {error}") from error


def _unknown(flow: Flow) -> Account | None:  # noqa: ARG001  # as FlowTable.account
    return None
