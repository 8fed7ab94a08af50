"""Which TCP segments a receiver discards, as far as that shows in the packet. No I/O, no clock.

What the receiver discards is not to be believed: a decoy has an allowed name where the client's own bytes have another one.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from nfq_agent.checksum import is_wrong
from nfq_agent.packet import Headers, Packet
from nfq_agent.read_bytes import distance

_FIN: Final = 1
_SYN: Final = 2
_RST: Final = 4
_ACK: Final = 16
_TIMESTAMP: Final = 8
# MD5 (RFC 2385) and TCP-AO (RFC 5925).
SIGNATURES: Final = frozenset((19, 29))
MPTCP: Final = 30
# As nearly every segment has it: two NOPs and a timestamp.
_USUAL: Final = b"\1\1\x08\n"
_NUMBER: Final = Struct("!I")


def tcp_options(packet: Packet, headers: Headers) -> dict[int, bytes]:
    """The options of a TCP segment, the value of each kind (RFC 9293 3.1). One that is cut ends them; a kind that comes twice
    has its first value."""
    start, end = headers.transport, headers.data
    if start is None or end is None:
        return {}
    payload = packet.payload
    at = start + 20
    if end == at + 12 and payload[at : at + 4] == _USUAL:
        return {_TIMESTAMP: payload[at + 4 : end]}
    found: dict[int, bytes] = {}
    while at < end and payload[at] != 0:
        if payload[at] == 1:
            at += 1
            continue
        size = payload[at + 1] if at + 1 < end else 0
        if size < 2 or at + size > end:
            break
        found.setdefault(payload[at], payload[at + 2 : at + size])
        at += size
    return found


class Soundness:
    """What the receiver of one direction remembers of the segments before.

    signed: the SYN had a signature. stamp: the timestamp of the latest segment that was in order; None while none had one.
    """

    __slots__ = ("signed", "stamp")

    def __init__(self) -> None:
        self.stamp: int | None = None
        self.signed = False

    def refuses(self, packet: Packet, headers: Headers, in_order: bool) -> str:
        """Why the receiver discards a segment that is not a SYN; empty where nothing says so.

        in_order: it begins at, or before, the next byte that the receiver awaits; not read where it has no options.
        """
        flags = headers.tcp_flags or 0
        if not flags & (_ACK | _RST):
            # RFC 9293 3.10.7.4, fifth check.
            return "no ACK flag"
        if headers.data == (headers.transport or 0) + 20:
            # Without options.
            if self.stamp is not None and not flags & _RST:
                return "no timestamp, in a connection that has them"
            return "a wrong checksum" if is_wrong(packet) else ""
        options = tcp_options(packet, headers)
        if not self.signed and not SIGNATURES.isdisjoint(options):
            return "a signature that the connection does not have"
        stamp = options.get(_TIMESTAMP, b"")
        if len(stamp) != 8:
            if self.stamp is not None and not flags & _RST:
                # RFC 7323 3.2: once negotiated, every segment has one.
                return "no timestamp, in a connection that has them"
        elif not flags & _RST:
            (value,) = _NUMBER.unpack_from(stamp)
            # RFC 7323 5.3; Linux lets one tick pass (TCP_PAWS_WINDOW).
            if self.stamp is not None and distance(value, self.stamp) < -1:
                return "an old timestamp"
            if in_order and not is_wrong(packet):
                self.stamp = value
                return ""
        return "a wrong checksum" if is_wrong(packet) else ""


def refused_syn(packet: Packet, headers: Headers) -> str:
    """Why the receiver discards a SYN; empty where nothing says so."""
    flags = headers.tcp_flags or 0
    if flags & (_FIN | _RST):
        return "SYN with FIN or RST"
    return "a wrong checksum" if is_wrong(packet) else ""
