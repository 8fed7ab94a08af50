"""The head of a DNS message in a datagram. Pure: bytes in, an answer out."""

from libc.stdint cimport uint8_t, uint16_t

from .host_name cimport LONGEST_NAME, small_letter


cdef inline bint may_be_dns(const uint8_t *data, size_t size) noexcept nogil:
    """False for what is certainly not a DNS message (see nfq_agent.protocols.dns.message, strict)."""
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


cdef inline bint name_of_message(const uint8_t *data, size_t size, uint8_t *name, size_t *length) noexcept nogil:
    """Whether bytes are a message with one question, for a name in the plain form, where it is known that DNS is spoken.

    See nfq_agent.protocols.dns.message, not strict: what stands behind the question adds no other name. name: takes the name in
    small letters, LONGEST_NAME bytes at most.
    """
    cdef size_t at = 12, end, place
    cdef uint8_t byte
    length[0] = 0
    if size < 17 or not 0x37 >> (data[2] >> 3 & 15) & 1 or data[4] or data[5] != 1:
        return False
    while data[at]:
        end = at + 1 + data[at]
        # A byte has to follow, the next length or the end; longer than 63 are pointers.
        if data[at] > 63 or end >= size or length[0] + data[at] + (length[0] > 0) > LONGEST_NAME:
            return False
        if length[0]:
            name[length[0]] = 0x2E
            length[0] += 1
        for place in range(at + 1, end):
            byte = small_letter(data[place])
            if byte == 0:
                return False
            name[length[0]] = byte
            length[0] += 1
        at = end
    return length[0] > 0 and at + 5 <= size
