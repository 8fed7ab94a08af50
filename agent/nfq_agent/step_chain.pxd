"""The layout of a chain of compiled elements, for one beside a flow table."""

from libc.stdint cimport uint8_t

from .answering cimport Answering
from .steps cimport Step, View


cdef class Steps(Answering):
    cdef Step first, second, third, fourth
    cdef bint reads_headers, decides, amends, by_flow
    cdef uint8_t dropped

    cdef bint _begin(self, const uint8_t *packet, size_t copied, View *view) noexcept nogil
    cdef uint8_t _decide(self, const View *view) noexcept nogil
    cdef void _end(self, bint answered) noexcept nogil
    cdef uint8_t _answered(self, const View *view, uint8_t index) noexcept nogil
    cdef bint _asks(self) noexcept nogil
    cdef uint8_t _amend(self, uint8_t index) noexcept nogil
    cdef bint _would_tell(self, const View *view, uint8_t index) noexcept nogil
    cdef void _hear(self, const View *view, uint8_t index) noexcept nogil
