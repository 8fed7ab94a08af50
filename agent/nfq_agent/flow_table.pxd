"""The layout of a flow table, for the reader that looks packets up without the interpreter."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .answering cimport Answering
from .flow_entry cimport Entry
from .flow_order cimport Order
from .openings cimport Openings
from .plain_packet cimport Segment

cdef enum:
    # Bytes of requests that are kept until they are acknowledged, in the whole table.
    ROOM = 16777216
    # Flows that were forgotten undecided, until they are taken: two for each packet of the longest turn, and more.
    LAPSED = 10240


cdef class FlowTable(Answering):
    cdef Entry *entries
    cdef uint32_t *buckets
    # tick: the time of this turn, in sixteenths of a second; moment: in 1,024ths.
    cdef uint32_t mask, limit, size, used, unused, tick, moment
    cdef Order order
    cdef size_t kept
    cdef double max_idle
    cdef uint64_t seed
    # The entry that was observed last.
    cdef uint32_t current
    cdef readonly uint64_t evicted, passed_by
    # The flows that were forgotten, where they are asked for, else None.
    cdef list forgotten
    # Those that were forgotten undecided and had more than one packet; None where they are not asked for.
    cdef public list lapsed
    # What is answered to connections that no element is shown, or None.
    cdef Openings openings
    cdef public uint32_t shows_openings
    # Whether a packet has to be shown that may tell more of its flow than is known: of one that is accepted, and of others.
    cdef bint shows, shows_denied
    # The index of the verdict on a first message that is accepted: ACCEPT, or one that the kernel keeps.
    cdef uint8_t lasting

    cdef bint note(self, const uint8_t *packet, size_t copied, size_t length) noexcept nogil
    cdef void start_turn(self, double now) noexcept
    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil
    cdef uint8_t _open(
        self, const uint8_t *key, uint32_t place, const uint8_t *packet, size_t length, const Segment *segment, bint ready
    ) noexcept nogil
    cdef uint8_t _open_datagrams(
        self, const uint8_t *key, const uint8_t *packet, size_t length, const Segment *segment, bint ready
    ) noexcept nogil
    cdef uint8_t _read_first(
        self, uint32_t place, const uint8_t *packet, size_t length, const Segment *segment, bint ready
    ) noexcept nogil
    cdef uint32_t _add_entry(self, const uint8_t *key) noexcept with gil
    cdef object _show(self, uint32_t place, double now)
    cdef uint32_t _find(self, const uint8_t *key, uint32_t hashed) noexcept nogil
    cdef uint32_t _add(self, const uint8_t *key, uint32_t hashed) except 0
    cdef void _see(self, uint32_t place, bint down, size_t length) noexcept nogil
    cdef void _unlink(self, uint32_t place) noexcept nogil
    cdef void _evict(self, uint32_t place)
