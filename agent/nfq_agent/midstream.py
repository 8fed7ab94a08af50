"""A TCP connection whose beginning was not seen, or is known from memory alone. No I/O, no clock.

Where its messages begin is not known. Each segment of the client is taken for a message if one that has a name begins with it,
in its plain form; else for a part of one, and says nothing. From the first message on it is read as any other.
"""

from __future__ import annotations

from typing import Final

from nfq_agent.conversation import Conversation
from nfq_agent.flow import Flow
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.message_events import Event, Said
from nfq_agent.packet import Packet
from nfq_agent.protocols import MORE, Found, Parser, dns, http1, tls
from nfq_agent.read_bytes import distance

BEGAN_BEFORE: Final = "it began before the first packet that was seen"
# Seconds within which a packet with the verdict REPEAT has come back.
_COMES_BACK: Final = 1.0
# Those whose messages name a host.
_NAMED: Final[tuple[Parser, ...]] = (tls.parse, http1.parse)


class Midstream(Conversation):
    """A conversation that is joined behind its beginning. sure: a message of it was read.

    known: what it said before is known. That holds until a message is whole; else the connection is given up meanwhile.
    """

    __slots__ = ("_all", "_known", "_looking", "sure")

    def __init__(self, from_origin: bool, known: bool, more: tuple[Parser, ...] = ()) -> None:
        """more: parsers for what the ports say besides."""
        self._all = (*more, *_NAMED)
        # No initial number is known: a SYN is another connection's.
        super().__init__(-1, from_origin, self._all)
        self._known = known
        self._looking = True
        self.sure = False
        self.begun = not known
        for side in (True, False):
            # Whether its SYN had a signature was not seen either.
            self.soundness(side).signed = True

    @property
    def awaits_server(self) -> bool:
        """The server's bytes tell no more, until a message was read."""
        return self.sure and super().awaits_server

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun that is not complete."""
        return self._reads and super().unfinished

    def in_order(self, sequence: int, from_client: bool) -> bool:
        """Whether a segment begins at, or before, the byte that its receiver awaits; while that is not known, all do."""
        return not self.sure or super().in_order(sequence, from_client)

    def client(self, sequence: int, data: bytes, now: float) -> list[Said]:
        """A segment of the client."""
        if self.sure:
            return super().client(sequence, data, now)
        if self._looking:
            return self._look(sequence, data, now)
        said = self._take(sequence, data, now)
        # Where what had begun was not a message, this segment may begin one.
        return said if self._reads else said + self._look(sequence, data, now)

    @property
    def _reads(self) -> bool:
        return not self._looking

    def _look(self, sequence: int, data: bytes, now: float) -> list[Said]:
        if not any(_begins(parser, data) for parser in self._all):
            return []
        self._looking = False
        self._next = sequence
        return self._take(sequence, data, now)

    def _take(self, sequence: int, data: bytes, now: float) -> list[Said]:
        said = super().client(sequence, data, now)
        for each in said:
            if each.event is Event.MESSAGE:
                if "conflict" in each.facts:
                    return self._look_again()
                self.sure = True
        return said if self.sure or not self._known else []

    def give_up(self, reason: str, conflict: bool = False) -> list[Said]:
        """Read nothing more; if no message was read yet, these bytes were not one, and the next segment is examined."""
        return super().give_up(reason, conflict) if self.sure else self._look_again()

    def _look_again(self) -> list[Said]:
        self._looking = True
        self.restart(self._all)
        return [] if self._known else [Said(Event.GAVE_UP, {}, BEGAN_BEFORE)]


def resume(flow: Flow, memory: FlowMemory | None) -> Midstream:
    """The conversation of a flow that is joined late. Gives the flow what is known of it, or marks it as midstream."""
    known = None if memory is None else memory.recall(flow.origin)
    if known is not None:
        flow.origin, facts = known
        flow.facts |= facts
    else:
        # The end with the lower port is taken for the server.
        if (flow.origin.sport or 0) < (flow.origin.dport or 0):
            flow.origin = flow.origin.reversed()
        flow.midstream = True
    return Midstream(from_origin=True, known=known is not None, more=_more(flow))


def rejoined(packet: Packet, flow: Flow, connection: Conversation) -> Midstream | None:
    """The conversation of a flow that the kernel kept away, where this segment has bytes behind some that were not seen.

    None where nothing is missing. Tracking has forgotten the flow, as with `conntrack -F`; what it said before is known.
    """
    # A packet of a connection that is not tracked comes back at once, and tells that by its mark.
    if flow.kept is None or flow.last - flow.kept < _COMES_BACK or not packet.data:
        return None
    headers = packet.headers
    at = (headers.transport or 0) + 4
    from_client = (headers.five_tuple == flow.origin) == connection.from_origin
    missing = distance(int.from_bytes(packet.payload[at : at + 4], "big"), connection.awaited) > 0
    if not from_client or not missing or (isinstance(connection, Midstream) and not connection.sure):
        return None
    flow.kept = None
    return Midstream(connection.from_origin, known=True, more=_more(flow))


def _more(flow: Flow) -> tuple[Parser, ...]:
    return () if dns.PORTS.isdisjoint((flow.origin.sport, flow.origin.dport)) else (dns.known,)


def _begins(parser: Parser, data: bytes) -> bool:
    """Whether a message in its plain form begins with these bytes."""
    result = parser(data, b"")
    return result is MORE or (isinstance(result, Found) and "conflict" not in result.facts)
