"""`dpi`: finds the protocol of a flow and the name that it asks for, and puts both into `flow.facts`. It judges nothing.

A flow is "undecided" until its first bytes show what it is ("decided"), or can no longer show it ("gave-up"): after
32 packets with payload, 16 KiB or 10 seconds, or where the connection began before the first packet that was seen. Where the
next message begins it is undecided again. It never guesses. docs/dpi.md lists the facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Annotated, Any, Final

from pydantic import Field

from nfq_agent import element, watched
from nfq_agent.checksum import is_wrong
from nfq_agent.conversation import Conversation
from nfq_agent.datagrams import LONG_HEADER, Datagrams
from nfq_agent.earlier import Earlier
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Exchange, Flow, Watch
from nfq_agent.flow_facts import FlowFacts
from nfq_agent.foresight import Foreseen
from nfq_agent.kept_flows import KeptFlows
from nfq_agent.lapsed import lapsed_connection
from nfq_agent.learning import NameLearner
from nfq_agent.message_events import Event, Said
from nfq_agent.midstream import BEGAN_BEFORE, rejoined, resume
from nfq_agent.packet import TCP, UDP, FiveTuple, Headers, Packet, PacketError
from nfq_agent.protocols import Parser, dns, quic
from nfq_agent.protocols.known import OWNERS, PARSERS
from nfq_agent.soundness import MPTCP, SIGNATURES, refused_syn, tcp_options
from nfq_agent.unshown import Unshown, facts_so_far
from nfq_agent.verdict import Verdict

_FIN: Final = 1
_SYN: Final = 2
_RST: Final = 4
_ACK: Final = 16
_URG: Final = 32
_SEQUENCE: Final = Struct("!II")
# The parsers for a first message over TCP on a port of DNS.
_DNS_PARSERS: Final = (dns.known, *(parser for parser in PARSERS if parser is not dns.parse))


def _parsers(ends: FiveTuple) -> tuple[Parser, ...]:
    """The parsers for the first message of a connection between these ports."""
    return PARSERS if dns.PORTS.isdisjoint((ends.sport, ends.dport)) else _DNS_PARSERS


class DpiOptions(element.Options):
    """openings: flows whose first bytes are kept at one time, at most; each keeps 16 KiB at most. The oldest is given up first.

    log: say what each flow is, once it is decided or given up.
    """

    openings: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    log: bool = False


class Dpi(PacketElement[DpiOptions]):
    """Identifies the protocol of a flow and the names in its messages. Always leaves the packet to the elements behind."""

    needs = Needs.FLOW
    lasting = True
    answers = False
    facts_read = ()
    keeps_facts = (*OWNERS, "protocol", "dpi", "dpi_reason", "conflict", "encrypted")

    def __init__(self, name: str, options: DpiOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._flow_facts = FlowFacts(name, emit, options.log)
        self.kept = KeptFlows(options.openings, self._flow_facts.give_up)
        self._log = options.log
        self._said_quic = False
        self._said_cut = False
        self._learner: NameLearner | None = None

    def start(self) -> None:
        """Learn names from DNS answers if this worker writes to the table of names."""
        names = self.context.names
        if names is not None and names.writes:
            self._learner = NameLearner(names)

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """Look at the packet; the answer is always None."""
        if flow is None:
            return None
        flow.earlier = ()
        flow.ahead = False
        flow.unsound = ""
        # The flow's clock is the worker's; not every packet is stamped.
        if self.kept.open:
            self.kept.age(flow)
        try:
            headers = packet.headers
        except PacketError:
            return None
        if self._learner is not None:
            self._learner.see(packet, flow, headers)
        protocol = headers.five_tuple.protocol
        if not self._said_cut and len(packet.payload) < packet.length:
            self._said_cut = True
            self.emit(
                f"{self.name}: packets come cut at {len(packet.payload)} bytes, and a name beyond that is not found; "
                "leave copy_range out of the queue's table",
                level="warning",
            )
        if protocol == TCP:
            self._tcp(packet, flow, headers)
        elif protocol == UDP:
            if headers.data is not None:
                self._udp(packet, flow, headers)
        elif "dpi" not in flow.facts:
            self._flow_facts.give_up(flow, "neither TCP nor UDP")
        return None

    def watches(self, flow: Flow) -> int:
        """The packets that may still change the facts."""
        state: Conversation | Datagrams | None = flow.state.get(self)
        if self._learner is not None and self._learner.follows(flow):
            return Watch.ALL
        if id(flow) in self.kept.open:
            # It is given up at the first packet of any kind after its time has passed.
            return Watch.ALL
        if isinstance(state, Conversation):
            return watched.of_conversation(state, flow, requests=not self._log)
        if isinstance(state, Datagrams):
            return watched.of_datagrams(state, flow)
        return Watch.NOTHING if flow.facts.get("dpi") == "gave-up" else Watch.ALL

    def parts_read(self) -> tuple[str, ...] | None:
        """No part decides, since it judges nothing; None if it has to be shown the packets, to log them or to learn names."""
        learns = self.context.names is not None and self.context.names.writes
        return None if self._log or learns else ()

    def foresee(self, origin: FiveTuple, facts: Mapping[str, Any]) -> Foreseen:
        """No answer: it judges nothing."""
        return Foreseen(None)

    def adopt(self, flow: Flow) -> None:
        """Continue as if the flow had been shown from its beginning."""
        assert flow.opening is not None
        if isinstance(flow.opening, Exchange):
            datagrams = flow.state[self] = Datagrams.unshown(flow.opening)
            flow.facts |= facts_so_far(flow.opening)
            flow.undecided = not datagrams.decided
            if datagrams.gave_up:
                self._flow_facts.give_up(flow, datagrams.stopped)
            return
        connection = flow.state[self] = Unshown(flow.opening, flow.last)
        flow.facts |= connection.facts
        flow.undecided = flow.facts["dpi"] == "undecided"
        if flow.undecided:
            self.kept.keep_or_not(flow, connection, flow.opening.began)
        self.kept.compare_or_not(flow, connection)

    # TCP

    def _tcp(self, packet: Packet, flow: Flow, headers: Headers) -> None:
        flags, transport = headers.tcp_flags, headers.transport
        if flags is None or transport is None or (connection := self._connection(packet, flow, headers, flags)) is None:
            return
        from_client = (headers.five_tuple == flow.origin) == connection.from_origin
        sequence, acknowledged = _SEQUENCE.unpack_from(packet.payload, transport + 4)
        if flags & _SYN:
            # TCP Fast Open: the data follow the SYN's own number (RFC 7413 4.2).
            sequence = sequence + 1 & 0xFFFFFFFF
        else:
            if self._passes_unread(packet, headers, connection, from_client, sequence):
                return
            in_order = headers.data != transport + 20 and connection.in_order(sequence, from_client)
            if refused := connection.soundness(from_client).refuses(packet, headers, in_order):
                flow.unsound = refused
                return
            if not from_client and connection.compares:
                connection.acknowledged(acknowledged)
                self.kept.compare_or_not(flow, connection)
            if flags & (_FIN | _RST):
                connection.closed = True
            if flags & _RST:
                # Its data is a text about the reason, not part of the stream (RFC 9293 3.5.3).
                return
        if from_client and (connection.mptcp or flags & (_FIN | _URG)) and self._odd(packet, flow, headers, connection, flags):
            return
        if data := packet.data:
            take = connection.client if from_client else connection.server
            if said := take(sequence, data, flow.last):
                self._hear(flow, connection, said)
            else:
                self.kept.keep_or_not(flow, connection)
        if connection.ended and connection.unfinished:
            self._hear(flow, connection, connection.end())

    def _connection(self, packet: Packet, flow: Flow, headers: Headers, flags: int) -> Conversation | None:
        """The connection that a segment belongs to; None where nothing of the segment is read."""
        connection: Conversation | None = flow.state.get(self)
        if flow.heard is not None and connection is not None:
            connection.hear(flow.heard)
            flow.heard = None
            self.kept.compare_or_not(flow, connection)
        if flags & _SYN:
            flow.unsound = refused_syn(packet, headers)
            return None if flow.unsound else self._syn(packet, flow, headers, connection)
        if connection is not None and (later := rejoined(packet, flow, connection)) is not None:
            self.kept.drop(flow)
            connection = flow.state[self] = later
        if connection is None:
            return None if "dpi" in flow.facts or flags & _RST else self._resume(packet, flow, headers)
        if connection.renewed is not None and self._renewed(packet, flow, headers, connection):
            connection = flow.state[self]
        return connection

    def _odd(self, packet: Packet, flow: Flow, headers: Headers, connection: Conversation, flags: int) -> bool:
        """Whether the connection is given up because of the options or flags of a client's segment."""
        if connection.mptcp and not flags & _SYN and MPTCP in tcp_options(packet, headers):
            # Its bytes may come over several connections, and in another order (RFC 8684 3.3).
            self._hear(flow, connection, connection.give_up("MPTCP (the element refuse-mptcp makes it TCP)", conflict=True))
            return True
        if flags & _URG and connection.listens and not connection.searches:
            # The receiver takes urgent bytes out of the stream, where its application does not ask for them (RFC 6093 3.2).
            self._hear(flow, connection, connection.give_up("TCP urgent data", conflict=True))
            return True
        if flags & _FIN:
            connection.ended = True
        return False

    def _passes_unread(
        self, packet: Packet, headers: Headers, connection: Conversation, from_client: bool, sequence: int
    ) -> bool:
        """Whether a segment other than a SYN need not be read."""
        flags = headers.tcp_flags or 0
        has_data = headers.data is not None and headers.data < (headers.length or len(packet.payload))
        if connection.mptcp and from_client and connection.listens:
            return False
        if from_client:
            read = connection.listens or (has_data and connection.contests(sequence))
        else:
            read = connection.awaits_server or connection.compares
        return not flags & (_FIN | _RST) and not (read and (has_data or flags & _URG or not from_client))

    def _syn(self, packet: Packet, flow: Flow, headers: Headers, connection: Conversation | None) -> Conversation | None:
        """A SYN, or the SYN and ACK that answers it: the beginning of a connection, or a repeated packet."""
        sequence, acknowledged = _SEQUENCE.unpack_from(packet.payload, (headers.transport or 0) + 4)
        from_origin = headers.five_tuple == flow.origin
        answer = bool(headers.tcp_flags and headers.tcp_flags & _ACK)
        initial = acknowledged - 1 & 0xFFFFFFFF if answer else sequence
        if connection is not None and not (connection.closed or flow.kept is not None):
            if initial == connection.renewed and answer:
                connection = self._begin(flow, headers, initial, client=False, now=flow.last)
            elif initial != connection.initial:
                # Another connection may begin on the same five-tuple. It has begun when the server answers; if no server was
                # ever seen, when the client continues from there.
                if not answer:
                    connection.renewed = initial
                # The known facts may be those of the previous connection: no verdict on them may last.
                flow.undecided = True
                return None
        elif connection is None or initial != connection.initial or not answer:
            connection = self._begin(flow, headers, initial, client=not answer, now=flow.last)
        if answer:
            connection.answered = True
            connection.server_first = sequence + 1 & 0xFFFFFFFF
            connection.mptcp = connection.mptcp or MPTCP in tcp_options(packet, headers)
        elif from_origin == connection.from_origin:
            options = tcp_options(packet, headers)
            connection.mptcp = MPTCP in options
            if not SIGNATURES.isdisjoint(options):
                for side in (True, False):
                    connection.soundness(side).signed = True
            if headers.data is not None and len(packet.payload) > headers.data:
                return connection
        return None

    def _begin(self, flow: Flow, headers: Headers, initial: int, client: bool, now: float) -> Conversation:
        """A new connection; facts of an earlier one on the same five-tuple do not apply to it."""
        earlier: Earlier | None = None
        if flow.facts or self in flow.state:
            before: Conversation | None = flow.state.get(self)
            if before is not None and before.initial >= 0:
                earlier = (before.earlier or Earlier((), initial)).and_then(before.initial + 1, before.awaited, initial)
            self.kept.drop(flow)
            flow.facts.clear()
            flow.state.clear()
            flow.first = now
        connection = Conversation(initial, (headers.five_tuple == flow.origin) == client, _parsers(flow.origin), earlier)
        if self.context.flows is not None:
            self.context.flows.forget(flow.origin)
        flow.midstream, flow.kept = False, None
        flow.message = 0
        flow.origin_is_client = connection.from_origin
        flow.state[self] = connection
        flow.facts["dpi"] = "undecided"
        flow.undecided = True
        return connection

    def _resume(self, packet: Packet, flow: Flow, headers: Headers) -> Conversation:
        """A connection whose beginning this worker did not see, or has forgotten."""
        memory = self.context.flows
        numbers = _SEQUENCE.unpack_from(packet.payload, (headers.transport or 0) + 4)
        connection = lapsed_connection(flow, memory, _parsers(flow.origin), *numbers) or resume(flow, memory)
        flow.state[self] = connection
        flow.origin_is_client = connection.from_origin
        if flow.midstream:
            self._flow_facts.give_up(flow, BEGAN_BEFORE)
        return connection

    def _renewed(self, packet: Packet, flow: Flow, headers: Headers, connection: Conversation) -> bool:
        """Whether the client continues from a later SYN, to which no answer of a server was seen."""
        if connection.answered or (headers.five_tuple == flow.origin) != connection.from_origin:
            return False
        sequence = _SEQUENCE.unpack_from(packet.payload, (headers.transport or 0) + 4)[0]
        initial = connection.renewed
        if initial is None or sequence != initial + 1 & 0xFFFFFFFF or is_wrong(packet):
            return False
        self._begin(flow, headers, initial, client=True, now=flow.last)
        return True

    def _hear(self, flow: Flow, connection: Conversation, said: list[Said]) -> None:
        """Apply the events of a segment to the flow."""
        first = True
        for event, facts, reason, conflict in said:
            if event is Event.AHEAD:
                flow.ahead = True
                continue
            if event is Event.DIFFERS and flow.facts.get("conflict") == reason:
                # Already known: the segment is a retransmission.
                continue
            if event is Event.ADDED:
                flow.facts |= {name: value for name, value in facts.items() if name not in flow.facts}
                continue
            if not connection.begun:
                self._flow_facts.next_message(flow, first)
            first = False
            connection.begun = event is Event.PART
            if event is Event.MESSAGE:
                self._flow_facts.whole(flow, facts)
                flow.midstream = flow.midstream and self.context.midstream == "drop"
            elif event is Event.PART:
                self._flow_facts.part(flow, facts)
            elif event is Event.DIFFERS:
                # It may be another message than the one that was read, and of another protocol.
                self._flow_facts.forget_message(flow)
                self._flow_facts.give_up(flow, reason, conflict)
            else:
                self._flow_facts.give_up(flow, reason, conflict)
        self.kept.keep_or_not(flow, connection)
        self.kept.compare_or_not(flow, connection)

    # UDP

    def _udp(self, packet: Packet, flow: Flow, headers: Headers) -> None:
        five_tuple = headers.five_tuple
        datagrams: Datagrams | None = flow.state.get(self)
        if datagrams is None:
            datagrams = flow.state[self] = Datagrams()
            if "dpi" not in flow.facts:
                flow.facts["dpi"] = "undecided"
                flow.undecided = True
        data = packet.data
        if not data:
            return
        if (not datagrams.decided or data[0] >= LONG_HEADER) and is_wrong(packet):
            flow.unsound = "a wrong checksum"
            return
        if packet.gso:
            # The boundaries of the datagrams are not known.
            self._flow_facts.forget_message(flow)
            datagrams.begun = False
            self._flow_facts.give_up(flow, "UDP datagrams that are joined (gso = true)", conflict=True)
            return
        from_origin = five_tuple == flow.origin
        known = five_tuple.dport in dns.PORTS or five_tuple.sport in dns.PORTS or flow.facts.get("protocol") == "dns"
        said = datagrams.take(data, from_origin, known, flow.last)
        first = True
        for event, facts, reason, conflict in said:
            if event is Event.AHEAD:
                flow.ahead = True
                continue
            if not datagrams.begun:
                self._flow_facts.next_message(flow, first)
            first = False
            datagrams.begun = event is Event.PART
            if event is Event.MESSAGE:
                before = flow.facts.get("dns_name"), flow.facts.get("dns_type")
                self._flow_facts.whole(
                    flow, facts, new=(facts.get("dns_name"), facts.get("dns_type")) != before or before[0] is None
                )
            elif event is Event.PART:
                self._flow_facts.part(flow, facts)
            else:
                if reason == quic.NO_CRYPTOGRAPHY and not self._said_quic:
                    self._said_quic = True
                    self.emit(
                        f"{self.name}: QUIC flows stay without a name: the Python package cryptography is not installed",
                        level="warning",
                    )
                self._flow_facts.give_up(flow, reason, conflict)
        self.kept.keep_or_not(flow, datagrams)
