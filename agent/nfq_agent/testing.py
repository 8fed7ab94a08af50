"""For tests of elements: builds packets, runs them through a chain without a kernel, and asserts verdicts.

bench = Bench("my_package.my_module:PortFilter", ports=[23])
bench.assert_dropped(tcp("192.0.2.1:40000", "198.51.100.1:23"))

bench = StreamBench("my_package.my_module:NoSecrets")
bench.assert_closed(bench.request(b"a secret"))
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from nfq_agent.checksum import mend
from nfq_agent.config.lookups import HostLookups
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element, stream_element
from nfq_agent.flow import Flow
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import ICMP, ICMPV6, TCP, UDP, Packet, PacketError
from nfq_agent.stream import Close, Connection, End, Failed, Output, Send, Stream, StreamChain, StreamElement, Way
from nfq_agent.values import Endpoint
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

_TCP_FLAGS: Final = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32, "E": 64, "C": 128}


def _endpoint(text: str) -> tuple[bytes, int]:
    end = Endpoint.parse(text, lowest=0)
    return ipaddress.ip_address(end.host).packed, end.port


def ip_packet(src: bytes, dst: bytes, protocol: int, rest: bytes) -> bytes:
    """An IP packet with right lengths and checksums. src, dst: packed addresses of one family. rest: what follows the header."""
    if len(src) != len(dst):
        raise ValueError("source and destination are of different families")
    if len(src) == 4:
        return mend(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0x4000, 64, protocol, 0, src, dst) + rest)
    return mend(struct.pack("!IHBB16s16s", 6 << 28, 0, protocol, 64, src, dst) + rest)


def tcp(src: str, dst: str, data: bytes = b"", *, flags: str = "PA", seq: int = 1, ack: int = 0, **packet: Any) -> Packet:
    """A TCP packet. src, dst: "ADDRESS:PORT", IPv6 in brackets. flags: letters of FSRPAUEC. The rest as `Packet` takes it."""
    (source, sport), (destination, dport) = _endpoint(src), _endpoint(dst)
    bits = sum(_TCP_FLAGS[letter] for letter in flags)
    header = struct.pack("!HHIIBBHHH", sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, bits, 64240, 0, 0)
    return Packet(ip_packet(source, destination, TCP, header + data), **packet)


def udp(src: str, dst: str, data: bytes = b"", **packet: Any) -> Packet:
    """A UDP packet; the arguments as for `tcp`."""
    (source, sport), (destination, dport) = _endpoint(src), _endpoint(dst)
    # A checksum field that is not zero, or `mend` would assume that none is wanted.
    return Packet(ip_packet(source, destination, UDP, struct.pack("!HHHH", sport, dport, 0, 1) + data), **packet)


def icmp(src: str, dst: str, data: bytes = b"", *, kind: int | None = None, code: int = 0, **packet: Any) -> Packet:
    """An ICMP packet, ICMPv6 between IPv6 addresses. src, dst: addresses. kind: the ICMP type, an echo request by default."""
    source, destination = ipaddress.ip_address(src).packed, ipaddress.ip_address(dst).packed
    protocol, echo = (ICMP, 8) if len(source) == 4 else (ICMPV6, 128)
    header = struct.pack("!BBHHH", echo if kind is None else kind, code, 0, 1, 1)
    return Packet(ip_packet(source, destination, protocol, header + data), **packet)


@dataclass(frozen=True, slots=True)
class LoggedLine:
    """One event that an element emitted."""

    message: str
    level: str
    fields: Mapping[str, Any]


def _into(said: list[LoggedLine]) -> Emit:
    """Keeps events in a list.

    An element that held a method of its bench would keep the bench, and the megabytes of its flow table, until the next garbage
    collection; and that counts objects, not bytes.
    """

    def emit(message: str, level: str = "info", **fields: Any) -> None:
        said.append(LoggedLine(message, level, fields))

    return emit


class Bench:
    """A chain of elements without a kernel.

    element: a class, or a name as the configuration has it; options: the keys of its table. before: elements that stand in
    front of it, each a (class or name, options) pair. queue_default: the queue's own. Packets without a time get `now`,
    in seconds, which begins at 1000.0 and changes only when the test changes it. Options that the element does not take raise
    pydantic's ValidationError, as the file's do.
    """

    def __init__(
        self,
        element: str | type[PacketElement],
        *,
        before: Iterable[tuple[str | type[PacketElement], Mapping[str, Any]]] = (),
        queue_default: str = "accept",
        now: float = 1000.0,
        **options: Any,
    ) -> None:
        self.now = now
        self.said: list[LoggedLine] = []
        self.elements = [self._make(kind, table) for kind, table in (*before, (element, options))]
        self.element = self.elements[-1]
        self.chain = ElementChain(self.elements, {"accept": ACCEPT, "drop": DROP}[queue_default])
        self.flows = FlowTable()
        if self.chain.follows:
            self.flows.keep_forgotten()
        self.chain.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make(self, kind: str | type[PacketElement], options: Mapping[str, Any]) -> PacketElement:
        cls = packet_element(kind) if isinstance(kind, str) else kind
        name = kind if isinstance(kind, str) else kind.__name__
        return cls(name, cls.Options.from_table(options, HostLookups()), _into(self.said))

    @property
    def lines(self) -> list[str]:
        """The messages that were emitted."""
        return [said.message for said in self.said]

    def flow(self, packet: Packet) -> Flow | None:
        """The packet's flow, created if it is new; None if it is not an IP packet. Counts the packet."""
        try:
            return self.flows.observe(packet.headers.five_tuple, packet.time or self.now, packet.length)
        except PacketError:
            return None

    def decide(self, packet: Packet) -> Verdict:
        """The chain's verdict on a packet; the elements that listen get it, as in a worker."""
        packet.time = packet.time or self.now
        flow = self.flow(packet) if self.chain.needs is Needs.FLOW else None
        verdict = self.chain.decide(packet, flow)
        self.chain.judged(packet, verdict)
        if flow is not None and self.chain.follows:
            self.chain.follow(packet, flow, verdict, self.flows.account)
        return verdict

    def wait(self, seconds: float) -> None:
        """Time passes: elements are told, and those that follow flows learn which have ended."""
        self.now += seconds
        if self.chain.follows:
            _call(self.chain.ends(self.flows.take_forgotten(self.now)))
        _call(self.chain.ticks(self.now, self.flows.account))

    def assert_accepted(self, packet: Packet) -> Verdict:
        """Fails unless the packet is accepted, even if delayed or changed."""
        return self._assert(packet, Action.ACCEPT)

    def assert_dropped(self, packet: Packet) -> Verdict:
        """Fails unless the packet is dropped."""
        return self._assert(packet, Action.DROP)

    def _assert(self, packet: Packet, action: Action) -> Verdict:
        verdict = self.decide(packet)
        if verdict.action is not action:
            raise AssertionError(f"{packet!r}: expected {action.name.lower()}, got {verdict}")
        return verdict

    def stop(self) -> None:
        """Stop the elements, as the worker does at its end."""
        if self.chain.follows:
            _call(self.chain.ends(self.flows.flows(), stopped=True))
        self.chain.stop()


def _call(calls: Iterable[tuple[str, Callable[[], None]]]) -> None:
    for _, call in calls:
        call()


@dataclass(frozen=True, slots=True)
class Passed:
    """What one event let through. request, response: the bytes that passed, by direction. ended: the directions whose end passed.

    closed: an element answered CLOSE.
    """

    request: bytes
    response: bytes
    ended: frozenset[Way]
    closed: bool


class StreamBench:
    """One connection through a chain of stream elements, without sockets.

    element: a class, or a name as the configuration has it; options: the keys of its table. behind: elements that stand behind
    it, each a (class or name, options) pair. chunk: the most bytes that an element sees at once. now: seconds; the time begins
    at 1000.0 and passes in `wait` only. What an element raises is raised here. Options that the element does not take raise
    pydantic's ValidationError, as the file's do.
    """

    def __init__(
        self,
        element: str | type[StreamElement],
        *,
        behind: Iterable[tuple[str | type[StreamElement], Mapping[str, Any]]] = (),
        client: str = "192.0.2.1:40000",
        server: str = "198.51.100.1:80",
        chunk: int = 4096,
        now: float = 1000.0,
        **options: Any,
    ) -> None:
        self.now = now
        self.said: list[LoggedLine] = []
        self.elements = [self._make(kind, table) for kind, table in ((element, options), *behind)]
        self.element = self.elements[0]
        to = Endpoint.parse(server)
        source = Endpoint.parse(client)
        self.connection = Connection(
            "bench-1", (source.host, source.port), (to.host, to.port), (to.host, to.port), now, now
        )  # fmt: skip
        chain = StreamChain(self.elements)
        chain.start()
        self._chain = chain
        self._stream = Stream(self.connection, chain, chunk)
        self.opened = self._passed(self._stream.opened())

    def _make(self, kind: str | type[StreamElement], options: Mapping[str, Any]) -> StreamElement:
        cls = stream_element(kind) if isinstance(kind, str) else kind
        name = kind if isinstance(kind, str) else kind.__name__
        return cls(name, cls.Options.model_validate(dict(options), context=HostLookups()), _into(self.said))

    @property
    def lines(self) -> list[str]:
        """The messages that were emitted."""
        return [said.message for said in self.said]

    def request(self, data: bytes) -> Passed:
        """The client sends bytes."""
        self.connection.requested += len(data)
        return self._passed(self._stream.received(Way.REQUEST, data, self.now))

    def response(self, data: bytes) -> Passed:
        """The server sends bytes."""
        self.connection.responded += len(data)
        return self._passed(self._stream.received(Way.RESPONSE, data, self.now))

    def end(self, way: Way) -> Passed:
        """The side that sends that way ends its half."""
        return self._passed(self._stream.ended(way, self.now))

    def wait(self, seconds: float) -> Passed:
        """Time passes; the stream is woken when it asked for it."""
        until = self.now + seconds
        outputs: list[Output] = []
        while (due := self._stream.due) is not None and due <= until and not self._stream.closed:
            self.now = max(self.now, due)
            outputs += self._stream.woken(self.now)
        self.now = until
        return self._passed(outputs + self._stream.woken(until))

    def stop(self, reason: str = "") -> None:
        """The connection has ended, and so has the proxy."""
        self._passed(self._stream.finished(self.now, reason))
        self._chain.stop()

    def assert_passed(self, passed: Passed, data: bytes, way: Way = Way.REQUEST) -> None:
        """Fails unless exactly these bytes passed in that direction."""
        got = passed.request if way is Way.REQUEST else passed.response
        if got != data:
            raise AssertionError(f"expected {data!r} as {way.name.lower()}, got {got!r}")

    def assert_dropped(self, passed: Passed) -> None:
        """Fails unless no byte passed and the connection is still open."""
        if passed.request or passed.response or passed.closed:
            raise AssertionError(f"expected no bytes to pass, got {passed}")

    def assert_closed(self, passed: Passed) -> None:
        """Fails unless an element closed the connection."""
        if not passed.closed:
            raise AssertionError(f"expected the connection to be closed, got {passed}")

    @staticmethod
    def _passed(outputs: Iterable[Output]) -> Passed:
        data = dict.fromkeys(Way, b"")
        ended: set[Way] = set()
        closed = False
        for output in outputs:
            if isinstance(output, Failed):
                raise output.error
            if isinstance(output, Send):
                data[output.way] += output.data
            elif isinstance(output, End):
                ended.add(output.way)
            else:
                closed = closed or isinstance(output, Close)
        return Passed(data[Way.REQUEST], data[Way.RESPONSE], frozenset(ended), closed)
