"""`reject`: the packets that tell a sender that its packet was dropped, so that it fails at once. Bytes only; no I/O.

TCP gets a reset, to both ends (RFC 9293 3.10.7.1, 3.5.2); everything else ICMP "destination unreachable" (RFC 792, RFC 4443
3.1), under the rules of RFC 1122 3.2.2: never about a later fragment, a broadcast, a multicast, or another ICMP error.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from nfq_agent.checksum import is_wrong, mend
from nfq_agent.packet import ICMP, ICMPV6, TCP, UDP, Headers, Packet, PacketError
from nfq_agent.rate import Bucket, Buckets
from nfq_agent.verdict import ACCEPT, REJECT, Action, Verdict

_FIN: Final = 1
_SYN: Final = 2
_RST: Final = 4
_ACK: Final = 16
_V4: Final = Struct("!BBHHHBBH4s4s")
_V6: Final = Struct("!IHBB16s16s")
_SEGMENT: Final = Struct("!HHIIBBHHH")
_ERROR: Final = Struct("!BBHI")
# Type and code: port unreachable, which clients take as "connection refused", and administratively prohibited for what has
# no ports.
_PORT: Final = {4: (3, 3), 6: (1, 4)}
_PROHIBITED: Final = {4: (3, 13), 6: (1, 1)}
# ICMP errors: unreachable, source quench, redirect, time exceeded, parameter problem. In version 6 all below 128, and the
# redirect (RFC 4443 2.4 e).
_ERRORS: Final = {ICMP: frozenset((3, 4, 5, 11, 12)), ICMPV6: frozenset((*range(128), 137))}
# Destinations whose allowance is remembered.
_DESTINATIONS: Final = 4096
# How much an error may have in all, with what it quotes: RFC 1812 4.3.2.3, RFC 4443 2.4 (c).
_LARGEST: Final = {4: 576, 6: 1280}


class Allowance:
    """How many ICMP errors may be sent, as the kernel limits its own (RFC 1812 4.3.2.8, RFC 4443 2.4 f).

    One a second for each destination after 6 at once, and 1,000 a second in all (icmp_ratelimit, XRLIM_BURST_FACTOR,
    icmp_msgs_per_sec, icmp_msgs_burst in net/ipv4/icmp.c). Resets are not limited: each ends a connection.
    """

    def __init__(self) -> None:
        self._each = Buckets(1.0, 6.0, _DESTINATIONS)
        self._all: Bucket | None = None

    def take(self, destination: bytes, now: float) -> bool:
        """Take one for this address; False if none is left. now: seconds, on one clock for all calls."""
        if self._all is None:
            self._all = Bucket(1000.0, 50.0, now)
        return self._each.take(destination, now) and self._all.take(now)


def reject(packet: Packet, allowance: Allowance) -> Verdict:
    """A drop, with the packets that tell the sender. A packet that itself ends a conversation is accepted: a reset, an
    unreachable.

    A packet with a wrong checksum is not answered: its sender is not known.

    The packets that we send pass the rules too, where they take both directions; accepting them needs no mark.
    """
    try:
        headers = packet.headers
    except PacketError:
        return REJECT
    if _is_end(packet, headers):
        return ACCEPT
    answers = tuple(_answers(packet, headers, allowance))
    return Verdict(Action.DROP, inject=answers, rejects=True) if answers else REJECT


def _is_end(packet: Packet, headers: Headers) -> bool:
    start = headers.transport
    if start is None or headers.fragment:
        return False
    protocol = headers.five_tuple.protocol
    if protocol == TCP:
        return bool((headers.tcp_flags or 0) & _RST) and _carried(packet, headers) == 0
    kind = packet.payload[start : start + 1]
    return (protocol, kind) in ((ICMP, b"\3"), (ICMPV6, b"\1"))


def _answers(packet: Packet, headers: Headers, allowance: Allowance) -> list[bytes]:
    src, dst = headers.five_tuple.src, headers.five_tuple.dst
    if headers.transport is None or not _single(src) or not _single(dst) or is_wrong(packet):
        return []
    protocol = headers.five_tuple.protocol
    if protocol == TCP:
        return _resets(packet, headers)
    kind = packet.payload[headers.transport : headers.transport + 1]
    if protocol in _ERRORS and (not kind or kind[0] in _ERRORS[protocol]):
        return []
    if not allowance.take(src, packet.time):
        return []
    error_type, code = (_PORT if protocol == UDP else _PROHIBITED)[headers.version]
    overhead = 28 if headers.version == 4 else 48
    quoted = packet.payload[: _LARGEST[headers.version] - overhead]
    error = _ERROR.pack(error_type, code, 0, 0) + quoted
    return [_ip(headers.version, dst, src, ICMP if headers.version == 4 else ICMPV6, error)]


def _resets(packet: Packet, headers: Headers) -> list[bytes]:
    start, flags = headers.transport, headers.tcp_flags
    if start is None or flags is None or flags & _RST:
        return []
    _, src, sport, dst, dport = headers.five_tuple
    sequence = int.from_bytes(packet.payload[start + 4 : start + 8], "big")
    acknowledged = int.from_bytes(packet.payload[start + 8 : start + 12], "big")
    if flags & _ACK:
        back = (acknowledged, 0, _RST)
    else:
        # SYN and FIN have a place in the sequence of their own.
        length = (_carried(packet, headers) or 0) + bool(flags & _SYN) + bool(flags & _FIN)
        back = (0, sequence + length & 0xFFFFFFFF, _RST | _ACK)
    resets = [_reset(headers.version, dst, dport, src, sport, *back)]
    if not flags & _SYN:
        # The other end has the connection too, and accepts only this number (RFC 5961 3.2).
        resets.append(_reset(headers.version, src, sport, dst, dport, sequence, acknowledged, _RST | (flags & _ACK)))
    return resets


def _carried(packet: Packet, headers: Headers) -> int | None:
    """The bytes of data in a TCP packet by its own lengths, copied or not."""
    if headers.data is None:
        return None
    return (headers.length or packet.length) - headers.data


def _reset(
    version: int, src: bytes, sport: int | None, dst: bytes, dport: int | None, sequence: int, acknowledged: int, flags: int
) -> bytes:
    segment = _SEGMENT.pack(sport, dport, sequence, acknowledged, 0x50, flags, 0, 0, 0)
    return _ip(version, src, dst, TCP, segment)


def _ip(version: int, src: bytes, dst: bytes, protocol: int, rest: bytes) -> bytes:
    if version == 4:
        return mend(_V4.pack(0x45, 0, 0, 0, 0x4000, 64, protocol, 0, src, dst) + rest)
    return mend(_V6.pack(6 << 28, 0, protocol, 64, src, dst) + rest)


def _single(packed: bytes) -> bool:
    """An address of one host: neither unspecified, multicast, nor the limited broadcast (RFC 1122 3.2.1.3, RFC 4291 2.7)."""
    if not any(packed):
        return False
    return packed[0] != 0xFF if len(packed) == 16 else packed[0] < 224 and packed[0] != 0
