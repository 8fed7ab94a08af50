"""An element of a chain in its compiled form, and what it sees of a packet. Pure: bytes in, places out."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from .plain_packet cimport P_TCP, P_UDP, ntohs

cdef enum:
    # Indices of the verdicts that every Answering knows.
    I_ACCEPT = 0
    I_DROP = 1
    I_WOULD_DROP = 2
    # It leaves the packet to the next.
    PASS = 253
    # Those behind it hear of the packet; they do not; the element has to be told of it in Python.
    H_NEXT = 0
    H_END = 1
    H_TELL = 2
    P_ICMP = 1
    P_ICMPV6 = 58


cdef struct View:
    # Seconds since the epoch.
    double now
    # Only if the headers were read: addresses of so many bytes, the protocol, the flags of TCP, and the transport header.
    const uint8_t *src
    const uint8_t *dst
    const uint8_t *transport
    uint32_t size
    uint8_t protocol
    uint8_t flags


cdef inline bint read_headers(const uint8_t *packet, size_t copied, View *view) noexcept nogil:
    """Read whole TCP, UDP and ICMP packets with plain IP headers as nfq_agent.packet does; False for any other packet."""
    cdef size_t transport, end
    if copied < 20:
        return False
    if packet[0] == 0x45:
        # No fragment; DF may be set.
        if packet[6] & 0xBF or packet[7]:
            return False
        transport, view.size = 20, 4
        view.protocol = packet[9]
        view.src, view.dst = packet + 12, packet + 16
        end = ntohs((<const uint16_t *>(packet + 2))[0])
    elif packet[0] >> 4 == 6 and copied >= 40:
        transport, view.size = 40, 16
        view.protocol = packet[6]
        view.src, view.dst = packet + 8, packet + 24
        end = ntohs((<const uint16_t *>(packet + 4))[0])
        # A length of 0 is a packet larger than the field.
        end += 40 if end else 0
    else:
        return False
    if end and end < transport:
        return False
    end = min(end, copied) if end else copied
    view.transport = packet + transport
    view.flags = 0
    if view.protocol == P_TCP:
        if end < transport + 20 or packet[transport + 12] >> 4 < 5:
            return False
        view.flags = packet[transport + 13]
        return True
    if view.protocol == P_UDP:
        return end >= transport + 4
    return view.protocol == (P_ICMP if transport == 20 else P_ICMPV6)


cdef class Step:
    # Whether it needs the headers; the time; whether it may give a verdict, and a drop; whether it hears of packets; whether what it
    # does with them follows from their flow too; whether it may change packets that are accepted.
    cdef bint reads_headers, timed, decides, may_drop, hears, by_flow, amends

    cdef void begin(self) noexcept nogil
    cdef uint8_t decide(self, const View *view) noexcept nogil
    cdef void end(self, bint answered) noexcept nogil
    cdef bint asks(self) noexcept nogil
    cdef uint8_t amend(self, uint8_t index) noexcept nogil
    cdef uint8_t would_hear(self, const View *view, uint8_t index) noexcept nogil
    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil
