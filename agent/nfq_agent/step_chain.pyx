# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A chain of compiled elements, which judges packets without the interpreter. Pure: no I/O, no clock."""

from libc.stdint cimport uint8_t

from .flow_entry cimport ASK
from .steps cimport H_END, H_TELL, I_ACCEPT, I_DROP, I_WOULD_DROP, PASS, Step, View, read_headers

cdef enum:
    # Steps of a chain.
    MOST_STEPS = 4

MOST = MOST_STEPS


cdef class Steps(Answering):
    """The steps of a whole chain, four at most, in their order. What none of them judges is accepted. monitor: so is what is dropped."""

    def __init__(self, steps, bint monitor):
        if not 1 <= len(steps) <= MOST_STEPS:
            raise ValueError(f"{len(steps)} steps; allowed: 1 to {MOST_STEPS}")
        self.first, self.second, self.third, self.fourth = [*steps, Step(), Step(), Step()][:MOST_STEPS]
        cdef Step step
        for step in steps:
            self.reads_headers |= step.reads_headers
            self.timed |= step.timed
            self.decides |= step.decides
            self.hears |= step.hears
            self.amends |= step.amends
            self.by_flow |= step.by_flow
        self.dropped = I_WOULD_DROP if monitor else I_DROP

    def look_up(self, const uint8_t[::1] packet not None, double now):
        """The verdict on a packet, None to ask the chain; and the elements that have to be told of it, a bit each."""
        self.now = now
        cdef uint8_t index = self.look(&packet[0] if packet.shape[0] else NULL, packet.shape[0], packet.shape[0], True)
        return (None, 0) if index == ASK else (self.verdicts[index], self.tells)

    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil:
        cdef View view
        cdef uint8_t index = PASS
        if not self._begin(packet, copied, &view):
            return ASK
        if self.decides:
            index = self._decide(&view)
        return self._answered(&view, I_ACCEPT if index == PASS else index)

    cdef uint8_t _answered(self, const View *view, uint8_t index) noexcept nogil:
        """The index of the verdict, of which steps have heard."""
        self._end(True)
        if self.amends:
            index = self._amend(index)
        if index == I_DROP:
            index = self.dropped
        if self.hears:
            self._hear(view, index)
        return index

    cdef bint _begin(self, const uint8_t *packet, size_t copied, View *view) noexcept nogil:
        """Begin with a packet. False where the chain has to be asked about it."""
        self.tells = 0
        view.now = self.now
        self.first.begin()
        self.second.begin()
        self.third.begin()
        self.fourth.begin()
        if self.reads_headers and not read_headers(packet, copied, view):
            return False
        return not (self.amends and self._asks())

    cdef void _end(self, bint answered) noexcept nogil:
        self.first.end(answered)
        self.second.end(answered)
        self.third.end(answered)
        self.fourth.end(answered)

    cdef bint _asks(self) noexcept nogil:
        return self.first.asks() or self.second.asks() or self.third.asks() or self.fourth.asks()

    cdef uint8_t _amend(self, uint8_t index) noexcept nogil:
        return self.fourth.amend(self.third.amend(self.second.amend(self.first.amend(index))))

    cdef bint _would_tell(self, const View *view, uint8_t index) noexcept nogil:
        """Whether an element that reads flows would be told of a packet with this verdict."""
        cdef uint8_t said = self.first.would_hear(view, index)
        if said == H_TELL and self.first.by_flow:
            return True
        if said != H_END:
            said = self.second.would_hear(view, index)
            if said == H_TELL and self.second.by_flow:
                return True
        if said != H_END:
            said = self.third.would_hear(view, index)
            if said == H_TELL and self.third.by_flow:
                return True
        return said != H_END and self.fourth.by_flow and self.fourth.would_hear(view, index) == H_TELL

    cdef uint8_t _decide(self, const View *view) noexcept nogil:
        cdef uint8_t index = self.first.decide(view)
        if index == PASS:
            index = self.second.decide(view)
        if index == PASS:
            index = self.third.decide(view)
        if index == PASS:
            index = self.fourth.decide(view)
        return index

    cdef void _hear(self, const View *view, uint8_t index) noexcept nogil:
        cdef uint8_t said = self.first.hear(view, index)
        if said == H_TELL:
            self.tells |= 1
        if said != H_END:
            said = self.second.hear(view, index)
            if said == H_TELL:
                self.tells |= 2
        if said != H_END:
            said = self.third.hear(view, index)
            if said == H_TELL:
                self.tells |= 4
        if said != H_END and self.fourth.hear(view, index) == H_TELL:
            self.tells |= 8
