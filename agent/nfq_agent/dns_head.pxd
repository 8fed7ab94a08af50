"""The head of a DNS message in a datagram. Pure: bytes in, an answer out."""

from libc.stdint cimport uint8_t, uint16_t


cdef inline bint may_be_dns(const uint8_t *data, size_t size) noexcept nogil:
    """False for what is certainly no DNS message (see nfq_agent.protocols.dns.message, strict)."""
    cdef uint16_t flags, questions, answers
    if size < 17:
        return False
    flags = data[2] << 8 | data[3]
    questions = data[4] << 8 | data[5]
    answers = data[6] << 8 | data[7]
    # The operations that are known are 0, 1, 2, 4 and 5.
    if not 0x37 >> (flags >> 11 & 15) & 1 or flags & 0x40 or questions > 255:
        return False
    return questions != 0 or (flags & 0x8000 and answers)
