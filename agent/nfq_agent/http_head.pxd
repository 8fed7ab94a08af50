"""HTTP requests in their plain form: one head with one Host field, no body, nothing behind it. Pure: bytes in, an answer out.

Whatever is not in this form is left to `nfq_agent.protocols.http1`, which reads every form (RFC 9112 2 to 5).
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp

from .host_name cimport is_host_name


cdef inline bint is_token(uint8_t byte) noexcept nogil:
    """A character of a method or a field's name (RFC 9110 5.6.2)."""
    if byte >= 128:
        return False
    return ((<uint64_t>0x57ffffffc7fffffe if byte >= 64 else <uint64_t>0x3ff6cfa00000000) >> (byte & 63)) & 1


cdef inline uint8_t lowered(uint8_t byte) noexcept nogil:
    return byte | 0x20 if 0x41 <= byte <= 0x5A else byte


cdef inline bint is_word(const uint8_t *data, size_t size, const char *word, size_t length) noexcept nogil:
    """Whether bytes are a word in small letters, whatever their own case."""
    cdef size_t at
    if size != length:
        return False
    for at in range(length):
        if lowered(data[at]) != <uint8_t>word[at]:
            return False
    return True


cdef inline bint is_host(const uint8_t *data, size_t size, const uint8_t *host, size_t length) noexcept nogil:
    """Whether a field's value is this host, with or without a port. host: letters, digits, `-`, `_` and `.`, in small letters."""
    cdef size_t at
    while size and (data[0] == 0x20 or data[0] == 9):
        data += 1
        size -= 1
    while size and (data[size - 1] == 0x20 or data[size - 1] == 9):
        size -= 1
    if size < length or not is_word(data, length, <const char *>host, length):
        return False
    if size == length:
        return True
    if data[length] != 0x3A:
        return False
    for at in range(length + 1, size):
        if not 0x30 <= data[at] <= 0x39:
            return False
    return True


cdef inline bint is_request(const uint8_t *data, size_t size, const uint8_t *host, size_t length) noexcept nogil:
    """Whether bytes are one request in the plain form, for this host."""
    cdef size_t at = 0, name, end, value
    cdef bint found = False
    while at < size and is_token(data[at]):
        at += 1
    if at == 0 or at + 1 >= size or data[at] != 0x20 or data[at + 1] != 0x2F:
        return False
    if at == 7 and memcmp(data, b"CONNECT", 7) == 0:
        return False
    at += 1
    while at < size and 0x21 <= data[at] <= 0x7E:
        at += 1
    if size - at < 11 or memcmp(data + at, b" HTTP/1.", 8) != 0 or (data[at + 8] != 0x30 and data[at + 8] != 0x31):
        return False
    if data[at + 9] != 0x0D or data[at + 10] != 0x0A:
        return False
    at += 11
    while True:
        if at + 2 > size:
            return False
        if data[at] == 0x0D:
            return found and data[at + 1] == 0x0A and at + 2 == size
        name = at
        while at < size and is_token(data[at]):
            at += 1
        if at == name or at >= size or data[at] != 0x3A:
            return False
        end = at
        at += 1
        value = at
        while at < size and (data[at] >= 0x20 or data[at] == 9) and data[at] != 0x7F:
            at += 1
        if at + 1 >= size or data[at] != 0x0D or data[at + 1] != 0x0A:
            return False
        if is_word(data + name, end - name, b"host", 4):
            if found or not is_host(data + value, at - value, host, length):
                return False
            found = True
        elif is_word(data + name, end - name, b"content-length", 14) or is_word(data + name, end - name, b"upgrade", 7):
            return False
        elif is_word(data + name, end - name, b"transfer-encoding", 17):
            return False
        at += 2


cdef inline bint host_of_request(const uint8_t *data, size_t size, uint8_t *host, size_t *length) noexcept nogil:
    """Whether bytes are one request in the plain form. host: takes its host in small letters, without the port."""
    cdef size_t at = 0, value, end
    # Whatever is not a token has no field; the form is looked at below.
    if size < 16 or not is_token(data[0]):
        return False
    while at + 6 < size:
        if data[at] == 0x0A and is_word(data + at + 1, 5, b"host:", 5):
            value = at + 6
            while value < size and (data[value] == 0x20 or data[value] == 9):
                value += 1
            end = value
            while end < size and data[end] != 0x0D and data[end] != 0x3A and data[end] != 0x20 and data[end] != 9:
                end += 1
            length[0] = end - value
            return is_host_name(data + value, end - value, host) and is_request(data, size, host, length[0])
        at += 1
    return False
