from libc.stdint cimport uint8_t, uint32_t

from ..jail.fixed cimport FixedMessages

cdef class Outbox:
    cdef int descriptor
    cdef readonly FixedMessages fixed
    cdef int answer(self, const uint8_t *message, size_t length) except -1 nogil
    cdef int _group(self, const uint8_t *messages, size_t size, unsigned int count) except -1 nogil
    cdef int _rewrite(self, const uint8_t *message, size_t length) except -1 nogil
