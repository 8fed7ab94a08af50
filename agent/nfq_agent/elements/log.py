"""`log`: one line for each packet that was judged. It decides nothing, and names no port that a packet does not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.elements.interface_names import name_lookup
from nfq_agent.facts import ends, who, words
from nfq_agent.facts import fields as fields_of
from nfq_agent.flow import Flow, Watch
from nfq_agent.interfaces import Interfaces
from nfq_agent.packet import Packet, PacketError, hook_name
from nfq_agent.steps import FlowLines, LineLimit, Step
from nfq_agent.verdict import WOULD_DROP, Action, Verdict

# After how many packets a flow that is accepted gets its line although it has no name yet.
_WAITS: Final = 10


class LogOptions(element.Options):
    """per_second: lines a second on average, 0 for no limit. burst: lines at once, as many as per_second if left out.

    only: "drop" leaves out what is accepted; a drop that monitor mode turned into an accept counts as one. each: a line for each
    packet, or for each flow and verdict.
    """

    only: Literal["all", "drop"] = "all"
    each: Literal["packet", "flow"] = "packet"
    per_second: Annotated[int, Field(ge=0)] = 1000
    burst: Annotated[int, Field(ge=1)] | None = None


class FiveTupleLog(PacketElement[LogOptions]):
    """Emits protocol, addresses, ports, hook and verdict of every packet, within a rate; lines beyond it are counted.

    If an element of the chain identifies flows, the facts of the packet's flow are part of the line. With metadata
    only (`copy = "meta"`) the line holds hook, interfaces and mark.
    """

    needs = Needs.HEADERS
    pure = True
    degrades = True
    facts_read = ()
    limits_itself = True

    def __init__(self, name: str, options: LogOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.needs = self.needs_of(options)
        self._drops_only = options.only == "drop"
        self._by_flow = options.each == "flow"
        self._limit = LineLimit(options.per_second, options.burst or options.per_second, self._drops_only, self._say_suppressed)
        self._interfaces = Interfaces(name_lookup())
        self._degraded = False

    @classmethod
    def logs_drops_of(cls, options: LogOptions) -> Literal["all", "own", "none"]:  # noqa: ARG003  # with any
        """All; lines beyond its rate are counted."""
        return "all"

    @classmethod
    def needs_of(cls, options: LogOptions) -> Needs:
        """The headers; the flow where it gets one line."""
        return Needs.FLOW if options.each == "flow" else Needs.HEADERS

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Log the verdict of a packet."""
        if self._drops_only and verdict.outcome is Action.ACCEPT and verdict is not WOULD_DROP:
            return
        if self._by_flow and flow is not None and not self._is_news(flow, verdict):
            return
        if self._limit.take(packet.time):
            self.tell(packet, flow, verdict)

    def compiled(self) -> Step:
        """The limit; where each flow has a line, it is shown the packets that may have one."""
        return FlowLines(not self._drops_only) if self._by_flow else self._limit

    def watches(self, flow: Flow) -> int:
        """All while a flow waits for its line; a lasting verdict has only one line."""
        return Watch.ALL if self._by_flow and not self._drops_only and self._waits_for_name(flow) else Watch.NOTHING

    def tell(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Write the line of a packet."""
        now = packet.time
        hook = hook_name(packet.hook)
        outcome = _outcome(verdict)
        known = self.context.owners.known(packet)
        facts: Mapping[str, Any] = known if flow is None else {**known, **flow.facts}
        fields: dict[str, Any] = fields_of(facts)
        fields |= {"hook": hook, "verdict": verdict.word, "length": packet.length}
        if verdict is WOULD_DROP:
            fields["would"] = "drop"
        if packet.mark:
            fields["mark"] = f"{packet.mark:#x}"
        if packet.uid is not None:
            fields["uid"] = packet.uid
        if packet.indev:
            fields["indev"] = self._interfaces.name(packet.indev, now)
        if packet.outdev:
            fields["outdev"] = self._interfaces.name(packet.outdev, now)
        if not packet.payload:
            self._judged_meta(hook, outcome, fields)
            return
        try:
            headers = packet.headers
        except PacketError as error:
            self.emit(f"malformed packet: {error}; {hook} {outcome}, {packet.length} bytes", malformed=str(error), **fields)
            return
        five_tuple = headers.five_tuple
        fields |= ends(five_tuple)
        more = ", fragment" if headers.fragment else ""
        reason = facts.get("reason")
        said = (words(facts), who(facts), f"by {reason}" if reason else "")
        more += "".join(f", {each}" for each in said if each)
        self.emit(f"{five_tuple} {hook} {outcome}, {packet.length} bytes{more}", **fields)

    def _is_news(self, flow: Flow, verdict: Verdict) -> bool:
        """Whether the flow has no line with this verdict yet. An accept waits for the flow's name, but not for long."""
        word = _outcome(verdict)
        if word == flow.state.get(self):
            return False
        if word == "accept" and self._waits_for_name(flow):
            return False
        flow.state[self] = word
        return True

    def _waits_for_name(self, flow: Flow) -> bool:
        return flow.undecided and flow.packets < _WAITS

    def stop(self) -> None:
        """Emit the count that was not emitted yet."""
        if count := self._limit.take_held():
            self._say_suppressed(count)

    def _judged_meta(self, hook: str, outcome: str, fields: dict[str, Any]) -> None:
        if not self._degraded:
            self._degraded = True
            self.emit(
                f'{self.name}: degraded: with copy = "meta" the kernel shows neither addresses nor ports; '
                'for those set copy = "packet"',
                level="warning",
            )
        known = [hook]
        if "indev" in fields:
            known.append(f"in {fields['indev']}")
        if "outdev" in fields:
            known.append(f"out {fields['outdev']}")
        known.append(f"mark {fields.get('mark', '0x0')}")
        # The kernel tells the length only when it copies the packet (NFQA_CAP_LEN, net/netfilter/nfnetlink_queue.c).
        size = f", {fields['length']} bytes" if fields["length"] else ""
        self.emit(f"packet {' '.join(known)} {outcome}{size}", **fields)

    def _say_suppressed(self, count: int) -> None:
        self.emit(
            f"{self.name}: {count} packets were judged but not logged: more than {self.options.per_second} a second",
            level="warning",
            suppressed=count,
        )


def _outcome(verdict: Verdict) -> str:
    """The verdict in one or two words: `accept`, `drop`, `queue 7`, `accept mark 0x10`."""
    text = "would drop" if verdict is WOULD_DROP else verdict.word
    if verdict.queue is not None:
        text += f" {verdict.queue}"
    if verdict.mark is not None:
        text += f" mark {verdict.mark:#x}"
    if verdict.payload is not None:
        text += " rewritten"
    return text
