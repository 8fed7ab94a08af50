"""`syn-monitor`: one line for each TCP connection that begins, logged after the packet's verdict. It decides nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet, PacketError, address, endpoint, hook_name
from nfq_agent.rate import Rate, RateField, Suppressed, Windows
from nfq_agent.steps import OpeningHeard, Step
from nfq_agent.verdict import Verdict

_FIN_SYN_RST_ACK = 0x17
_SYN = 0x02


class SynMonitorOptions(element.Options):
    """per_source: lines for one source address, no limit if left out. memory: sources, and connections, remembered."""

    per_source: RateField | None = None
    memory: Annotated[int, Field(ge=1, le=10_000_000)] = 16384


class SynMonitor(PacketElement[SynMonitorOptions]):
    """Logs every packet that opens a connection, as iptables' --syn matches it; once, also if it is queued or sent again."""

    limits_itself = True
    facts_read = ()
    needs = Needs.HEADERS
    pure = True
    lasting = True

    def __init__(self, name: str, options: SynMonitorOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._memory = options.memory
        self._rate: Rate | None = options.per_source
        self._sources = None if options.per_source is None else Windows(options.per_source, options.memory)
        self._seen: dict[bytes, None] = {}
        self._suppressed = Suppressed()

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Log the connection, unless its source has reached its limit."""
        try:
            headers = packet.headers
        except PacketError:
            return
        if headers.tcp_flags is None or headers.tcp_flags & _FIN_SYN_RST_ACK != _SYN or headers.transport is None:
            return
        five_tuple = headers.five_tuple
        # Ports and sequence number: a SYN that is sent again has the same (RFC 9293 3.8.1).
        key = five_tuple.src + five_tuple.dst + packet.payload[headers.transport : headers.transport + 8]
        if key in self._seen:
            return
        if len(self._seen) >= self._memory:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None
        now = packet.time
        if count := self._suppressed.due(now):
            self._say_suppressed(count)
        if self._sources is not None and not self._sources.take(five_tuple.src, now):
            self._suppressed.add(now)
            return
        source = endpoint(five_tuple.src, five_tuple.sport)
        destination = endpoint(five_tuple.dst, five_tuple.dport)
        self.emit(
            f"A new tcp connection will be established: {source} -> {destination}",
            src=address(five_tuple.src),
            sport=five_tuple.sport,
            dst=address(five_tuple.dst),
            dport=five_tuple.dport,
            proto="tcp",
            hook=hook_name(packet.hook),
            verdict=verdict.outcome.name.lower(),
        )

    def compiled(self) -> Step:
        """What finds the packets that open connections."""
        return OpeningHeard()

    def stop(self) -> None:
        """Emit the count that was not emitted yet."""
        if count := self._suppressed.take():
            self._say_suppressed(count)

    def _say_suppressed(self, count: int) -> None:
        self.emit(
            f"{self.name}: {count} new connections were not shown: more than {self._rate} from one source",
            level="warning",
            suppressed=count,
        )
