# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The reader of a queue: every packet of the agent and of the library comes through here, many messages in one call.

It receives messages, makes packets of them, or looks up their verdicts. It does not decide which verdict a packet gets.
packet_message.pxd knows the message format.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from .glance cimport looks_before_sleep, weigh
from .outbox cimport Cutter, Outbox
from .packet_message cimport (
    A_GID, A_HWADDR, A_INDEV, A_OUTDEV, A_PHYSINDEV, A_PHYSOUTDEV, A_TIMESTAMP, A_UID, FIVE_TUPLE, LONGEST_KEY, PLACE, SHORTEST, TCP,
    TYPE, Attributes, find_attributes, five_tuple, is_joined, is_packet, key_of, made, ntohl, ntohs, number, seconds_of,
)
from .recent cimport has_verdict, keep_verdict

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)


def five_tuple_of(const uint8_t[::1] packet not None):
    """Protocol, addresses and ports of a whole TCP or UDP packet with plain headers, as bytes; else None."""
    cdef uint8_t key[FIVE_TUPLE]
    cdef size_t length = five_tuple(&packet[0], packet.shape[0], key) if packet.shape[0] else 0
    return PyBytes_FromStringAndSize(<char *>key, length) if length else None


def rare_fields(const uint8_t[::1] message not None):
    """The fields of a packet that are rarely used, from its message up to the payload, or from the whole of it.

    Returns indev, outdev, physindev, physoutdev (0 for none), uid, gid, hw_address and time in seconds (None for none).
    """
    cdef Attributes found
    cdef const uint8_t *data = &message[0]
    cdef size_t length
    find_attributes(data, message.shape[0], &found)
    uid = gid = address = time = None
    if found.length[A_UID] >= 4:
        uid = number(data, &found, A_UID)
    if found.length[A_GID] >= 4:
        gid = number(data, &found, A_GID)
    if found.length[A_HWADDR] >= 12:
        # struct nfqnl_msg_packet_hw: length, padding, 8 bytes of address.
        length = ntohs((<const uint16_t *>(data + found.at[A_HWADDR]))[0])
        address = PyBytes_FromStringAndSize(<const char *>data + found.at[A_HWADDR] + 4, min(length, <size_t>8))
    if found.length[A_TIMESTAMP] >= 16:
        time = seconds_of(data, &found)
    return (
        number(data, &found, A_INDEV), number(data, &found, A_OUTDEV), number(data, &found, A_PHYSINDEV),
        number(data, &found, A_PHYSOUTDEV), uid, gid, address, time,
    )


cdef class Inbox:
    """The messages that wait in the socket `descriptor`, which stays the caller's.

    room: bytes for a message. make: makes a packet of its number, hook, ethertype, mark, length, whether it is offloaded (GSO), its
    payload, and the message up to the payload. Messages that are not packets (the kernel's refusals) are skipped. Methods raise
    OSError with the kernel's errno; a message that did not fit into the socket's own buffer is not an error here, the socket counts it.

    count, latest: how many packets the turn has taken so far, and the number of the last one; also of a turn that an exception ended.
    polls, found, polled: how often it polled, how often a packet came of it, and the nanoseconds of all.
    """

    def __cinit__(self, int descriptor, size_t room, make):
        if room < SHORTEST:
            raise ValueError(f"{room} bytes are too few for a message")
        self.descriptor = descriptor
        self.room, self.least = room, SHORTEST
        self.make = make
        self.buffer = <uint8_t *>malloc(room)
        if self.buffer == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.buffer)

    def send_through(self, Outbox outbox):
        """From now on send verdicts through `outbox`, of the same socket."""
        self.outbox = outbox
        if self.cutter is not None:
            self.cutter.outbox = outbox

    def cut_joined(self, Cutter cutter not None):
        """From now on `cutter` has packets of many datagrams cut; they come again one by one, and are not read before."""
        self.cutter = cutter

    # All that waits, to be answered by the caller.

    def read(self, unsigned int budget, pending):
        """Take up to `budget` packets that wait, as a list of what `make` made of each.

        pending: messages that were read before, which come first and are taken off.
        """
        cdef ssize_t size
        cdef list packets = []
        self._begin()
        while pending and self.count < budget:
            message = pending.popleft()
            self._read(message, len(message), packets)
        while self.count < budget:
            size = self._take(MSG_DONTWAIT, self.room)
            if size <= 0:
                break
            self._read(self.buffer, size, packets)
        return packets

    def skim(self, unsigned int budget, pending):
        """Take up to `budget` packets without looking at them. Returns how many, and the numbers of the first and the last."""
        cdef ssize_t size
        self._begin()
        while pending and self.count < budget:
            message = pending.popleft()
            self._skimmed(message, len(message))
        with nogil:
            while self.count < budget:
                size = self._take(MSG_DONTWAIT, self.least)
                if size <= 0:
                    break
                self._skimmed(self.buffer, size)
        return self.count, self.first, self.latest

    def sort(self, unsigned int budget, pending, dict known, decide):
        """Take packets and look up each one's verdict in `known`; `decide` is asked about a packet that is not there.

        decide: takes the packet and the key under which the verdict may be kept, None where there is no such key. It is asked 256
        times at most. Returns how many packets, the number of the first, and the runs: number of the last, how many, verdict.
        """
        cdef ssize_t size
        self._begin()
        while pending and self.count < budget and self.asked < ASKED:
            message = pending.popleft()
            self._sorted(message, len(message), known, decide)
        while self.count < budget and self.asked < ASKED:
            # It does not wait: releasing the interpreter would cost more than the call.
            size = self._take(MSG_DONTWAIT, self.room)
            if size <= 0:
                break
            self._sorted(self.buffer, size, known, decide)
        return self._sum_up()

    # Answered as they come: one by one, or as many as are there at once.

    def skim_each(self, unsigned int budget, pending, const uint8_t[::1] verdict not None, unsigned int together, double spin):
        """Wait for packets and answer them with this verdict message as they come. Returns what `skim` returns.

        together: how many may be answered by one message, if they are there at once: all that wait up to the last of them. 1 where
        others wait that are not to be answered. It ends when `budget` are answered, after 50 milliseconds of packets, or when none has
        come for as long as the socket waits (SO_RCVTIMEO). spin: seconds to poll for each packet before it waits so, asleep.
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
        """The same with verdicts that are looked up. Returns what `sort` returns.

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
                self._note_first()
        return self._sum_up()

    # Shared parts.

    cdef void _begin(self):
        self.count = self.begun = self.asked = 0
        self.taken_at = self.first_took = 0
        self.first = self.latest = 0
        self.current = None
        self.runs = []
        # `known` may have changed since the last turn.
        self.era += 1

    cdef int _keep(self, const uint8_t[::1] verdict) except -1:
        self.verdict_length = verdict.shape[0]
        if not VERDICT_ID + 4 <= self.verdict_length <= LONGEST_VERDICT:
            raise ValueError(f"{self.verdict_length} bytes are not a verdict message")
        memcpy(self.verdict, &verdict[0], self.verdict_length)
        return 0

    cdef inline void _count(self, uint32_t identity) noexcept nogil:
        if self.count == 0:
            self.first = identity
        self.latest = identity
        self.count += 1

    cdef ssize_t _take(self, int flags, size_t wanted) except -1 nogil:
        """Receive the first `wanted` bytes of one message into the buffer. Returns how many, 0 if none waits or a signal came.

        Asking for no more than is looked at saves this processor from fetching the rest, which another processor wrote.
        """
        cdef ssize_t size
        while True:
            size = recv(self.descriptor, self.buffer, wanted, flags)
            if size >= 0:
                if self.count == 0:
                    self.taken_at = now()
                return size
            if errno == EAGAIN or errno == EINTR:
                return 0
            # Some messages did not fit into the socket's buffer; the others did.
            if errno != ENOBUFS:
                with gil:
                    PyErr_SetFromErrno(OSError)

    cdef ssize_t _await(self, int64_t patience, int64_t end, size_t wanted) except -1 nogil:
        """The same, waiting for the message: polling for `patience` first, or looking a few times. Returns 0 also at the turn's end."""
        cdef int64_t begin = now()
        cdef unsigned int looks = 0, most = 0
        cdef ssize_t size = 0
        if begin >= end:
            return 0
        if not patience:
            most = looks_before_sleep(&self.glance)
        while size <= 0 and (looks < most or (patience and (looks % LOOKS or looks == 0 or now() - begin < patience))):
            size = self._take(MSG_DONTWAIT, wanted)
            looks += size <= 0
        # A message that was there at once was not looked for.
        if looks and most:
            weigh(&self.glance, size > 0)
        elif looks:
            self.polls += 1
            self.polled += now() - begin
            self.found += size > 0
        return size if size > 0 else self._take(0, wanted)

    cdef ssize_t _answer_same(
        self, unsigned int budget, PyObject *accepted, unsigned int together, int64_t patience, int64_t end
    ) except -1 nogil:
        """Wait for packets and answer them, until one comes whose verdict has to be looked up. Returns its size, 0 at the end of the turn.

        accepted: the verdict of which the message is kept; NULL if every packet gets it. As long as it stays the same, nothing of
        Python is needed.
        """
        cdef size_t wanted = self.least if accepted == NULL else self.room
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
        if self.outbox is not None:
            self.outbox.answer(self.verdict, self.verdict_length)
        elif send(self.descriptor, self.verdict, self.verdict_length, 0) < 0:
            with gil:
                PyErr_SetFromErrno(OSError)
        self._note_first()
        return 0

    cdef inline void _note_first(self) noexcept nogil:
        if self.first_took == 0 and self.taken_at:
            self.first_took = now() - self.taken_at

    cdef bint _is_joined(self, const uint8_t *message, size_t size) noexcept nogil:
        """Whether a packet is one of many datagrams that is to be cut."""
        cdef Attributes found
        if self.cutter is None:
            return False
        find_attributes(message, size, &found)
        return is_joined(message, &found)

    cdef int _read(self, const uint8_t *message, size_t size, list packets) except -1:
        cdef uint32_t identity
        if not is_packet(message, size, &identity):
            return 0
        if self._is_joined(message, size):
            self.cutter.cut(identity)
        else:
            # Counted first: an exception out of `make` must not hide that the packet was taken.
            self._count(identity)
            packets.append(made(self.make, message, size, identity))
        return 0

    cdef bint _skimmed(self, const uint8_t *message, ssize_t size) noexcept nogil:
        """Count the packet of one message; False if the message is not a packet."""
        cdef uint32_t identity
        if not is_packet(message, size, &identity):
            return False
        self._count(identity)
        return True

    cdef bint _remembered(self, size_t size, PyObject *verdict) noexcept nogil:
        """Count the packet in the buffer if the current run has this verdict, and the packet is known to get it too."""
        cdef uint8_t key[LONGEST_KEY]
        cdef uint32_t identity
        cdef size_t length
        if <PyObject *>self.current != verdict or not is_packet(self.buffer, size, &identity):
            return False
        length = key_of(self.buffer, size, key)
        if length == 0 or not has_verdict(self.recent, self.era, key, length, verdict):
            return False
        if key[PLACE] != TCP and self._is_joined(self.buffer, size):
            return False
        self._count(identity)
        return True

    cdef bint _sorted(self, const uint8_t *message, size_t size, dict known, decide) except -1:
        """Find the verdict of one message's packet and count it; False if the message is not a packet."""
        cdef uint8_t key[LONGEST_KEY]
        cdef uint32_t identity
        cdef size_t length
        cdef PyObject *found = NULL
        if not is_packet(message, size, &identity):
            return False
        if self._is_joined(message, size):
            self.cutter.cut(identity)
            return False
        length = key_of(message, size, key)
        if length and has_verdict(self.recent, self.era, key, length, <PyObject *>self.current):
            self._count(identity)
            return True
        named = PyBytes_FromStringAndSize(<char *>key, length) if length else None
        if length:
            found = PyDict_GetItem(known, named)
        if found == NULL:
            self.asked += 1
            verdict = decide(made(self.make, message, size, identity), named)
            # It may have changed `known`, which alone keeps the verdicts alive.
            self.era += 1
        else:
            verdict = <object>found
            keep_verdict(self.recent, self.era, key, length, found)
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
