"""`log`: one line for each packet that was judged. It decides nothing, and names no port that a packet does not show."""

from __future__ import annotations

import socket
from typing import Annotated, Any

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.facts import fields as fields_of
from nfq_agent.facts import words
from nfq_agent.flow import Flow
from nfq_agent.interfaces import Interfaces
from nfq_agent.packet import Packet, PacketError, address, hook_name, protocol_name
from nfq_agent.rate import Bucket, Suppressed
from nfq_agent.verdict import Verdict


class LogOptions(element.Options):
    """per_second: lines a second on average, 0 for no limit. burst: lines at once, as many as per_second if left out."""

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

    def __init__(self, name: str, options: LogOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._limited = options.per_second > 0
        self._bucket = Bucket(options.per_second, options.burst or options.per_second, 0.0)
        self._suppressed = Suppressed()
        self._interfaces = Interfaces(socket.if_indextoname)
        self._degraded = False

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Log the verdict of a packet."""
        now = packet.time
        if self._limited and not self._bucket.take(now):
            self._suppressed.add(now)
            if count := self._suppressed.due(now):
                self._say_suppressed(count)
            return
        if count := self._suppressed.due(now):
            self._say_suppressed(count)
        hook = hook_name(packet.hook)
        outcome = _outcome(verdict)
        fields: dict[str, Any] = fields_of(flow.facts) if flow is not None else {}
        fields |= {"hook": hook, "verdict": verdict.word, "length": packet.length}
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
        fields["proto"] = protocol_name(five_tuple.protocol)
        fields["src"] = address(five_tuple.src)
        fields["dst"] = address(five_tuple.dst)
        if five_tuple.sport is not None:
            fields["sport"] = five_tuple.sport
            fields["dport"] = five_tuple.dport
        more = ", fragment" if headers.fragment else ""
        if flow is not None and (known := words(flow.facts)):
            more += f", {known}"
        self.emit(f"{five_tuple} {hook} {outcome}, {packet.length} bytes{more}", **fields)

    def stop(self) -> None:
        """Emit the count that was not emitted yet."""
        if count := self._suppressed.take():
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
    """The verdict in a word or two: `accept`, `drop`, `queue 7`, `accept mark 0x10`."""
    text = verdict.word
    if verdict.queue is not None:
        text += f" {verdict.queue}"
    if verdict.mark is not None:
        text += f" mark {verdict.mark:#x}"
    if verdict.payload is not None:
        text += " rewritten"
    return text
