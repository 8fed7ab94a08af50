"""A ClientHello in its plain form: one record that fills the segment, one server name, no early data. Pure.

Whatever is not in this form is left to `nfq_agent.protocols.tls`, which reads every form (RFC 8446 4.1.2).
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy

from .host_name cimport is_host_name

cdef enum:
    X_SERVER_NAME = 0
    X_GROUPS = 10
    X_POINT_FORMATS = 11
    X_SIGNATURES = 13
    X_ALPN = 16
    X_EARLY_DATA = 42
    X_VERSIONS = 43
    X_ECH = 0xFE0D


cdef inline uint32_t two(const uint8_t *data) noexcept nogil:
    return data[0] << 8 | data[1]


cdef inline bint is_plain_alpn(const uint8_t *data, size_t size) noexcept nogil:
    """Whether a list of application protocols is well formed, without "dot" (DNS over TLS)."""
    cdef size_t at = 2
    if size < 2 or two(data) != size - 2:
        return False
    while at < size:
        if at + 1 + data[at] > size or (data[at] == 3 and memcmp(data + at + 1, b"dot", 3) == 0):
            return False
        at += 1 + data[at]
    return True


cdef inline bint is_plain_extension(uint32_t kind, const uint8_t *data, size_t size) noexcept nogil:
    """Whether an extension that is read is well formed. data: its value."""
    if kind == X_ALPN:
        return is_plain_alpn(data, size)
    if kind == X_VERSIONS:
        return size > 0 and data[0] == size - 1 and not data[0] & 1
    if kind == X_GROUPS or kind == X_SIGNATURES:
        return size < 2 or (not size & 1 and two(data) == size - 2)
    return kind != X_EARLY_DATA


cdef inline uint32_t bit_of(uint32_t kind) noexcept nogil:
    """A bit for each extension that is read: it comes once (RFC 8446 4.2). 0 of others."""
    if kind == X_ECH:
        return 1
    if kind == X_SERVER_NAME:
        return 2
    return 1 << kind if kind in (X_GROUPS, X_POINT_FORMATS, X_SIGNATURES, X_ALPN) else 4 if kind == X_VERSIONS else 0


cdef inline uint32_t size_of_hello(const uint8_t *data, size_t size) noexcept nogil:
    """The length of a hello in the plain form, by its beginning; 0 if it is not one, or if that is not known yet."""
    if size < 10 or data[0] != 22 or data[1] != 3 or (data[2] != 1 and data[2] != 3) or data[9] != 3:
        return 0
    if data[5] != 1 or data[6] or two(data + 7) + 4 != two(data + 3):
        return 0
    return two(data + 3) + 5


cdef inline size_t told_by_hello(const uint8_t *data, uint8_t *told, size_t room) noexcept nogil:
    """What the facts of a hello in the plain form follow from, besides its name. Its length; 0 if there is no room for it.

    Version and ciphers, then each extension: its number, and the value of those that are read. Without what is new in each hello.
    """
    cdef size_t at = 44 + data[43], size = 2 + two(data + at), used = 2, end
    cdef uint32_t kind
    if used + size > room:
        return 0
    told[0], told[1] = data[9], data[10]
    memcpy(told + 2, data + at, size)
    used += size
    at += size
    at += 1 + data[at]
    end = at + 2 + two(data + at)
    at += 2
    while at < end:
        kind, size = two(data + at), two(data + at + 2)
        if used + 4 + size > room:
            return 0
        memcpy(told + used, data + at, 2)
        at += 4
        told[used + 2] = told[used + 3] = 0
        if kind == X_ECH:
            # Whether it is of the outer hello, as one of a byte.
            told[used + 3] = 1 if size and data[at] == 0 else 0
        elif kind != X_SERVER_NAME and bit_of(kind):
            told[used + 2], told[used + 3] = size >> 8, size & 255
            memcpy(told + used + 4, data + at, size)
            used += size
        used += 4
        at += size
    return used


cdef inline bint name_of_hello(const uint8_t *data, size_t size, uint8_t *name, size_t *length) noexcept nogil:
    """Whether bytes are a hello in the plain form. name: takes its server name in small letters, 253 bytes at most."""
    cdef size_t at, end
    cdef uint32_t kind, seen = 0, bit
    if size < 52 or size_of_hello(data, size) != size:
        return False
    # The random value, then a session, the ciphers and the compressions, each behind its length.
    at = 44 + data[43]
    if at + 2 > size or two(data + at) & 1:
        return False
    at += 2 + two(data + at)
    if at >= size:
        return False
    at += 1 + data[at]
    if at + 2 > size or two(data + at) != size - at - 2:
        return False
    at += 2
    length[0] = 0
    while at < size:
        if at + 4 > size:
            return False
        kind = two(data + at)
        end = at + 4 + two(data + at + 2)
        at += 4
        if end > size:
            return False
        bit = bit_of(kind)
        if seen & bit:
            return False
        seen |= bit
        if kind == X_SERVER_NAME:
            # A list of one name, of the type host_name (RFC 6066 3).
            if end - at < 6 or two(data + at) != end - at - 2 or data[at + 2] or two(data + at + 3) != end - at - 5:
                return False
            if not is_host_name(data + at + 5, end - at - 5, name):
                return False
            length[0] = end - at - 5
        elif not is_plain_extension(kind, data + at, end - at):
            return False
        at = end
    return length[0] > 0
