# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Messages whose shape cannot be changed by the process that sends them, so that a seccomp filter can tell them from others.

A filter sees the pointer that sendmsg(2) gets, not what it points to. So the message's header (struct msghdr), its parts (struct
iovec) and all bytes that are not free to choose stand in memory that is read-only and lies at an address of its own. The filter
allows sendmsg with these headers alone, and no call that could change what is mapped there (calls.py).
"""

from libc.errno cimport EEXIST, errno
from libc.stdint cimport uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.types cimport off_t

from cpython.exc cimport PyErr_SetFromErrno

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    void *MAP_FAILED
    void *mmap(void *, size_t, int, int, int, off_t)
    int mprotect(void *, size_t, int)
    int munmap(void *, size_t)

cdef extern from "<sys/socket.h>" nogil:
    """
    #ifndef MAP_FIXED_NOREPLACE
    #define MAP_FIXED_NOREPLACE 0x100000
    #endif
    """
    int MAP_FIXED_NOREPLACE
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        void *msg_name
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int, const msghdr *, int)

# Below everything that the kernel maps by itself, and above all that a program is linked to. Fits 39 bits of address (aarch64).
BOTTOM = 0x10_0000_0000
# All of them lie below this: calls that change mappings are allowed from here on.
TOP = 0x11_0000_0000
_STEP = 1 << 20
_PAGE = 1 << 16

cdef enum:
    # A header's place: struct msghdr has 56 bytes.
    STRIDE = 64


cdef class FixedMessages:
    """Messages of given shapes. A shape is a list of parts: fixed bytes, and numbers: lengths of free bytes.

    Raises OSError where the memory cannot be allocated.
    """

    def __cinit__(self, shapes):
        cdef size_t headers, parts, fixed, at_part, at_byte, hole, number = 0
        cdef uint8_t *base
        cdef msghdr *header
        cdef iovec *part
        shapes = [list(shape) for shape in shapes]
        self.count = len(shapes)
        self.holes = [sum(each for each in shape if isinstance(each, int)) for shape in shapes]
        self.room = max(self.holes, default=0) + 8
        self.cells = <uint8_t *>calloc(1, self.room)
        if self.cells == NULL:
            raise MemoryError
        headers = self.count * STRIDE
        parts = sum(len(shape) for shape in shapes) * sizeof(iovec)
        fixed = sum(len(each) for shape in shapes for each in shape if isinstance(each, bytes))
        self.length = (headers + parts + fixed + _PAGE - 1) // _PAGE * _PAGE
        self._map()
        base = <uint8_t *>self.region
        at_part, at_byte = headers, headers + parts
        for shape in shapes:
            header = <msghdr *>(base + number * STRIDE)
            number += 1
            memset(header, 0, STRIDE)
            header.msg_iov = <iovec *>(base + at_part)
            header.msg_iovlen = len(shape)
            hole = 0
            for each in shape:
                part = <iovec *>(base + at_part)
                at_part += sizeof(iovec)
                if isinstance(each, int):
                    part.iov_base = self.cells + hole
                    part.iov_len = each
                    hole += part.iov_len
                else:
                    part.iov_base = base + at_byte
                    part.iov_len = len(each)
                    memcpy(part.iov_base, <const char *>each, part.iov_len)
                    at_byte += part.iov_len
        if mprotect(self.region, self.length, PROT_READ) != 0:
            PyErr_SetFromErrno(OSError)

    def _map(self):
        cdef uintptr_t at = BOTTOM
        while at + self.length <= TOP:
            self.region = mmap(
                <void *>at, self.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0
            )
            if self.region == <void *>at:
                return
            if self.region != MAP_FAILED:
                # A kernel before 4.17 treats the address as a hint.
                munmap(self.region, self.length)
            elif errno != EEXIST:
                self.region = NULL
                PyErr_SetFromErrno(OSError)
            self.region = NULL
            at += _STEP
        raise MemoryError("no room for fixed messages")

    def __dealloc__(self):
        if self.region != NULL:
            munmap(self.region, self.length)
        free(self.cells)

    @property
    def headers(self):
        """Where the headers are: the first address, the one behind the last, and the distance between two."""
        cdef uintptr_t start = <uintptr_t>self.region
        return start, start + self.count * STRIDE, STRIDE

    def send(self, int descriptor, unsigned int shape, const uint8_t[::1] free_bytes):
        """Send a message. free_bytes: what its free parts have, one after the other. Raises OSError, ValueError."""
        cdef size_t length = 0 if free_bytes is None else free_bytes.shape[0]
        if shape >= self.count or length != self.holes[shape]:
            raise ValueError(f"shape {shape} does not take {length} bytes")
        if length:
            memcpy(self.cells, &free_bytes[0], length)
        self.post(descriptor, shape)

    cdef int post(self, int descriptor, unsigned int shape) except -1 nogil:
        """Send the message with what stands in `cells`."""
        if sendmsg(descriptor, <msghdr *>(<uint8_t *>self.region + shape * STRIDE), 0) < 0:
            with gil:
                PyErr_SetFromErrno(OSError)
        return 0
