"""The layout of a flow table, for the reader that looks packets up without the interpreter."""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .plain_packet cimport KEY

cdef enum:
    # The index of no verdict: ask.
    ASK = 255
    # Verdicts that are told apart.
    VERDICTS = 32


cdef struct Entry:
    uint8_t key[KEY]
    uint32_t hashed
    # The next entry of the bucket, or of the free ones; and the neighbours in the order of the last packet. 0 is none.
    uint32_t next
    uint32_t older
    uint32_t newer
    # When the last packet came, in sixteenths of a second; and how many there were.
    uint32_t last
    uint32_t packets
    # Whether the first packet went down (see Segment), and whether the client's do; which directions were seen, a bit each.
    uint8_t client
    uint8_t seen
    # In which of the two lists it is.
    uint8_t kind
    # See Expected and Heard in nfq_agent.flow: numbers, and which of them are known (K_).
    uint8_t known
    uint32_t first
    uint32_t last_read
    uint32_t opening
    uint32_t stamp
    uint32_t acknowledged
    # What has to be looked at, and the verdict of every other packet.
    uint8_t watch
    uint8_t verdict
    PyObject *flow


cdef class FlowTable:
    cdef Entry *entries
    cdef uint32_t *buckets
    cdef uint32_t mask, limit, size, used, unused, tick
    # Of the half-open flows and of the settled ones: how many, and the ends of the list.
    cdef uint32_t number[2]
    cdef uint32_t oldest[2]
    cdef uint32_t newest[2]
    cdef double max_idle
    cdef uint64_t seed
    # The entry that was observed last.
    cdef uint32_t current
    cdef readonly uint64_t evicted
    cdef readonly list verdicts

    cdef int index_of(self, verdict) except -1
    cdef void start_turn(self, double now) noexcept
    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil
    cdef uint32_t _find(self, const uint8_t *key, uint32_t hashed) noexcept nogil
    cdef uint32_t _add(self, const uint8_t *key, uint32_t hashed)
    cdef void _see(self, uint32_t place, bint down) noexcept nogil
    cdef bint _make_room(self)
    cdef void _detach(self, uint32_t place) noexcept nogil
    cdef void _append(self, uint32_t place) noexcept nogil
    cdef void _evict(self, uint32_t place)
