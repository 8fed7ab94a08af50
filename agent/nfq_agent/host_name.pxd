"""Host names in their plain form: letters, digits, hyphen and underscore in labels, without a dot at the end. Pure."""

from libc.stdint cimport uint8_t

cdef enum:
    LONGEST_NAME = 253


cdef inline uint8_t small_letter(uint8_t byte) noexcept nogil:
    """A byte of a label as a small letter; 0 for one that is not plain."""
    if 0x41 <= byte <= 0x5A:
        return byte | 0x20
    return byte if 0x61 <= byte <= 0x7A or 0x30 <= byte <= 0x39 or byte == 0x2D or byte == 0x5F else 0


cdef inline bint is_host_name(const uint8_t *data, size_t size, uint8_t *name) noexcept nogil:
    """Whether bytes are a host name. name: takes it in small letters, LONGEST_NAME bytes at most."""
    cdef size_t at, label = 0
    cdef uint8_t byte
    if not 0 < size <= LONGEST_NAME:
        return False
    for at in range(size):
        byte = data[at]
        if byte == 0x2E:
            if label == 0:
                return False
            label = 0
            name[at] = byte
            continue
        byte = small_letter(byte)
        label += 1
        if byte == 0 or label > 63:
            return False
        name[at] = byte
    return label > 0
