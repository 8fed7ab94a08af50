"""The key of a flow in the table: from a five-tuple, and its hash. Pure."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from .plain_packet cimport FORM_HIGH_PORTLESS, FORM_LOW_PORTLESS, FORM_V6, K_ENDS, K_FORM, K_PORTS, KEY, put_ends

cdef extern from *:
    """
    static inline unsigned long long nfq_mix(unsigned long long a, unsigned long long b)
    {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (unsigned long long)product ^ (unsigned long long)(product >> 64);
    }
    """
    uint64_t mix "nfq_mix"(uint64_t, uint64_t) noexcept nogil


cdef inline uint32_t hash_of(const uint8_t *key, uint64_t seed) noexcept nogil:
    cdef uint64_t words[5]
    cdef uint64_t mixed = seed
    cdef int place
    memcpy(words, key, KEY)
    for place in range(5):
        mixed = mix(mixed ^ words[place], 0x9E3779B97F4A7C15ULL ^ (seed << 1))
    return <uint32_t>(mixed ^ mixed >> 32)


cdef inline bint key_of(five_tuple, uint8_t *key) except -1:
    """Write the key of a five-tuple. Returns whether its packets go down (see Segment)."""
    cdef uint8_t ports[4]
    cdef bint down
    cdef bytes src, dst
    cdef int number
    protocol, src, sport, dst, dport = five_tuple
    memset(key, 0, KEY)
    memset(ports, 0, 4)
    key[0] = protocol
    for number, port in enumerate((sport, dport)):
        if port is not None:
            ports[2 * number] = port >> 8
            ports[2 * number + 1] = port & 255
    if len(src) not in (4, 16) or len(dst) != len(src):
        raise ValueError("addresses have 4 or 16 bytes")
    down = put_ends(key, src, dst, len(src), ports, ports + 2)
    if len(src) == 16:
        key[K_FORM] |= FORM_V6
    if sport is None:
        key[K_FORM] |= FORM_HIGH_PORTLESS if down else FORM_LOW_PORTLESS
    if dport is None:
        key[K_FORM] |= FORM_LOW_PORTLESS if down else FORM_HIGH_PORTLESS
    return down


cdef inline tuple ends_of(const uint8_t *key, bint down):
    """The values of the five-tuple of a TCP or UDP flow's packets that go down, or of those that go up."""
    cdef const char *ends = <const char *>key + K_ENDS
    cdef size_t size = 16 if key[K_FORM] & FORM_V6 else 4
    low, high = ends[:size], ends[16 : 16 + size]
    low_port = key[K_PORTS] << 8 | key[K_PORTS + 1]
    high_port = key[K_PORTS + 2] << 8 | key[K_PORTS + 3]
    return (key[0], high, high_port, low, low_port) if down else (key[0], low, low_port, high, high_port)
