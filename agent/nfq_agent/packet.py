"""The packet as the queue delivers it, and the decoder of its headers. Raises PacketError only; never invents a port."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from socket import AF_INET, AF_INET6, inet_ntop
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from nfq_agent.verdict import DROP, Action, Verdict, VerdictError

TCP: Final = 6
UDP: Final = 17
ICMP: Final = 1
ICMPV6: Final = 58

# IANA protocol numbers, the common ones; the others are shown by number.
PROTOCOL_NAMES: Final = {
    1: "icmp", 2: "igmp", 4: "ipip", 6: "tcp", 17: "udp", 33: "dccp", 41: "ipv6", 46: "rsvp", 47: "gre", 50: "esp",
    51: "ah", 58: "icmpv6", 89: "ospf", 103: "pim", 112: "vrrp", 115: "l2tp", 132: "sctp", 136: "udplite",
}  # fmt: skip

# Protocols that begin with a source and a destination port (RFC 9293, 768, 4340, 9260, 3828).
WITH_PORTS: Final = frozenset((6, 17, 33, 132, 136))
# Extension headers with a length of their own in units of 8 bytes (RFC 8200, 5096, 5201, 5533).
_V6_OPTIONS: Final = frozenset((0, 43, 60, 135, 139, 140))
_V6_FRAGMENT: Final = 44
_V6_AH: Final = 51
_PORTS: Final = Struct("!HH")
# IPv4 without options, and TCP's header without its options: length, flags and place of a fragment, protocol, addresses, ports,
# length of the header, flags.
_PLAIN: Final = Struct("!2xH2xHxB2x4s4sHH8xBB")
_PLAIN_V4: Final = 0x45
_PLAIN_LEAST: Final = 40
_V4: Final = Struct("!BxHxxHxBxx4s4s")
_V6: Final = Struct("!BxxxHBx16s16s")


class PacketError(ValueError):
    """Bytes that are not an IP packet, or that end before their headers do."""


class Answering(Protocol):
    """What a packet that waits for its verdict knows of its queue."""

    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        """Give the verdict."""


# What a queue may leave out until it is read.
_LATER: Final = frozenset((
    "gid", "hw_address", "indev", "outdev", "physindev", "physoutdev", "time", "uid",
))  # fmt: skip


class Hook(IntEnum):
    """Where in the stack a packet was taken; the numbers are those of linux/netfilter.h."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


# What comes in to the host, and what goes out from it; what it forwards does both.
INWARD: Final = frozenset((Hook.PREROUTING, Hook.INPUT))
OUTWARD: Final = frozenset((Hook.OUTPUT, Hook.POSTROUTING))


class FiveTuple(NamedTuple):
    """Protocol, addresses (packed, 4 or 16 bytes) and ports; a port is None where the packet has none or does not show it."""

    protocol: int
    src: bytes
    sport: int | None
    dst: bytes
    dport: int | None

    def reversed(self) -> FiveTuple:
        """The same for the packets that come back."""
        return FiveTuple(self.protocol, self.dst, self.dport, self.src, self.sport)

    def __str__(self) -> str:
        return f"{protocol_name(self.protocol)} {endpoint(self.src, self.sport)} -> {endpoint(self.dst, self.dport)}"


class Headers(NamedTuple):
    """What the IP and transport headers say.

    version: 4 or 6. five_tuple: see there. length: bytes of the whole packet by its own IP header, or up to the end of its UDP
    datagram; 0 for a GSO packet that is larger than the field. transport: offset of the
    transport header, or None in a later fragment. data: offset of the first byte after a TCP or UDP header, None where
    there is none to find. tcp_flags: the low 8 bits, None if not TCP. fragment: True for any but a whole packet.
    """

    version: int
    five_tuple: FiveTuple
    length: int
    transport: int | None
    data: int | None
    tcp_flags: int | None
    fragment: bool


class Packet:
    """One packet of a queue. Reading `headers` decodes once; everything else is as the kernel said it.

    id: the queue's number for it. hook: see Hook. mark: packet mark. payload: its bytes from the IP header on, as many as
    were copied. length: bytes of the packet before it was cut. indev, outdev, physindev, physoutdev: interface indices, 0
    for none. hw_protocol: ethertype. hw_address: source MAC, None where the hook has none. uid, gid: of the sending
    process, None where the kernel does not say. time: seconds since the epoch when the kernel took it, or when we did.
    gso: True for an offloaded packet that is not cut into segments yet. checksum_ready: False where an offload fills in the
    transport checksum later. Source: linux/netfilter/nfnetlink_queue.h.

    `answer`, `accept`, `drop`, `repeat` and `requeue` give the verdict at once, from any thread: for packets that a callback
    answered with RETAIN, and for those that iteration over a queue yields.
    """

    __slots__ = (
        "_fill", "_headers", "_queue", "_raw", "checksum_ready", "gid", "gso", "hook",
        "hw_address", "hw_protocol", "id", "indev", "length",
        "mark", "outdev", "payload", "physindev", "physoutdev", "time", "uid",
    )  # fmt: skip

    payload: bytes
    id: int
    hook: int
    mark: int
    length: int
    indev: int
    outdev: int
    physindev: int
    physoutdev: int
    hw_protocol: int
    hw_address: bytes | None
    uid: int | None
    gid: int | None
    time: float
    gso: bool
    checksum_ready: bool
    _headers: Headers | None
    _queue: Answering | None
    _raw: Any
    _fill: Callable[[Packet], None] | None

    def __init__(  # noqa: PLR0913  # one for each field of the header
        self,
        payload: bytes,
        *,
        id: int = 0,
        hook: int = Hook.INPUT,
        mark: int = 0,
        length: int | None = None,
        indev: int = 0,
        outdev: int = 0,
        physindev: int = 0,
        physoutdev: int = 0,
        hw_protocol: int = 0,
        hw_address: bytes | None = None,
        uid: int | None = None,
        gid: int | None = None,
        time: float = 0.0,
        gso: bool = False,
        checksum_ready: bool = True,
    ) -> None:
        self.payload = payload
        self.id = id
        self.hook = hook
        self.mark = mark
        self.length = len(payload) if length is None else length
        self.indev = indev
        self.outdev = outdev
        self.physindev = physindev
        self.physoutdev = physoutdev
        self.hw_protocol = hw_protocol
        self.hw_address = hw_address
        self.uid = uid
        self.gid = gid
        self.time = time
        self.gso = gso
        self.checksum_ready = checksum_ready
        self._headers = None
        self._queue = None
        self._raw = None
        self._fill = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # Called for a field that is not set yet: rarely used fields are filled on first access.
            if name in _LATER and self._fill is not None:
                self._fill(self)
                self._fill = self._raw = None
                return getattr(self, name)
            raise AttributeError(f"a packet has no {name!r}")

    @property
    def headers(self) -> Headers:
        """The decoded headers. Raises PacketError if the bytes are not a packet."""
        if self._headers is None:
            self._headers = decode(self.payload)
        return self._headers

    @property
    def truncated(self) -> bool:
        """True where the kernel copied less than the whole packet."""
        return len(self.payload) < self.length

    @property
    def data(self) -> bytes:
        """The bytes that TCP or UDP carries, as many as were copied; empty where there are none."""
        headers = self.headers
        return b"" if headers.data is None else self.payload[headers.data : headers.length or None]

    def answer(self, verdict: Verdict) -> None:
        """Give the verdict now. Raises VerdictError if the packet has one or its queue is closed, RewriteError for a payload
        that cannot be put into it."""
        if self._queue is None:
            raise VerdictError(f"packet {self.id} waits for no verdict: it has one, or it is not from a queue")
        self._queue.verdict(self, verdict)

    def accept(self, *, mark: int | None = None, payload: bytes | None = None) -> None:
        """Let it pass, with another mark or with other bytes (checksums mended: `nfq_agent.checksum.mend`) if given."""
        self.answer(Verdict(Action.ACCEPT, mark, payload))

    def drop(self) -> None:
        """Drop it."""
        self.answer(DROP)

    def repeat(self, *, mark: int | None = None, payload: bytes | None = None) -> None:
        """Send it through the hook once more; without another mark, and a rule that matches it, it comes back without end."""
        self.answer(Verdict(Action.REPEAT, mark, payload))

    def requeue(self, number: int, *, mark: int | None = None, payload: bytes | None = None) -> None:
        """Pass it on to the queue `number` (0 to 65535)."""
        self.answer(Verdict(Action.QUEUE, mark, payload, number))

    def __repr__(self) -> str:
        try:
            what = str(self.headers.five_tuple)
        except PacketError as error:
            what = f"undecoded: {error}"
        return f"<Packet {self.id} {hook_name(self.hook)} {what}, {self.length} bytes>"


def decode(data: bytes) -> Headers:
    """Read the IP and transport headers at the beginning of `data` (RFC 791, RFC 8200, RFC 9293, RFC 768).

    A first fragment has its ports, a later one has none. Raises PacketError where the headers do not hold together.
    """
    if not data:
        raise PacketError("no bytes")
    first = data[0]
    if first == _PLAIN_V4 and len(data) >= _PLAIN_LEAST and (plain := _decode_plain(data)) is not None:
        return plain
    version = first >> 4
    if version == 4:
        return _decode_v4(data)
    if version == 6:
        return _decode_v6(data)
    raise PacketError(f"IP version {version}")


def _decode_plain(data: bytes) -> Headers | None:
    """The same of TCP over IPv4, whole and without options of IPv4, as most packets are; None of another."""
    length, fragment, protocol, src, dst, sport, dport, words, flags = _PLAIN.unpack_from(data)
    header = words >> 4 << 2
    if protocol != TCP or fragment & 0x3FFF or header < 20 or 0 < length < _PLAIN_LEAST:
        return None
    end = min(len(data), length) if length else len(data)
    return Headers(
        4, FiveTuple(TCP, src, sport, dst, dport), length, 20, 20 + header if end >= 20 + header else None, flags, False
    )


def _decode_v4(data: bytes) -> Headers:
    if len(data) < 20:
        raise PacketError(f"IPv4 header cut at {len(data)} bytes")
    first, length, fragment, protocol, src, dst = _V4.unpack_from(data)
    header = (first & 15) * 4
    if header < 20:
        raise PacketError(f"IPv4 header length {header}")
    # A length of 0 is a GSO packet larger than the field (tot_len, net/ipv4/ip_output.c).
    if length and length < header:
        raise PacketError(f"IPv4 length {length} below its header's {header}")
    if len(data) < header:
        raise PacketError(f"IPv4 options cut at {len(data)} bytes")
    offset = fragment & 0x1FFF
    return _transport(data, 4, protocol, src, dst, length, header, offset > 0, bool(fragment & 0x3FFF))


def _decode_v6(data: bytes) -> Headers:
    if len(data) < 40:
        raise PacketError(f"IPv6 header cut at {len(data)} bytes")
    _, payload, protocol, src, dst = _V6.unpack_from(data)
    offset = 40
    later = fragment = False
    # Each turn moves on by at least 8 bytes, so the data bounds it.
    while True:
        if protocol in _V6_OPTIONS:
            step = 2
        elif protocol == _V6_FRAGMENT:
            step = 8
        elif protocol == _V6_AH:
            step = 2
        else:
            break
        if len(data) < offset + step:
            raise PacketError(f"IPv6 extension header {protocol} cut at {len(data)} bytes")
        following = data[offset]
        if protocol == _V6_FRAGMENT:
            place = int.from_bytes(data[offset + 2 : offset + 4], "big")
            fragment = fragment or bool(place & 0xFFF9)
            later = place & 0xFFF8 != 0
            offset += 8
        elif protocol == _V6_AH:
            offset += (data[offset + 1] + 2) * 4
        else:
            offset += (data[offset + 1] + 1) * 8
        protocol = following
        if later:
            break
    return _transport(data, 6, protocol, src, dst, payload and payload + 40, offset, later, fragment)


def _transport(  # noqa: PLR0913  # one for each field of the header
    data: bytes,
    version: int,
    protocol: int,
    src: bytes,
    dst: bytes,
    length: int,
    offset: int,
    later: bool,
    fragment: bool,
) -> Headers:
    # The header's own length bounds what belongs to the packet: link padding after it is not read.
    end = min(len(data), length) if length else len(data)
    sport: int | None = None
    dport: int | None = None
    start: int | None = None
    flags: int | None = None
    if not later and protocol in WITH_PORTS:
        if end < offset + 4:
            raise PacketError(f"{protocol_name(protocol)} header cut at {end} bytes")
        sport, dport = _PORTS.unpack_from(data, offset)
        if protocol == UDP and end >= offset + 8:
            start = offset + 8
            # Its receiver cuts off what is behind the datagram (__udp4_lib_rcv() in net/ipv4/udp.c).
            size = int.from_bytes(data[offset + 4 : offset + 6], "big")
            length = min(length, offset + size) if size >= 8 else length
        elif protocol == TCP and end >= offset + 14:
            flags = data[offset + 13]
            header = (data[offset + 12] >> 4) * 4
            if header < 20:
                raise PacketError(f"TCP header length {header}")
            start = offset + header if end >= offset + header else None
    five_tuple = FiveTuple(protocol, src, sport, dst, dport)
    return Headers(version, five_tuple, length, None if later else offset, start, flags, fragment)


def protocol_name(number: int) -> str:
    """The protocol's usual name in small letters, or `proto-N`."""
    return PROTOCOL_NAMES.get(number) or f"proto-{number}"


def hook_name(number: int) -> str:
    """The hook's name as netfilter prints it."""
    try:
        return Hook(number).name
    except ValueError:
        return f"HOOK-{number}"


def address(packed: bytes) -> str:
    """The text of a packed address of 4 or 16 bytes."""
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def endpoint(packed: bytes, port: int | None) -> str:
    """ADDRESS:PORT, with brackets around IPv6 (RFC 5952); the address alone where there is no port."""
    text = address(packed)
    if port is None:
        return text
    return f"[{text}]:{port}" if len(packed) == 16 else f"{text}:{port}"
