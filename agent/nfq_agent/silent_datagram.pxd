"""Datagrams that say nothing, whatever protocol they are of. Pure: bytes in, an answer out."""

from libc.stdint cimport uint8_t
from libc.string cimport memcmp

from .dns_head cimport may_be_dns

cdef enum:
    # The least bytes of a QUIC client's first datagram.
    LEAST_QUIC = 1200


cdef inline bint may_be_message(const uint8_t *data, size_t size) noexcept nogil:
    """False for what is certainly neither DNS nor the first datagram of QUIC."""
    return may_be_dns(data, size) or (data[0] >= 0xC0 and size >= LEAST_QUIC)


cdef inline bint may_say(const uint8_t *data, size_t size) noexcept nogil:
    """False for what is certainly of no protocol that is known (nfq_agent.protocols.known.DATAGRAMS, one line for each)."""
    if may_be_message(data, size):
        return True
    return (
        (size >= 12 and memcmp(data, b"d1:", 3) == 0)  # bittorrent
        or data[0] == 0x38  # openvpn
        or ((data[0] == 1 and size == 148) or (data[0] == 2 and size == 92))  # wireguard
        or (size >= 20 and memcmp(data + 4, b"\x21\x12\xa4\x42", 4) == 0)  # stun
        or (data[0] & 7 == 3 and (size == 48 or size == 68 or size == 72))  # ntp
    )
