"""The layout of a flow table, for the reader that looks packets up without the interpreter."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .flow_entry cimport ASK, Entry

cdef enum:
    # Verdicts that are told apart.
    VERDICTS = 32
    # Bytes of requests that are kept until they are acknowledged, in the whole table.
    ROOM = 16777216


cdef class FlowTable:
    cdef Entry *entries
    cdef uint32_t *buckets
    cdef uint32_t mask, limit, size, used, unused, tick
    # Of the half-open flows and of the settled ones: how many, and the ends of the list.
    cdef uint32_t number[2]
    cdef uint32_t oldest[2]
    cdef uint32_t newest[2]
    cdef size_t kept
    cdef double max_idle
    cdef uint64_t seed
    # The entry that was observed last.
    cdef uint32_t current
    cdef readonly uint64_t evicted
    # The flows that were forgotten, where they are asked for, else None.
    cdef list forgotten
    cdef readonly list verdicts

    cdef int index_of(self, verdict) except -1
    cdef void start_turn(self, double now) noexcept
    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil
    cdef uint32_t _find(self, const uint8_t *key, uint32_t hashed) noexcept nogil
    cdef uint32_t _add(self, const uint8_t *key, uint32_t hashed)
    cdef void _see(self, uint32_t place, bint down, size_t length) noexcept nogil
    cdef bint _make_room(self)
    cdef void _detach(self, uint32_t place) noexcept nogil
    cdef void _append(self, uint32_t place) noexcept nogil
    cdef object _account(self, Entry *entry)
    cdef void _evict(self, uint32_t place)
