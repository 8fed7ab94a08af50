"""Lengths and checksums of a packet that was changed: `mend` recomputes them."""

from __future__ import annotations

from typing import Final

from nfq_agent.openings import is_wrong_plain
from nfq_agent.packet import ICMP, ICMPV6, TCP, UDP, FiveTuple, Packet, PacketError, decode

_UDPLITE: Final = 136
_ROUTING: Final = 43
# Where each protocol keeps its checksum, from the beginning of its header.
_PLACE: Final = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}
_HEADER: Final = {TCP: 20, UDP: 8, ICMP: 4, ICMPV6: 4}


def internet_checksum(data: bytes) -> int:
    """The Internet checksum of `data` as 0 to 65535 (RFC 1071); its own field in there must be zero."""
    if len(data) & 1:
        data += b"\0"
    # 65536 is 1 modulo 65535, so that one division adds all words up with their carries.
    return 0xFFFF - (int.from_bytes(data, "big") % 0xFFFF or 0xFFFF)


def is_wrong(packet: Packet) -> bool:
    """True where the packet's own checksums say that its bytes are not those that were sent.

    False, since it is not known, for a packet that was not copied whole, is a fragment, has no checksum, or gets it from an
    offload later.
    Raises PacketError for bytes that are not a packet.
    """
    payload = packet.payload
    whole = packet.checksum_ready and not packet.gso and len(payload) >= packet.length
    if whole and (wrong := is_wrong_plain(payload)) is not None:
        return wrong
    headers = packet.headers
    if headers.version == 4 and internet_checksum(payload[: (payload[0] & 15) * 4]) != 0:
        return True
    start, protocol = headers.transport, headers.five_tuple.protocol
    place = _PLACE.get(protocol)
    if start is None or place is None or headers.fragment or not whole:
        return False
    covered = payload[start : headers.length or None]
    if len(covered) < place + 2:
        return False
    if protocol == UDP and _has_wrong_length(covered, headers.version):
        return True
    if protocol == UDP and covered[place : place + 2] == b"\0\0":
        return False
    if headers.version == 6 and _still_routed(payload):
        return False
    return internet_checksum(_pseudo_header(headers.five_tuple, len(covered)) + covered) != 0


def _has_wrong_length(datagram: bytes, version: int) -> bool:
    """Whether a whole UDP packet is too short for its datagram; in IPv6 a length of 0 is that of a jumbogram."""
    size = int.from_bytes(datagram[4:6], "big")
    return size != len(datagram) and not (version == 6 and size == 0)


def is_partial(packet: Packet) -> bool:
    """True where a TCP or UDP packet has the sum of its pseudo header alone, as the kernel leaves it for an offload to complete.

    A capture shows outgoing packets so (CHECKSUM_PARTIAL, include/linux/skbuff.h). Raises PacketError if the bytes are not a
    packet.
    """
    headers = packet.headers
    start, protocol = headers.transport, headers.five_tuple.protocol
    if start is None or protocol not in (TCP, UDP) or headers.fragment:
        return False
    at = start + _PLACE[protocol]
    left = packet.payload[at : at + 2]
    whole = headers.length or packet.length
    return left == (0xFFFF - internet_checksum(_pseudo_header(headers.five_tuple, whole - start))).to_bytes(2, "big")


def _pseudo_header(five_tuple: FiveTuple, length: int) -> bytes:
    """The pseudo header that a transport checksum covers (RFC 9293 3.1, RFC 768, RFC 8200 8.1); ICMP for IPv4 has none."""
    if five_tuple.protocol == ICMP:
        return b""
    return five_tuple.src + five_tuple.dst + length.to_bytes(4, "big") + five_tuple.protocol.to_bytes(4, "big")


def mend(payload: bytes) -> bytes:
    """The packet with its length fields and checksums made to fit its bytes: IPv4 and IPv6, TCP, UDP and ICMP.

    payload: a whole packet from the IP header on; bytes may have been added or taken at its end. A UDP checksum of zero
    over IPv4, which says that there is none, stays. Raises PacketError if it is not a whole packet: a fragment, cut
    headers, more than 65535 bytes, or a routing header with segments left.
    """
    packet = bytearray(payload)
    if packet and packet[0] >> 4 == 4 and len(packet) >= 20:
        if len(packet) > 0xFFFF:
            raise PacketError(f"{len(packet)} bytes: an IPv4 packet has 65535 at most")
        packet[2:4] = len(packet).to_bytes(2, "big")
        header = (packet[0] & 15) * 4
        if header < 20 or len(packet) < header:
            raise PacketError(f"IPv4 header length {header} in {len(packet)} bytes")
        packet[10:12] = b"\0\0"
        packet[10:12] = internet_checksum(bytes(packet[:header])).to_bytes(2, "big")
    elif packet and packet[0] >> 4 == 6 and len(packet) >= 40:
        if len(packet) - 40 > 0xFFFF:
            raise PacketError(f"{len(packet)} bytes: an IPv6 packet without a jumbo option has 65575 at most")
        packet[4:6] = (len(packet) - 40).to_bytes(2, "big")
    headers = decode(bytes(packet))
    if headers.fragment:
        raise PacketError("a fragment: its checksum covers bytes of the other fragments")
    protocol = headers.five_tuple.protocol
    start = headers.transport
    if start is None or protocol not in _PLACE:
        if protocol == _UDPLITE:
            raise PacketError("udplite: how much its checksum covers is the sender's choice")
        return bytes(packet)
    if len(packet) < start + _HEADER[protocol]:
        raise PacketError(f"transport header cut at {len(packet)} bytes")
    if headers.version == 6 and _still_routed(packet):
        raise PacketError("a routing header with segments left: the checksum covers another destination")
    place = start + _PLACE[protocol]
    if protocol == UDP:
        packet[start + 4 : start + 6] = (len(packet) - start).to_bytes(2, "big")
        if headers.version == 4 and packet[place : place + 2] == b"\0\0":
            return bytes(packet)
    packet[place : place + 2] = b"\0\0"
    covered = bytes(packet[start:])
    checksum = internet_checksum(_pseudo_header(headers.five_tuple, len(covered)) + covered)
    if protocol == UDP and checksum == 0:
        checksum = 0xFFFF
    packet[place : place + 2] = checksum.to_bytes(2, "big")
    return bytes(packet)


def _still_routed(packet: bytes | bytearray) -> bool:
    """True if an IPv6 routing header has segments left. The headers have been decoded, so that they are whole."""
    protocol, offset = packet[6], 40
    while protocol in (0, 43, 60, 135, 139, 140, 44, 51):
        if protocol == _ROUTING and packet[offset + 3] > 0:
            return True
        step = 8 if protocol == 44 else (packet[offset + 1] + 2) * 4 if protocol == 51 else (packet[offset + 1] + 1) * 8
        protocol = packet[offset]
        offset += step
    return False
