# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The reader of a queue whose packets get their verdicts without the interpreter, where they need not be shown to Python."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from ...answering cimport VERDICTS, Answering
from ...flow_entry cimport ASK
from .glance cimport Glance, looks_before_sleep, weigh
from .inbox cimport ALONE, ASKED, LONGEST_TURN, LONGEST_VERDICT, MSG_VERDICT, MSG_VERDICT_BATCH, VERDICT_ID, Inbox, now
from .packet_message cimport (
    A_CAP_LEN, A_MARK, A_PAYLOAD, A_SKB_INFO, A_TIMESTAMP, SHORTEST, SKB_GSO, Attributes, find_attributes, is_joined, is_packet, made, number,
    seconds_of,
)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT

cdef enum:
    # The index of a message that is not a packet.
    NO_PACKET = 254
    # Runs of one turn; it ends when there are no more.
    RUNS = 4096
    # Packets between two readings of the clock, where packets follow each other.
    LOOKED_AT = 8


cdef struct Run:
    uint32_t last
    uint32_t count
    uint8_t index


def glances_of(found):
    """How often a reader looks before each of its sleeps, where the attempts of glance.pxd end one after the other as `found` says."""
    cdef Glance glance = Glance(0, 0, 0, 0)
    cdef uint32_t looks
    cdef list all_looks = []
    for each in found:
        looks = 0
        while looks == 0:
            looks = looks_before_sleep(&glance)
            all_looks.append(looks)
        weigh(&glance, each)
    return all_looks


cdef class FlowInbox(Inbox):
    """An Inbox that also judges by a flow table, or by the compiled steps of a chain (nfq_agent.answering)."""

    cdef Run *stretches
    cdef unsigned int stretched
    # The verdict messages by index; those below `prepared` are there.
    cdef uint8_t messages[VERDICTS][LONGEST_VERDICT]
    cdef size_t lengths[VERDICTS]
    cdef unsigned int prepared
    cdef Answering table
    # Where packets are counted by their flows that are judged without them, or None.
    cdef Answering noted
    # Of the packet in the buffer, once it was looked at: the index of its verdict, and its number.
    cdef uint8_t index
    cdef uint32_t identity
    # Packets until the clock is read again.
    cdef unsigned int timed

    def __cinit__(self, *_):
        self.stretches = <Run *>malloc(RUNS * sizeof(Run))
        if self.stretches == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.stretches)

    def forget_messages(self):
        """The queue has another number: its verdict messages are made again."""
        self.prepared = 0

    def note_flows(self, Answering table, double now):
        """Count packets in this flow table that are judged without it, from now on; None to count none. now: monotonic seconds."""
        self.noted = table
        self.least = SHORTEST if table is None else self.room
        if table is not None:
            table.start_turn(now)

    def judge(self, unsigned int budget, pending, Answering table not None, double time, ask):
        """Take packets that wait, and find the verdict of each by its flow, or by `ask`.

        time: seconds, for the ages of flows. ask: takes a packet that has to be looked at, and settles its flow. It is asked 256
        times at most. Returns how many packets, the number of the first, the runs (number of the last, how many, verdict), and
        a packet with its verdict that no message of its own kind can give, or None: that is the last packet, and in no run.
        """
        return self._judge(budget, pending, table, time, ask, None, 0, 0)

    def judge_each(
        self, unsigned int budget, pending, Answering table not None, double time, ask, single, unsigned int together, double spin
    ):
        """The same, waiting for packets and answering each as it comes. Returns what `judge` returns.

        single: makes the message for a verdict. together: how many may be answered by one message, if they are there at once. It
        ends as `Inbox.skim_each` does. The packet with a verdict of no such kind is not answered.
        """
        return self._judge(budget, pending, table, time, ask, single, together, <int64_t>(spin * 1e9))

    cdef tuple _judge(
        self, unsigned int budget, pending, Answering table, double time, ask, single, unsigned int together, int64_t patience
    ):
        """One turn. single: None to take what waits and answer nothing."""
        cdef bint each = single is not None
        cdef int64_t end = now() + LONGEST_TURN if each else 0
        cdef ssize_t size
        cdef uint8_t index
        cdef const uint8_t *message
        cdef object special = None, kept
        cdef bint told = False
        self._begin_turn(table, time)
        if each:
            self._prepare(single)
        while self.count < budget and self.stretched < RUNS and not told and (each or self.asked < ASKED):
            if pending:
                kept = pending.popleft()
                message = kept
                size = len(kept)
                self._look(message, size)
            elif each:
                with nogil:
                    size = self._answer_known(budget, together, patience, end)
                message = self.buffer
            else:
                size = self._take(MSG_DONTWAIT, self.room)
                message = self.buffer
                if size > 0:
                    self._look(message, size)
            if size <= 0:
                break
            index = self.index
            if index == NO_PACKET:
                continue
            # Counted first: an exception out of `ask` must not hide that the packet was taken.
            self._count(self.identity)
            if index == ASK:
                self.asked += 1
                packet = made(self.make, message, size, self.identity)
                verdict = ask(packet)
                index = table.index_of(verdict)
                if index == ASK:
                    special = packet, verdict
                    break
                if each:
                    self._prepare(single)
                if table.hears:
                    table.heard.append((packet, verdict, 0))
                    told = each
            elif table.tells:
                self.asked += 1
                table.heard.append((made(self.make, message, size, self.identity), table.verdicts[index], table.tells))
                # They are told when the turn has ended.
                told = each
            self._note(index, self.identity)
            if each:
                self._send(index, MSG_VERDICT)
        return self._end_turn(special)

    cdef void _begin_turn(self, Answering table, double time):
        self._begin()
        self.stretched = 0
        self.table = table
        self.timed = 0
        table.start_turn(time)

    cdef tuple _end_turn(self, special):
        cdef unsigned int place
        cdef list verdicts = self.table.verdicts
        cdef list runs = []
        for place in range(self.stretched):
            runs.append((self.stretches[place].last, self.stretches[place].count, verdicts[self.stretches[place].index]))
        return self.count, self.first, runs, special

    cdef int _prepare(self, single) except -1:
        """Make the messages of verdicts that are new."""
        cdef const uint8_t[::1] message
        while self.prepared < <unsigned int>len(self.table.verdicts):
            message = single(0, self.table.verdicts[self.prepared])
            if not VERDICT_ID + 4 <= message.shape[0] <= LONGEST_VERDICT:
                raise ValueError(f"{message.shape[0]} bytes are not a verdict message")
            memcpy(self.messages[self.prepared], &message[0], message.shape[0])
            self.lengths[self.prepared] = message.shape[0]
            self.prepared += 1
        return 0

    cdef inline int _look(self, const uint8_t *message, size_t size) except -1 nogil:
        """Find the index of the verdict on the packet of a message, ASK, or NO_PACKET: also for a packet that is cut and comes again."""
        cdef Attributes found
        cdef size_t length
        cdef uint32_t info
        self.index = NO_PACKET
        if not is_packet(message, size, &self.identity):
            return 0
        find_attributes(message, size, &found)
        if self.cutter is not None and is_joined(message, &found):
            self.cutter.cut(self.identity)
            return 0
        length = found.length[A_PAYLOAD]
        self.index = ASK
        if length == 0:
            return 0
        if found.length[A_CAP_LEN] >= 4:
            length = number(message, &found, A_CAP_LEN)
        if self.table.timed:
            self._tell_time(message, &found)
        if self.table.marked:
            self.table.mark = number(message, &found, A_MARK)
        info = number(message, &found, A_SKB_INFO)
        self.table.joined = info & SKB_GSO
        # NFQA_SKB_CSUMNOTREADY and NFQA_SKB_GSO: the checksum is not that of the bytes.
        self.index = self.table.look(message + found.at[A_PAYLOAD], found.length[A_PAYLOAD], length, not info & 3)
        if self.noted is not None and self.index != ASK:
            self.noted.note(message + found.at[A_PAYLOAD], found.length[A_PAYLOAD], length)
        return 0

    # Packets that the reader judges without flows.

    cdef inline bint _noted(self, const uint8_t *message, size_t size) noexcept nogil:
        """Count a packet by its flow, where that is wanted. Always true."""
        cdef Attributes found
        cdef size_t length
        if self.noted is not None:
            find_attributes(message, size, &found)
            length = found.length[A_PAYLOAD]
            if length:
                if found.length[A_CAP_LEN] >= 4:
                    length = number(message, &found, A_CAP_LEN)
                self.noted.note(message + found.at[A_PAYLOAD], found.length[A_PAYLOAD], length)
        return True

    cdef bint _skimmed(self, const uint8_t *message, ssize_t size) noexcept nogil:
        return Inbox._skimmed(self, message, size) and self._noted(message, size)

    cdef bint _remembered(self, size_t size, PyObject *verdict) noexcept nogil:
        return Inbox._remembered(self, size, verdict) and self._noted(self.buffer, size)

    cdef bint _sorted(self, const uint8_t *message, size_t size, dict known, decide) except -1:
        return Inbox._sorted(self, message, size, known, decide) and self._noted(message, size)

    cdef inline void _tell_time(self, const uint8_t *message, const Attributes *found) noexcept nogil:
        """Let the table know when the packet came: by the kernel's stamp, else by the clock (Packet.time)."""
        cdef timespec time
        if found.length[A_TIMESTAMP] >= 16:
            self.table.now = seconds_of(message, found)
            self.timed = 0
        elif self.timed == 0:
            clock_gettime(CLOCK_REALTIME, &time)
            self.table.now = time.tv_sec + time.tv_nsec / 1e9
            self.timed = LOOKED_AT
        else:
            self.timed -= 1

    cdef inline void _note(self, uint8_t index, uint32_t identity) noexcept nogil:
        """Put a packet into the current run or into a new one."""
        cdef Run *run = &self.stretches[self.stretched - 1] if self.stretched else NULL
        if run == NULL or run.index != index:
            run = &self.stretches[self.stretched]
            self.stretched += 1
            run.index = index
            run.count = 0
        run.last = identity
        run.count += 1

    cdef inline int _send(self, uint8_t index, uint16_t kind) except -1 nogil:
        """Answer the latest packet, or all that wait up to it."""
        memcpy(self.verdict, self.messages[index], self.lengths[index])
        self.verdict_length = self.lengths[index]
        return self._answer(kind)

    cdef ssize_t _answer_known(
        self, unsigned int budget, unsigned int together, int64_t patience, int64_t end
    ) except -1 nogil:
        """Wait for packets and answer them, until one comes that has to be asked about. Returns its size, 0 at the end of the turn."""
        cdef unsigned int taken = 0
        cdef uint8_t index, current = ASK
        cdef ssize_t size
        while True:
            size = 0
            if self.count < budget and self.stretched < RUNS:
                if taken:
                    size = self._take(MSG_DONTWAIT, self.room)
                else:
                    # It may wait for long.
                    self.timed = 0
                    size = self._await(patience, end, self.room)
            index = ASK
            if size > 0:
                self._look(self.buffer, size)
                index = self.index
                if index == NO_PACKET:
                    continue
            if taken and (size <= 0 or index != current or self.table.tells):
                self._send(current, MSG_VERDICT if taken == 1 else MSG_VERDICT_BATCH)
                if taken == 1 and size <= 0 and self.count < budget:
                    self.unlooked = ALONE
                taken = 0
                if size <= 0:
                    continue
            if size <= 0 or index == ASK or self.table.tells:
                return size
            self._note(index, self.identity)
            self._count(self.identity)
            current = index
            taken += 1
            if taken >= together or self.unlooked:
                self._send(current, MSG_VERDICT if taken == 1 else MSG_VERDICT_BATCH)
                taken = 0
                if self.unlooked:
                    self.unlooked -= 1
