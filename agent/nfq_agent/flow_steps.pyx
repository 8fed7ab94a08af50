# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A flow table together with compiled elements that follow no flow, as `log` beside a policy. Pure: no I/O, no clock.

Where an element would be told of a packet, and says something of its flow, the flow is shown first.
"""

from libc.stdint cimport uint8_t

from .flow_entry cimport ASK
from .flow_table cimport FlowTable
from .step_chain cimport Steps
from .steps cimport I_ACCEPT, I_DROP, PASS, View

from nfq_agent.verdict import WOULD_DROP, Action


cdef class FlowSteps(Steps):
    """The steps beside `table`. first: those that judge do so before the flow is looked up; otherwise behind that, where the flow
    is accepted so far. The elements that follow the flow are then asked by the table alone.
    """

    cdef FlowTable table
    cdef bint first_of_all
    # What steps that hear are told of a verdict by its index, for so many of them.
    cdef uint8_t heard_as[256]
    cdef Py_ssize_t known

    def __init__(self, steps, bint monitor, FlowTable table not None, bint first):
        super().__init__(steps, monitor)
        self.table = table
        self.first_of_all = first
        self.verdicts = table.verdicts

    def judge(self, const uint8_t[::1] packet not None, size_t length, double now, double time, bint ready=True):
        """The verdict on a packet, None to ask the chain; and the elements that have to be told of it, a bit each.

        length: bytes of the packet before it was cut. now: monotonic seconds. time: seconds since the epoch. ready: its checksum
        is that of its bytes.
        """
        self.start_turn(now)
        self.now = time
        cdef uint8_t index = self.look(&packet[0] if packet.shape[0] else NULL, packet.shape[0], length, ready)
        return (None, 0) if index == ASK else (self.verdicts[index], self.tells)

    cdef int index_of(self, verdict) except -1:
        return self.table.index_of(verdict)

    cdef void start_turn(self, double now) noexcept:
        self.table.start_turn(now)
        self.marked = self.table.marked

    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil:
        cdef View view
        cdef uint8_t index = PASS, own
        if not self._begin(packet, copied, &view):
            return ASK
        if self.by_flow:
            self.table.shows_denied = self._would_tell(&view, I_DROP)
            # A drop may come of an accept here.
            self.table.shows = self.table.shows_denied if self.decides or self.amends else self._would_tell(&view, I_ACCEPT)
        if self.decides and self.first_of_all:
            index = self._decide(&view)
            if index != PASS:
                if self.table.shows or not self.table.note(packet, copied, length):
                    return self._left()
                return self._answered(&view, index)
        self.table.mark, self.table.joined = self.mark, self.joined
        index = self.table.look(packet, copied, length, ready)
        if index == ASK:
            return self._left()
        if self.decides and not self.first_of_all:
            own = self._decide(&view)
            index = index if own == PASS else own
        return self._answered(&view, index)

    cdef uint8_t _left(self) noexcept nogil:
        self._end(False)
        return ASK

    cdef void _hear(self, const View *view, uint8_t index) noexcept nogil:
        if index >= self.known:
            self._learn()
        Steps._hear(self, view, self.heard_as[index])

    cdef void _learn(self) noexcept with gil:
        """New verdicts: an accept with a mark is an accept for steps that hear."""
        while self.known < len(self.verdicts):
            verdict = self.verdicts[self.known]
            accepts = verdict.outcome is Action.ACCEPT and verdict is not WOULD_DROP
            self.heard_as[self.known] = I_ACCEPT if accepts else I_DROP
            self.known += 1
