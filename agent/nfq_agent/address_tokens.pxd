"""The layout of the token buckets by address, for the step that takes from them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from .tokens cimport Tokens


cdef struct Owner:
    uint8_t key[16]
    Tokens tokens
    uint32_t hashed
    # The next of the same hash; and the neighbours in the order of the last packet. 0 is none.
    uint32_t next
    uint32_t older
    uint32_t newer
    uint32_t size


cdef class AddressTokens:
    cdef Owner *owners
    cdef uint32_t *buckets
    cdef uint32_t mask, room, used, limit, oldest, newest
    cdef double per_second, burst
    cdef uint64_t seed
    cdef readonly uint64_t evicted

    cdef bint take(self, const uint8_t *key, uint32_t size, double now) noexcept nogil
    cdef uint32_t _find(self, const uint8_t *key, uint32_t size, uint32_t hashed) noexcept nogil
    cdef uint32_t _add(self, const uint8_t *key, uint32_t size, uint32_t hashed, double now) noexcept nogil
    cdef bint _grow(self) noexcept nogil
    cdef void _unlink(self, uint32_t place) noexcept nogil
    cdef void _append(self, uint32_t place) noexcept nogil
