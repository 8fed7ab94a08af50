from libc.stdint cimport uint8_t

cdef class FixedMessages:
    cdef void *region
    cdef size_t length
    cdef readonly unsigned int count
    cdef uint8_t *cells
    cdef size_t room
    cdef list holes
    cdef int post(self, int descriptor, unsigned int shape) except -1 nogil
