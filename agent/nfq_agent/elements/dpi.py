"""`dpi`: finds out what a flow is and what name it asks for, and puts it into `flow.facts`. It judges nothing.

A flow is "undecided" until its first bytes have said what it is ("decided"), or until they can't any more ("gave-up"): after
8 packets with payload, 16 KiB or 2 seconds, or where the connection began before the first packet that was seen. It never
guesses. docs/dpi.md lists the facts.
"""

from __future__ import annotations

from collections import OrderedDict
from struct import Struct
from typing import Annotated, Any, Final

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.facts import fields, words
from nfq_agent.flow import Flow
from nfq_agent.packet import TCP, UDP, Headers, Packet, PacketError
from nfq_agent.protocols import NO, Found, Parser, dns, quic
from nfq_agent.protocols.known import BY_NAME, PARSERS
from nfq_agent.reassembly import Reassembly
from nfq_agent.verdict import Verdict

PACKETS: Final = 8
BYTES: Final = 16384
SECONDS: Final = 2.0

_FIN: Final = 1
_SYN: Final = 2
_RST: Final = 4
_ACK: Final = 16
_SEQUENCE: Final = Struct("!II")


class DpiOptions(element.Options):
    """openings: flows whose first bytes are kept at one time, at most; each keeps 16 KiB at most. The oldest gives up first.

    log: say what each flow is, once it is decided or given up.
    """

    openings: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    log: bool = False


class _Connection:
    """What is kept of a TCP connection. Once it is decided, only the first four remain in use.

    initial: the client's initial sequence number. from_origin: True where the client sent the flow's first packet.
    answered: a packet of the server was seen. closed: a FIN or RST was seen.
    """

    __slots__ = (
        "answered", "began", "client", "closed", "from_origin", "initial", "packets", "parsers", "renewed", "server",
        "server_first", "used",
    )  # fmt: skip

    def __init__(self, initial: int, from_origin: bool) -> None:
        self.initial = initial
        self.from_origin = from_origin
        self.answered = False
        self.closed = False
        # A SYN with another number, until the server has answered it.
        self.renewed: int | None = None
        self.began: float | None = None
        self.packets = 0
        self.client: Reassembly | None = None
        self.server: Reassembly | None = None
        self.server_first: int | None = None
        self.parsers: tuple[Parser, ...] = PARSERS
        # Bytes of the client that are whole messages: done with as soon as it says more.
        self.used = 0


class _Datagrams:
    """What is kept of a UDP flow that is not decided."""

    __slots__ = ("began", "hello", "packets")

    def __init__(self, began: float) -> None:
        self.began = began
        self.packets = 0
        self.hello: quic.Hello | None = None


class Dpi(PacketElement[DpiOptions]):
    """Identifies the protocol of a flow and the names in its opening. Always leaves the packet to the elements behind."""

    needs = Needs.FLOW
    lasting = True

    def __init__(self, name: str, options: DpiOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._limit = options.openings
        # The flows whose bytes are kept, in the order in which they began, so that ageing looks at the head only.
        self._open: OrderedDict[int, tuple[Flow, _Connection | _Datagrams, float]] = OrderedDict()
        self._log = options.log
        self._said_quic = False
        self._said_cut = False

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """Look at the packet; the answer is always None."""
        if flow is None:
            return None
        # The flow's clock is the worker's; not every packet is stamped.
        if self._open:
            self._age(flow.last)
        try:
            headers = packet.headers
        except PacketError:
            return None
        protocol = headers.five_tuple.protocol
        if not self._said_cut and packet.truncated:
            self._said_cut = True
            self.emit(
                f"{self.name}: packets come cut at {len(packet.payload)} bytes, and a name that is not copied is not found; "
                "leave copy_range out of the queue's table",
                level="warning",
            )
        if protocol == TCP:
            self._tcp(packet, flow, headers)
        elif protocol == UDP:
            if headers.data is not None:
                self._udp(packet, flow, headers)
        elif "dpi" not in flow.facts:
            self._give_up(flow, "neither TCP nor UDP")
        return None

    # TCP

    def _tcp(self, packet: Packet, flow: Flow, headers: Headers) -> None:
        flags = headers.tcp_flags
        if flags is None or headers.transport is None:
            return
        connection: _Connection | None = flow.state.get(self)
        if flags & _SYN:
            connection = self._syn(packet, flow, headers, connection)
            if connection is None:
                return
        elif connection is None:
            if "dpi" not in flow.facts and not flags & _RST:
                self._give_up(flow, "it began before the first packet seen")
            return
        elif connection.renewed is not None and self._renewed(packet, flow, headers, connection):
            connection = flow.state[self]
        if flags & (_FIN | _RST):
            connection.closed = True
        start = headers.data
        if start is None or len(packet.payload) <= start:
            return
        from_client = (headers.five_tuple == flow.origin) == connection.from_origin
        decided = flow.facts["dpi"] != "undecided"
        if decided and connection.client is None and not (from_client and _changing(flow)):
            return
        data = packet.data
        if not data:
            return
        sequence = _SEQUENCE.unpack_from(packet.payload, headers.transport + 4)[0]
        if flags & _SYN:
            # TCP Fast Open: the data follow the SYN's own number (RFC 7413 4.2).
            sequence = sequence + 1 & 0xFFFFFFFF
        if decided and connection.client is None:
            self._again(flow, connection, sequence, data, flow.last)
        else:
            self._payload(flow, connection, from_client, sequence, data, flow.last)

    def _syn(self, packet: Packet, flow: Flow, headers: Headers, connection: _Connection | None) -> _Connection | None:
        """A SYN, or the SYN and ACK that answers it: the beginning of a connection, or a repeated packet."""
        sequence, acknowledged = _SEQUENCE.unpack_from(packet.payload, (headers.transport or 0) + 4)
        from_origin = headers.five_tuple == flow.origin
        answer = bool(headers.tcp_flags and headers.tcp_flags & _ACK)
        initial = acknowledged - 1 & 0xFFFFFFFF if answer else sequence
        if connection is not None and not connection.closed:
            if initial == connection.renewed and answer:
                connection = self._begin(flow, headers, initial, client=False, now=flow.last)
            elif initial != connection.initial:
                # Another connection may begin on the same five-tuple. It has when the server answers; where no server was
                # ever heard, when the client goes on from there.
                if not answer:
                    connection.renewed = initial
                return None
        elif connection is None or initial != connection.initial or not answer:
            connection = self._begin(flow, headers, initial, client=not answer, now=flow.last)
        if answer:
            connection.answered = True
            connection.server_first = sequence + 1 & 0xFFFFFFFF
        elif from_origin == connection.from_origin and headers.data is not None and len(packet.payload) > headers.data:
            return connection
        return None

    def _begin(self, flow: Flow, headers: Headers, initial: int, client: bool, now: float) -> _Connection:
        """A new connection; whatever was known of an earlier one on the same five-tuple is none of its business."""
        if flow.facts or self in flow.state:
            self._close(flow)
            flow.facts.clear()
            flow.state.clear()
            flow.first = now
        connection = _Connection(initial, (headers.five_tuple == flow.origin) == client)
        flow.state[self] = connection
        flow.facts["dpi"] = "undecided"
        flow.undecided = True
        return connection

    def _renewed(self, packet: Packet, flow: Flow, headers: Headers, connection: _Connection) -> bool:
        """Whether the client goes on from a SYN that no server was heard to answer."""
        if connection.answered or (headers.five_tuple == flow.origin) != connection.from_origin:
            return False
        sequence = _SEQUENCE.unpack_from(packet.payload, (headers.transport or 0) + 4)[0]
        initial = connection.renewed
        if initial is None or sequence != initial + 1 & 0xFFFFFFFF:
            return False
        self._begin(flow, headers, initial, client=True, now=flow.last)
        return True

    def _payload(self, flow: Flow, connection: _Connection, from_client: bool, sequence: int, data: bytes, now: float) -> None:
        """Bytes of a connection that is not decided, or not done."""
        if from_client and connection.used and connection.client is not None:
            connection.client.forget(connection.used)
            connection.used = connection.packets = 0
            connection.began = now
            self._open.pop(id(flow), None)
            self._keep(flow, connection, now)
        connection.packets += 1
        if connection.began is None:
            connection.began = now
        elif now - connection.began > SECONDS:
            self._stop(flow, "2 seconds have passed")
            return
        first = connection.initial + 1 & 0xFFFFFFFF
        if from_client and connection.client is None and connection.server is None and sequence == first:
            # Nearly always the first packet says it all, and nothing needs to be kept.
            if len(data) <= BYTES and self._parse(flow, connection, data, b""):
                return
        elif not from_client and connection.server_first is None:
            return
        if connection.client is None:
            connection.client = Reassembly(first, BYTES)
            self._keep(flow, connection, connection.began)
        if from_client:
            side = connection.client
        else:
            if connection.server is None:
                connection.server = Reassembly(connection.server_first or 0, BYTES)
            side = connection.server
        grew = side.add(sequence, data)
        if side.conflict:
            self.emit(
                f"{self.name}: {flow.origin}: segments that overlap differ: nobody knows which of them counts",
                level="warning",
            )
            self._stop(flow, "segments that overlap differ")
            return
        theirs = connection.server.data if connection.server else b""
        if grew and self._parse(flow, connection, connection.client.data, theirs):
            return
        if connection.packets >= PACKETS:
            self._stop(flow, "8 packets with payload did not say it")
        elif side.full or connection.client.held + (connection.server.held if connection.server else 0) > BYTES:
            self._stop(flow, "16 KiB did not say it")

    def _parse(self, flow: Flow, connection: _Connection, client: bytes, server: bytes) -> bool:
        """True where nothing more is to be looked at."""
        remaining: list[Parser] = []
        for parser in connection.parsers:
            result = parser(client, server)
            if result is NO:
                continue
            remaining.append(parser)
            if isinstance(result, Found):
                connection.parsers = (parser,)
                connection.used = result.used
                return self._found(flow, result)
        if not remaining:
            self._stop(flow, "no protocol that is known here")
            return True
        connection.parsers = tuple(remaining)
        return False

    def _found(self, flow: Flow, found: Found) -> bool:
        facts = flow.facts
        if facts["dpi"] == "decided":
            self._changed(flow, found)
        else:
            facts.update(found.facts)
            if "http_host_conflict" in facts:
                self.emit(f"{self.name}: {flow.origin}: one HTTP request names two hosts", level="warning")
            if found.decided:
                self._decided(flow)
        if found.done and found.decided:
            self._close(flow)
            return True
        return False

    def _again(self, flow: Flow, connection: _Connection, sequence: int, data: bytes, now: float) -> None:
        """A later packet of the client in a decided connection: it may ask for another name."""
        parser = BY_NAME[flow.facts["protocol"]].parse
        if parser is None:
            return
        if len(data) > BYTES:
            data = data[:BYTES]
        result = parser(data, b"")
        if result is NO:
            return
        if isinstance(result, Found) and result.decided:
            self._changed(flow, result)
            if not 0 < result.used < len(data):
                return
        # It goes on in the next packets: within the same limits, from here.
        connection.client = Reassembly(sequence, BYTES)
        connection.client.add(sequence, data)
        connection.server = None
        connection.server_first = None
        connection.packets = 1
        connection.used = result.used if isinstance(result, Found) else 0
        connection.began = now
        connection.parsers = (parser,)
        self._keep(flow, connection, now)

    def _changed(self, flow: Flow, found: Found) -> None:
        """Take over what a later packet says, and say it where it is another name than before."""
        if not found.decided:
            return
        facts = flow.facts
        before = dict(facts)
        protocol = BY_NAME[found.facts["protocol"]]
        key = protocol.headline
        # Every DNS query asks for a name of its own: nothing to warn of.
        if protocol.changes and protocol is not dns.PROTOCOL and facts.get(key) != found.facts.get(key):
            self.emit(
                f"{self.name}: {flow.origin}: {key} {found.facts.get(key)} in a later packet, after {facts.get(key)}",
                level="warning",
            )
        for old in protocol.changes:
            facts.pop(old, None)
        facts.update(found.facts)
        if self._log and facts != before:
            self._say(flow)

    # UDP

    def _udp(self, packet: Packet, flow: Flow, headers: Headers) -> None:
        facts = flow.facts
        status = facts.get("dpi")
        five_tuple = headers.five_tuple
        known = five_tuple.dport in dns.PORTS or five_tuple.sport in dns.PORTS or facts.get("protocol") == "dns"
        # Every datagram of DNS is a message of its own: the facts are those of the latest.
        if not known and status not in (None, "undecided"):
            return
        data = packet.data
        if not data:
            if status is None:
                facts["dpi"] = "undecided"
                flow.undecided = True
            return
        result = dns.datagram(data, known)
        if isinstance(result, Found):
            if status == "undecided":
                self._close(flow)
            again = facts.get("dns_name"), facts.get("dns_type")
            facts.update(result.facts)
            facts.pop("dpi_reason", None)
            self._decided(flow, (facts["dns_name"], facts["dns_type"]) != again)
            return
        if status in ("decided", "gave-up"):
            return
        if status is None:
            facts["dpi"] = "undecided"
            flow.undecided = True
        self._datagram(flow, five_tuple == flow.origin, data, flow.last)

    def _datagram(self, flow: Flow, from_origin: bool, data: bytes, now: float) -> None:
        datagrams: _Datagrams | None = flow.state.get(self)
        if datagrams is None:
            datagrams = flow.state[self] = _Datagrams(now)
            self._keep(flow, datagrams, now)
        datagrams.packets += 1
        if now - datagrams.began > SECONDS:
            self._stop(flow, "2 seconds have passed")
            return
        if from_origin and (datagrams.hello is not None or quic.initials(data)):
            hello = datagrams.hello = datagrams.hello or quic.Hello()
            if hello.add(data):
                flow.facts.update(hello.facts)
            if hello.conflict:
                self._stop(flow, "frames that overlap differ")
                return
            if hello.complete:
                self._decided(flow)
                self._close(flow)
                return
            if not quic.AVAILABLE:
                if not self._said_quic:
                    self._said_quic = True
                    self.emit(
                        f"{self.name}: QUIC flows stay without a name: the Python package cryptography is not installed",
                        level="warning",
                    )
                self._stop(flow, "QUIC, and no package cryptography to read it")
                return
        if datagrams.packets >= PACKETS:
            self._stop(flow, "8 packets with payload did not say it")

    # What is kept, and for how long

    def _keep(self, flow: Flow, state: _Connection | _Datagrams, began: float) -> None:
        if len(self._open) >= self._limit:
            _, (oldest, _, _) = next(iter(self._open.items()))
            self._stop(oldest, "too many flows at a time were undecided")
        self._open[id(flow)] = flow, state, began

    def _age(self, now: float) -> None:
        # Two a turn, as in the flow table.
        for _ in range(2):
            if not self._open:
                return
            flow, _, began = next(iter(self._open.values()))
            if now - began <= SECONDS:
                return
            self._stop(flow, "2 seconds have passed")

    def _stop(self, flow: Flow, reason: str) -> None:
        """Look no further at a flow; what is decided stays so."""
        self._close(flow)
        if flow.facts.get("dpi") != "decided":
            self._give_up(flow, reason)

    def _close(self, flow: Flow) -> None:
        """Forget the bytes; of a TCP connection remains how another one on its five-tuple is told from it."""
        self._open.pop(id(flow), None)
        state: Any = flow.state.get(self)
        if isinstance(state, _Connection):
            state.client = state.server = None
        elif state is not None:
            del flow.state[self]

    def _decided(self, flow: Flow, new: bool = True) -> None:
        flow.facts["dpi"] = "decided"
        flow.undecided = False
        if self._log and new:
            self._say(flow)

    def _give_up(self, flow: Flow, reason: str) -> None:
        flow.facts["dpi"] = "gave-up"
        flow.facts["dpi_reason"] = reason
        flow.undecided = False
        if self._log:
            self._say(flow)

    def _say(self, flow: Flow) -> None:
        """One line: what the flow is and the name that it asks for; all facts as fields."""
        what = words(flow.facts) or f"not identified: {flow.facts.get('dpi_reason')}"
        self.emit(f"{flow.origin}: {what}", **fields(flow.facts))


def _changing(flow: Flow) -> bool:
    """Whether a later message of the client may ask for another name."""
    protocol = BY_NAME.get(flow.facts.get("protocol", ""))
    return protocol is not None and bool(protocol.changes)
