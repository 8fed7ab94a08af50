# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""What a reader asks for the verdict on a packet, without the interpreter. Pure: no I/O, no clock."""

from libc.stdint cimport uint8_t

from .flow_entry cimport ASK

from nfq_agent.verdict import ACCEPT, DROP, WOULD_DROP, Action


cdef class Answering:
    """Knows verdicts by index. verdicts: those told apart so far."""

    def __cinit__(self, *_, **__):
        self.verdicts = [ACCEPT, DROP, WOULD_DROP]
        self.heard = []

    def take_heard(self):
        """The packets that elements have to be told of since the last time: each with its verdict, and the elements, a bit each."""
        heard, self.heard = self.heard, []
        return heard

    cdef int index_of(self, verdict) except -1:
        """The index of a verdict that a message of its own kind can give; ASK for one that needs more, or one too many."""
        cdef Py_ssize_t index
        for index in range(len(self.verdicts)):
            if self.verdicts[index] is verdict:
                return index
        if verdict.payload is not None or verdict.delay or verdict.inject or verdict.action is Action.RETAIN:
            return ASK
        for index in range(len(self.verdicts)):
            # An accept in place of a drop is counted apart.
            if self.verdicts[index] == verdict and self.verdicts[index] is not WOULD_DROP:
                return index
        if len(self.verdicts) == VERDICTS:
            return ASK
        self.verdicts.append(verdict)
        return len(self.verdicts) - 1

    cdef void start_turn(self, double now) noexcept:
        """A turn begins. now: monotonic seconds."""

    cdef bint note(self, const uint8_t *packet, size_t copied, size_t length) noexcept nogil:
        """Count a packet that was judged without its flow, where flows are counted. False if it is not."""
        return False

    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil:
        """The index of the verdict on a packet that need not be shown to Python; else ASK.

        copied: bytes that are there. length: of the packet before it was cut. ready: its checksum is that of its bytes.
        """
        return ASK
