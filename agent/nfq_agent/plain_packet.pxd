"""TCP and UDP packets in the plain form: no options of IP, no fragment, lengths that agree. Pure: bytes in, places out.

A packet that is not plain is not wrong; it is left to `nfq_agent.packet`, which reads every form.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t ntohs(uint16_t)
    uint32_t ntohl(uint32_t)

cdef enum:
    P_TCP = 6
    P_UDP = 17
    # TCP flags (RFC 9293 3.1).
    F_FIN = 1
    F_SYN = 2
    F_RST = 4
    F_ACK = 16
    F_URG = 32
    # A flow's key: protocol, form, two bytes of zero, both addresses, both ports in network order. The lower end comes first.
    KEY = 40
    K_FORM = 1
    K_ENDS = 4
    K_PORTS = 36
    # The form of a key: IPv6, and the ends that show no port.
    FORM_V6 = 1
    FORM_LOW_PORTLESS = 2
    FORM_HIGH_PORTLESS = 4


cdef struct Segment:
    # Whether the packet goes from the higher end to the lower one.
    uint8_t down
    uint8_t protocol
    uint8_t flags
    uint32_t sequence
    uint32_t acknowledged
    # Offset of the first byte that TCP or UDP carries, and how many there are. `copied`: how many of them are in the buffer.
    uint32_t data
    uint32_t size
    uint32_t copied


cdef inline bint put_ends(
    uint8_t *key, const uint8_t *src, const uint8_t *dst, size_t length, const uint8_t *sport, const uint8_t *dport
) noexcept nogil:
    """Write addresses and ports into a key, the lower end first. Returns whether that is the destination."""
    cdef int order = memcmp(src, dst, length)
    if order == 0:
        order = memcmp(sport, dport, 2)
    if order > 0:
        memcpy(key + K_ENDS, dst, length)
        memcpy(key + K_ENDS + 16, src, length)
        memcpy(key + K_PORTS, dport, 2)
        memcpy(key + K_PORTS + 2, sport, 2)
        return True
    memcpy(key + K_ENDS, src, length)
    memcpy(key + K_ENDS + 16, dst, length)
    memcpy(key + K_PORTS, sport, 2)
    memcpy(key + K_PORTS + 2, dport, 2)
    return False


cdef inline bint read_plain(
    const uint8_t *packet, size_t copied, size_t length, uint8_t *key, Segment *found
) noexcept nogil:
    """Read the headers and write the flow's key; False for a packet that is not plain.

    copied: bytes that are there. length: bytes of the packet before it was cut.
    """
    cdef size_t transport, header
    cdef uint8_t protocol
    memset(key, 0, KEY)
    if copied < 28:
        return False
    if packet[0] == 0x45:
        # No fragment; DF may be set.
        if packet[6] & 0xBF or packet[7] or ntohs((<const uint16_t *>(packet + 2))[0]) != length:
            return False
        protocol = packet[9]
        transport = 20
    elif packet[0] >> 4 == 6 and copied >= 48:
        if <size_t>ntohs((<const uint16_t *>(packet + 4))[0]) + 40 != length:
            return False
        protocol = packet[6]
        transport = 40
        key[K_FORM] = FORM_V6
    else:
        return False
    if protocol == P_TCP:
        if copied < transport + 20:
            return False
        header = (packet[transport + 12] >> 4) * 4
        if header < 20:
            return False
        found.flags = packet[transport + 13]
        found.sequence = ntohl((<const uint32_t *>(packet + transport + 4))[0])
        found.acknowledged = ntohl((<const uint32_t *>(packet + transport + 8))[0])
    elif protocol == P_UDP:
        # What is behind the datagram its receiver cuts off.
        if length - transport != ntohs((<const uint16_t *>(packet + transport + 4))[0]):
            return False
        header = 8
        found.flags = 0
    else:
        return False
    if copied < transport + header or length < transport + header or copied > length:
        return False
    key[0] = protocol
    if transport == 20:
        found.down = put_ends(key, packet + 12, packet + 16, 4, packet + transport, packet + transport + 2)
    else:
        found.down = put_ends(key, packet + 8, packet + 24, 16, packet + transport, packet + transport + 2)
    found.protocol = protocol
    found.data = transport + header
    found.size = length - found.data
    found.copied = copied - found.data
    return True


cdef inline uint32_t summed(const uint8_t *data, size_t size, uint32_t total) noexcept nogil:
    """The sum of 16-bit words, folded to 16 bits (RFC 1071); of 64 KiB at most."""
    cdef uint64_t long_total = total
    cdef size_t at = 0
    cdef uint32_t word
    while at + 4 <= size:
        memcpy(&word, data + at, 4)
        long_total += word
        at += 4
    if at + 2 <= size:
        long_total += (<const uint16_t *>(data + at))[0]
        at += 2
    if at < size:
        # The byte behind the last is 0.
        word = 0
        memcpy(&word, data + at, 1)
        long_total += word
    while long_total >> 16:
        long_total = (long_total & 0xFFFF) + (long_total >> 16)
    return <uint32_t>long_total


cdef inline bint has_wrong_header(const uint8_t *packet) noexcept nogil:
    """Whether the checksum of the header of a plain packet over IPv4 is wrong, which no offload fills in."""
    return packet[0] >> 4 == 4 and summed(packet, 20, 0) != 0xFFFF


cdef inline bint is_wrong(const uint8_t *packet, size_t length, const Segment *segment) noexcept nogil:
    """Whether a checksum of a plain packet that was copied whole is wrong (see nfq_agent.checksum.is_wrong)."""
    cdef size_t transport = 20 if packet[0] >> 4 == 4 else 40
    cdef uint8_t tail[4]
    cdef uint32_t total
    if has_wrong_header(packet):
        return True
    if segment.protocol == P_UDP and packet[transport + 6] == 0 and packet[transport + 7] == 0:
        return False
    # The pseudo-header: addresses, length, protocol.
    tail[0] = (length - transport) >> 8
    tail[1] = (length - transport) & 255
    tail[2] = 0
    tail[3] = segment.protocol
    total = summed(packet + 12, 8, 0) if transport == 20 else summed(packet + 8, 32, 0)
    return summed(packet + transport, length - transport, summed(tail, 4, total)) != 0xFFFF
