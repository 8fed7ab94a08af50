from libc.stdint cimport uint8_t, uint32_t

from ..jail.fixed cimport FixedMessages

cdef enum:
    LONGEST_CUT = 128

cdef class Outbox:
    cdef int descriptor
    cdef readonly FixedMessages fixed
    cdef int cut(self, uint32_t identity) except -1 nogil
    cdef int answer(self, const uint8_t *message, size_t length) except -1 nogil
    cdef int _group(self, const uint8_t *messages, size_t size, unsigned int count) except -1 nogil
    cdef int _rewrite(self, const uint8_t *message, size_t length) except -1 nogil

cdef class Cutter:
    cdef int descriptor
    # Where the socket takes messages of fixed shapes alone.
    cdef Outbox outbox
    cdef uint8_t messages[LONGEST_CUT]
    cdef size_t length
    cdef readonly unsigned long long count
    cdef int cut(self, uint32_t identity) except -1 nogil
