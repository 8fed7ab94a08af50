"""The layout of the reader, for the reader of flows, which is one too."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from cpython.object cimport PyObject

from .glance cimport Glance
from .outbox cimport Cutter, Outbox
from .recent cimport RECENT, Answered

cdef enum:
    # NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT and NFQNL_MSG_VERDICT_BATCH
    MSG_VERDICT = 3 << 8 | 1
    MSG_VERDICT_BATCH = 3 << 8 | 3
    # Where a verdict message has the packet's number.
    VERDICT_ID = 28
    LONGEST_VERDICT = 64
    # Packets that a turn asks about before any is answered: what is asked may be slow.
    ASKED = 256
    # While it spins, the clock is read once in so many looks at the socket.
    LOOKS = 8
    # If a packet came alone, so many that follow are answered without a look for more, which would be a system call for each.
    ALONE = 16
    # Nanoseconds after which a turn that waits for packets ends, though more come.
    LONGEST_TURN = 50000000


cdef inline int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * <int64_t>1000000000 + time.tv_nsec


cdef class Inbox:
    # What sends verdicts, where the socket takes messages of fixed shapes alone.
    cdef Outbox outbox
    cdef int descriptor
    # Bytes for a message; and those that are received of one that is not looked at.
    cdef size_t room, least
    cdef uint8_t *buffer
    cdef object make
    # What the turn has taken so far, and the current run.
    cdef readonly unsigned int count
    # When the first packet of the turn was taken; in a turn that waits, how long it took until that was answered (ns, else 0).
    cdef int64_t taken_at
    cdef readonly int64_t first_took
    # How often it has polled so far, how often a packet came of it, and for how long in all (ns).
    cdef readonly uint64_t polls
    cdef readonly uint64_t found
    cdef readonly int64_t polled
    # Whether it looks again before it sleeps.
    cdef readonly Glance glance
    cdef unsigned int asked
    cdef uint32_t first
    cdef readonly uint32_t latest
    cdef unsigned int begun
    cdef object current
    cdef list runs
    cdef uint64_t era
    cdef Answered recent[RECENT]
    # The verdict message that is sent for each packet, with its number; and how many more are answered without a look for others.
    cdef uint8_t verdict[LONGEST_VERDICT]
    cdef size_t verdict_length
    cdef unsigned int unlooked
    # What has the kernel cut packets of many datagrams; None where such a packet is read as it is.
    cdef readonly Cutter cutter

    cdef void _begin(self)
    cdef int _keep(self, const uint8_t[::1] verdict) except -1
    cdef void _count(self, uint32_t identity) noexcept nogil
    cdef ssize_t _take(self, int flags, size_t wanted) except -1 nogil
    cdef ssize_t _await(self, int64_t patience, int64_t end, size_t wanted) except -1 nogil
    cdef ssize_t _answer_same(
        self, unsigned int budget, PyObject *accepted, unsigned int together, int64_t patience, int64_t end
    ) except -1 nogil
    cdef int _answer(self, uint16_t kind) except -1 nogil
    cdef void _note_first(self) noexcept nogil
    cdef bint _is_joined(self, const uint8_t *message, size_t size) noexcept nogil
    cdef int _read(self, const uint8_t *message, size_t size, list packets) except -1
    cdef bint _skimmed(self, const uint8_t *message, ssize_t size) noexcept nogil
    cdef bint _remembered(self, size_t size, PyObject *verdict) noexcept nogil
    cdef bint _sorted(self, const uint8_t *message, size_t size, dict known, decide) except -1
    cdef tuple _sum_up(self)
