# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""What a queue's socket holds, many messages in one call: the few steps that every packet costs, compiled.

It finds packets in messages, their numbers and five-tuples, and looks verdicts up; which verdict a packet gets, it does not know.
Message formats are those of linux/netfilter/nfnetlink_queue.h; netlink(7).
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<arpa/inet.h>" nogil:
    uint32_t ntohl(uint32_t)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)

cdef enum:
    # NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET
    MSG_PACKET = 3 << 8
    # NFQNL_MSG_VERDICT and NFQNL_MSG_VERDICT_BATCH, and where a message says what it is
    MSG_VERDICT = 3 << 8 | 1
    MSG_VERDICT_BATCH = 3 << 8 | 3
    TYPE = 4
    # enum nfqnl_attr_type
    A_PACKET_HDR = 1
    A_INDEV = 5
    A_OUTDEV = 6
    A_PAYLOAD = 10
    # struct nlmsghdr and struct nfgenmsg; the packet header is the first attribute (nfqnl_build_packet_message()).
    HEADER = 20
    ID = 24
    SHORTEST = 32
    # Where a verdict message has the packet's number.
    VERDICT_ID = 28
    LONGEST_VERDICT = 64
    TCP = 6
    UDP = 17
    # Hook and interfaces, then protocol, addresses and ports.
    PLACE = 9
    FIVE_TUPLE = 1 + 36
    LONGEST_KEY = PLACE + FIVE_TUPLE
    # Places for five-tuples whose verdict is remembered within a turn, the latest in each: as many as 6 bits tell apart.
    RECENT = 64
    # Packets that a turn asks about before any is answered: what is asked may be slow.
    ASKED = 256
    # While it spins, the clock is looked at once in so many looks at the socket.
    LOOKS = 8
    # If a packet was there alone, so many that follow are answered without a look whether there are more, which would be a system
    # call for each.
    ALONE = 16
    # Nanoseconds after which a turn that waits for packets ends, though more come.
    LONGEST_TURN = 50000000


cdef inline bint is_packet(const uint8_t *message, ssize_t size, uint32_t *identity) noexcept nogil:
    cdef uint16_t length
    if size < SHORTEST or (<const uint16_t *>(message + TYPE))[0] != MSG_PACKET:
        return False
    length = (<const uint16_t *>(message + HEADER))[0]
    if (<const uint16_t *>(message + HEADER + 2))[0] != A_PACKET_HDR or length < 4 or HEADER + length > size:
        return False
    identity[0] = ntohl((<const uint32_t *>(message + ID))[0])
    return True


cdef size_t five_tuple(const uint8_t *packet, size_t size, uint8_t *key) noexcept nogil:
    """Write the five-tuple of a whole TCP or UDP packet with plain headers; how long it is, 0 for any other packet."""
    if size >= 24 and packet[0] == 0x45:
        # No fragment; DF may be set.
        if (packet[9] != TCP and packet[9] != UDP) or packet[6] & 0xBF or packet[7]:
            return 0
        key[0] = packet[9]
        memcpy(key + 1, packet + 12, 12)
        return 13
    if size >= 44 and packet[0] >> 4 == 6 and (packet[6] == TCP or packet[6] == UDP):
        key[0] = packet[6]
        memcpy(key + 1, packet + 8, 36)
        return 37
    return 0


cdef size_t key_of(const uint8_t *message, size_t size, uint8_t *key) noexcept nogil:
    """Write what verdicts are known by; how long it is, 0 where there is no such key."""
    cdef size_t offset = HEADER, length
    cdef uint16_t kind
    cdef const uint8_t *payload = NULL
    cdef size_t copied = 0
    # An interface that is not given has the number 0.
    for length in range(PLACE):
        key[length] = 0
    while offset + 4 <= size:
        length = (<const uint16_t *>(message + offset))[0]
        kind = (<const uint16_t *>(message + offset + 2))[0] & 0x3FFF
        if length < 4 or offset + length > size:
            break
        if kind == A_PACKET_HDR and length >= 11:
            key[0] = message[offset + 10]
        elif kind == A_INDEV and length >= 8:
            memcpy(key + 1, message + offset + 4, 4)
        elif kind == A_OUTDEV and length >= 8:
            memcpy(key + 5, message + offset + 4, 4)
        elif kind == A_PAYLOAD:
            payload = message + offset + 4
            copied = length - 4
        offset += (length + 3) & ~<size_t>3
    if payload == NULL:
        return 0
    length = five_tuple(payload, copied, key + PLACE)
    return length + PLACE if length else 0


def five_tuple_of(const uint8_t[::1] packet not None):
    """Protocol, addresses and ports of a whole TCP or UDP packet with plain headers, as bytes; else None."""
    cdef uint8_t key[FIVE_TUPLE]
    cdef size_t length = five_tuple(&packet[0], packet.shape[0], key) if packet.shape[0] else 0
    return PyBytes_FromStringAndSize(<char *>key, length) if length else None


cdef inline int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * <int64_t>1000000000 + time.tv_nsec


cdef struct Answered:
    # A key that was looked up, and the verdict that was found; good as long as nothing was forgotten since.
    uint64_t era
    size_t length
    uint8_t key[LONGEST_KEY]
    PyObject *verdict


cdef inline size_t slot(const uint8_t *key, size_t length) noexcept nogil:
    """Where a key is remembered: by its addresses and ports."""
    cdef uint32_t mixed = 0, word
    cdef size_t offset = PLACE + 1
    while offset < length:
        memcpy(&word, key + offset, 4)
        mixed ^= word
        offset += 4
    # The golden ratio spreads them; the upper 6 bits are as many as there are places.
    return (mixed * <uint32_t>0x9E3779B1) >> 26


cdef class Inbox:
    """The messages that wait in the socket `descriptor`, which stays the caller's.

    room: bytes for a message. Messages that are no packets (the kernel's refusals) are passed over. Methods raise OSError with the
    kernel's errno; a message that did not fit into the socket's own buffer is no error here, the socket counts it.
    """

    cdef int descriptor
    cdef size_t room
    cdef uint8_t *buffer
    # What the turn has found so far: how many, the first and the latest, and the run that goes on.
    cdef unsigned int count
    cdef unsigned int asked
    cdef uint32_t first
    cdef uint32_t latest
    cdef unsigned int begun
    cdef object current
    cdef list runs
    cdef uint64_t era
    cdef Answered recent[RECENT]
    # The verdict that is sent again and again, each time with another number; and how many may be answered without looking on.
    cdef uint8_t verdict[LONGEST_VERDICT]
    cdef size_t verdict_length
    cdef unsigned int unlooked

    def __cinit__(self, int descriptor, size_t room):
        if room < SHORTEST:
            raise ValueError(f"{room} bytes are too few for a message")
        self.descriptor = descriptor
        self.room = room
        self.buffer = <uint8_t *>malloc(room)
        if self.buffer == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.buffer)

    # All that waits, to be answered by the caller.

    def skim(self, unsigned int budget, pending):
        """Take up to `budget` packets that wait; how many, and the numbers of the first and the last.

        pending: messages that were read before, which come first and are taken off.
        """
        cdef ssize_t size
        self._begin()
        while pending and self.count < budget:
            message = pending.popleft()
            self._skimmed(message, len(message))
        with nogil:
            while self.count < budget:
                size = self._take(MSG_DONTWAIT, SHORTEST)
                if size <= 0:
                    break
                self._skimmed(self.buffer, size)
        return self.count, self.first, self.latest

    def sort(self, unsigned int budget, pending, dict known, decide):
        """The same, and look each one's verdict up in `known`; what is not there, `decide` is asked.

        decide: takes the message and the key under which the verdict may be kept, None where there is no such key. It is asked 256
        times at most. Returns how many packets, the number of the first, and the runs: number of the last, how many, verdict.
        """
        cdef ssize_t size
        self._begin()
        while pending and self.count < budget and self.asked < ASKED:
            message = pending.popleft()
            self._sorted(message, len(message), known, decide)
        while self.count < budget and self.asked < ASKED:
            # It does not wait: letting go of the interpreter would cost more than the call.
            size = self._take(MSG_DONTWAIT, self.room)
            if size <= 0:
                break
            self._sorted(self.buffer, size, known, decide)
        return self._sum_up()

    # Answered as they come: one by one, or as many as are there at once.

    def skim_each(self, unsigned int budget, pending, const uint8_t[::1] verdict not None, unsigned int together, double spin):
        """Wait for packets and answer them with this verdict message as they come; what `skim` returns.

        together: how many may be answered by one message, if they are there at once: all that wait up to the last of them. 1 where
        others wait that are not to be answered. It ends when `budget` are answered, after 50 milliseconds of packets, or when none has
        come for as long as the socket waits (SO_RCVTIMEO); or, if `spin` is not 0, none for `spin` seconds in which the socket was
        looked at all the time.
        """
        cdef int64_t patience = <int64_t>(spin * 1e9), end = now() + LONGEST_TURN
        cdef ssize_t size = 1
        self._begin()
        self._keep(verdict)
        while pending and self.count < budget:
            message = pending.popleft()
            if self._skimmed(message, len(message)):
                self._answer(MSG_VERDICT)
        with nogil:
            while size > 0:
                size = self._answer_same(budget, NULL, together, patience, end)
        return self.count, self.first, self.latest

    def sort_each(
        self, unsigned int budget, pending, dict known, decide, const uint8_t[::1] accept not None, accepted, answer,
        unsigned int together, double spin,
    ):
        """The same with verdicts looked up; what `sort` returns.

        accept: the message for the verdict `accepted`. answer: takes the number of the packet and any other verdict, and sends it.
        """
        cdef int64_t patience = <int64_t>(spin * 1e9), end = now() + LONGEST_TURN
        cdef ssize_t size
        self._begin()
        self._keep(accept)
        while self.count < budget:
            if pending:
                message = pending.popleft()
                found = self._sorted(message, len(message), known, decide)
            else:
                with nogil:
                    size = self._answer_same(budget, <PyObject *>accepted, together, patience, end)
                if size <= 0:
                    break
                found = self._sorted(self.buffer, size, known, decide)
            if not found:
                continue
            if self.current is accepted:
                self._answer(MSG_VERDICT)
            else:
                answer(self.latest, self.current)
        return self._sum_up()

    # What they share.

    cdef void _begin(self):
        self.count = self.begun = self.asked = 0
        self.first = self.latest = 0
        self.current = None
        self.runs = []
        # What was known in the turn before may have changed.
        self.era += 1

    cdef int _keep(self, const uint8_t[::1] verdict) except -1:
        self.verdict_length = verdict.shape[0]
        if not VERDICT_ID + 4 <= self.verdict_length <= LONGEST_VERDICT:
            raise ValueError(f"{self.verdict_length} bytes are no verdict message")
        memcpy(self.verdict, &verdict[0], self.verdict_length)
        return 0

    cdef inline void _count(self, uint32_t identity) noexcept nogil:
        if self.count == 0:
            self.first = identity
        self.latest = identity
        self.count += 1

    cdef ssize_t _take(self, int flags, size_t wanted) except -1 nogil:
        """The first `wanted` bytes of one message, in the buffer: how many, 0 if none is there or a signal came.

        Who asks for no more than it looks at saves the processor from fetching the rest, which another one wrote.
        """
        cdef ssize_t size
        while True:
            size = recv(self.descriptor, self.buffer, wanted, flags)
            if size >= 0:
                return size
            if errno == EAGAIN or errno == EINTR:
                return 0
            # Some did not fit into the socket's buffer. The others did.
            if errno != ENOBUFS:
                with gil:
                    PyErr_SetFromErrno(OSError)

    cdef ssize_t _await(self, int64_t patience, int64_t end, size_t wanted) except -1 nogil:
        """The same of the next message, for which it waits; 0 also if none came in time, or the turn is to end."""
        cdef int64_t limit = 0
        cdef unsigned int looks = 0
        cdef ssize_t size
        if now() >= end:
            return 0
        if not patience:
            return self._take(0, wanted)
        while True:
            size = self._take(MSG_DONTWAIT, wanted)
            if size > 0:
                return size
            if looks % LOOKS == 0:
                if limit == 0:
                    limit = now() + patience
                elif now() >= limit:
                    return 0
            looks += 1

    cdef ssize_t _answer_same(
        self, unsigned int budget, PyObject *accepted, unsigned int together, int64_t patience, int64_t end
    ) except -1 nogil:
        """Wait for packets and answer them, until one comes whose verdict has to be looked up: its size, 0 at the end of the turn.

        accepted: the verdict of which the message is kept; NULL if every packet gets it. As long as it stays the same, nothing of
        Python is needed.
        """
        cdef size_t wanted = SHORTEST if accepted == NULL else self.room
        cdef unsigned int taken = 0
        cdef ssize_t size
        cdef bint same
        while True:
            size = 0
            if self.count < budget:
                size = self._take(MSG_DONTWAIT, wanted) if taken else self._await(patience, end, wanted)
            same = size > 0 and (self._skimmed(self.buffer, size) if accepted == NULL else self._remembered(size, accepted))
            taken += same
            if same and taken < together and not self.unlooked:
                continue
            if taken:
                self._answer(MSG_VERDICT if taken == 1 else MSG_VERDICT_BATCH)
                if self.unlooked:
                    self.unlooked -= 1
                elif taken == 1 and size <= 0 and self.count < budget:
                    self.unlooked = ALONE
                taken = 0
                if same or size <= 0:
                    continue
            return size

    cdef int _answer(self, uint16_t kind) except -1 nogil:
        """Answer the latest packet, or all that wait up to it."""
        (<uint16_t *>(self.verdict + TYPE))[0] = kind
        (<uint32_t *>(self.verdict + VERDICT_ID))[0] = ntohl(self.latest)
        if send(self.descriptor, self.verdict, self.verdict_length, 0) < 0:
            with gil:
                PyErr_SetFromErrno(OSError)
        return 0

    cdef inline bint _skimmed(self, const uint8_t *message, ssize_t size) noexcept nogil:
        """Look at one message for its number; False if it is no packet."""
        cdef uint32_t identity
        if not is_packet(message, size, &identity):
            return False
        self._count(identity)
        return True

    cdef bint _goes_on(self, const uint8_t *key, size_t length) noexcept nogil:
        """Whether a packet with this key is known to get the verdict of the run that goes on."""
        cdef Answered *place = &self.recent[slot(key, length)]
        if place.era != self.era or place.verdict != <PyObject *>self.current:
            return False
        return place.length == length and memcmp(place.key, key, length) == 0

    cdef bint _remembered(self, size_t size, PyObject *verdict) noexcept nogil:
        """Count the packet in the buffer, if the run that goes on has this verdict and the packet is known to get it, too."""
        cdef uint8_t key[LONGEST_KEY]
        cdef uint32_t identity
        cdef size_t length
        if <PyObject *>self.current != verdict or not is_packet(self.buffer, size, &identity):
            return False
        length = key_of(self.buffer, size, key)
        if length == 0 or not self._goes_on(key, length):
            return False
        self._count(identity)
        return True

    cdef bint _sorted(self, const uint8_t *message, size_t size, dict known, decide) except -1:
        """Look at one message; False if it is no packet."""
        cdef uint8_t key[LONGEST_KEY]
        cdef uint32_t identity
        cdef size_t length
        cdef PyObject *found = NULL
        cdef Answered *place
        if not is_packet(message, size, &identity):
            return False
        length = key_of(message, size, key)
        if length and self._goes_on(key, length):
            self._count(identity)
            return True
        named = PyBytes_FromStringAndSize(<char *>key, length) if length else None
        if length:
            found = PyDict_GetItem(known, named)
        if found == NULL:
            self.asked += 1
            verdict = decide(PyBytes_FromStringAndSize(<char *>message, size), named)
            # It may have changed what is known; nobody else holds the verdicts.
            self.era += 1
        else:
            verdict = <object>found
            place = &self.recent[slot(key, length)]
            place.era = self.era
            place.length = length
            place.verdict = found
            memcpy(place.key, key, length)
        if verdict is not self.current:
            if self.count:
                self.runs.append((self.latest, self.count - self.begun, self.current))
            self.current = verdict
            self.begun = self.count
        self._count(identity)
        return True

    cdef tuple _sum_up(self):
        if self.count:
            self.runs.append((self.latest, self.count - self.begun, self.current))
        runs, self.runs, self.current = self.runs, [], None
        return self.count, self.first, runs
