"""What a reader asks for the verdict on a packet, without the interpreter: the flow table, or the compiled steps of a chain."""

from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    # Verdicts that are told apart.
    VERDICTS = 32


cdef class Answering:
    cdef readonly list verdicts
    # Whether the chain hears of packets that were answered; those that it still has to be told of: the packet, its verdict, and
    # the elements, a bit each, 0 for all.
    cdef readonly bint hears
    cdef list heard
    # Of the packet that was looked at last: the elements that have to be told of it, a bit each.
    cdef uint32_t tells
    # Whether `now` has to be set before each look: seconds since the epoch (Packet.time).
    cdef bint timed
    cdef double now
    # Whether `mark` has to be set before each look: of the packet.
    cdef bint marked
    cdef uint32_t mark
    # Whether the packet to look at may be several datagrams that an offload joined.
    cdef bint joined

    cdef int index_of(self, verdict) except -1
    cdef void start_turn(self, double now) noexcept
    cdef bint note(self, const uint8_t *packet, size_t copied, size_t length) noexcept nogil
    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil
