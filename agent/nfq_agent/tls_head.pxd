"""A ClientHello in its plain form: one record that fills the segment, one server name, no ECH, no early data. Pure.

Whatever is not in this form is left to `nfq_agent.protocols.tls`, which reads every form (RFC 8446 4.1.2).
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp

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
    return kind != X_EARLY_DATA and kind != X_ECH


cdef inline bint name_of_hello(const uint8_t *data, size_t size, uint8_t *name, size_t *length) noexcept nogil:
    """Whether bytes are a hello in the plain form. name: takes its server name in small letters, 253 bytes at most."""
    cdef size_t at, end
    cdef uint32_t kind, seen = 0, bit
    if size < 52 or data[0] != 22 or data[1] != 3 or (data[2] != 1 and data[2] != 3) or two(data + 3) != size - 5:
        return False
    if data[5] != 1 or data[6] or two(data + 7) != size - 9 or data[9] != 3:
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
        if kind < 64:
            bit = 1 if kind == X_SERVER_NAME else 2 if kind == X_GROUPS else 4 if kind == X_POINT_FORMATS else 0
            bit = bit or (8 if kind == X_SIGNATURES else 16 if kind == X_ALPN else 32 if kind == X_VERSIONS else 0)
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
