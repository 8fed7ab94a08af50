# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Sends the verdict messages of one queue in fixed shapes, so that nothing else can be sent on the queue's socket (host/jail).

What is free in a message: verdict, packet number, mark, and for a packet that is rewritten all attributes of its one message.
Fixed is that it is a verdict, and on which queue. Beside verdicts, the queue's GSO flag may be off for the time of one verdict. It
takes the messages as messages.py and inbox.pyx make them.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from cpython.exc cimport PyErr_SetFromErrno

from ..jail.fixed cimport FixedMessages

cdef extern from "<arpa/inet.h>" nogil:
    uint32_t htonl(uint32_t)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int, const void *, size_t, int)

cdef enum:
    # struct nlmsghdr and struct nfgenmsg; the verdict's attribute header and body; a mark's.
    HEAD = 20
    ATTRIBUTE = 4
    BODY = 8
    MARK = 4
    PLAIN = 32
    MARKED = 40
    FLAGS = 6
    # Messages of one send: powers of two up to this.
    MOST = 64
    SIZES = 7
    # Shapes of one kind and form.
    REWRITES = 4 * SIZES
    # A message that rewrites a packet has one of these lengths.
    STEP = 256
    LONGEST = 65792
    # An attribute that the kernel does not know and passes over (nla_parse_deprecated()).
    FILLER = 0x3FFF
    # Where the messages of `messages.cutting` have the packet's number.
    CUT_ID = 64

    # The shape behind those.
    CUT = REWRITES + LONGEST // STEP

MSG_VERDICT = 3 << 8 | 1
MSG_VERDICT_BATCH = 3 << 8 | 3


cdef bytes _head(unsigned int length, unsigned int kind, unsigned int number):
    """struct nlmsghdr and struct nfgenmsg, as messages.py packs them: in the host's order, which is little-endian, but the number."""
    return int(length).to_bytes(4, "little") + int(kind).to_bytes(2, "little") + b"\1" + bytes(11) + int(number).to_bytes(2, "big")


def _shapes(unsigned int number, bytes cutting):
    shapes = []
    body, mark = b"\x0c\0\2\0", b"\x08\0\3\0"
    for kind in (MSG_VERDICT, MSG_VERDICT_BATCH):
        for length in (PLAIN, MARKED):
            head = _head(length, kind, number) + body
            one = [head, BODY] if length == PLAIN else [head, BODY, mark, MARK]
            shapes += [one * (1 << power) for power in range(SIZES)]
    for length in range(STEP, LONGEST + STEP, STEP):
        shapes.append([_head(length, MSG_VERDICT, number), length - HEAD])
    return [*shapes, [cutting[:CUT_ID], 4, cutting[CUT_ID + 4:]]]


cdef class Outbox:
    """The messages of queue `number`, sent on the socket `descriptor`, which stays the caller's. Methods raise OSError.

    cutting: of `messages.cutting`.
    """

    def __cinit__(self, int descriptor, unsigned int number, bytes cutting not None):
        self.descriptor = descriptor
        self.fixed = FixedMessages(_shapes(number, cutting))

    @property
    def headers(self):
        """Where the headers of all messages are, for the filter (FixedMessages.headers)."""
        return self.fixed.headers

    def send(self, const uint8_t[::1] messages not None):
        """Send one message, or many behind each other. Raises ValueError for one that is not a verdict of this queue."""
        cdef const uint8_t *at = &messages[0] if messages.shape[0] else NULL
        cdef size_t left = messages.shape[0], length, run
        cdef unsigned int count
        while left:
            if left < HEAD:
                raise ValueError("not a message")
            length = (<const uint32_t *>at)[0]
            if length > left or length % 4 or (length != PLAIN and length != MARKED and length < PLAIN):
                raise ValueError(f"a message of {length} bytes is not a verdict")
            if length != PLAIN and length != MARKED:
                self._rewrite(at, length)
                at += length
                left -= length
                continue
            count = 1
            # Neighbours of one kind and form go together.
            while count < MOST and (count + 1) * length <= left and memcmp(at, at + count * length, 8) == 0:
                count += 1
            run = 1
            while run * 2 <= count:
                run *= 2
            self._group(at, length, run)
            at += run * length
            left -= run * length

    cdef int cut(self, uint32_t identity) except -1 nogil:
        """Send the messages that have a packet cut; identity: its number, in network order."""
        (<uint32_t *>self.fixed.cells)[0] = identity
        return self.fixed.post(self.descriptor, CUT)

    cdef int answer(self, const uint8_t *message, size_t length) except -1 nogil:
        """Send one message without Python."""
        if length != PLAIN and length != MARKED:
            with gil:
                raise ValueError(f"a message of {length} bytes is not a plain verdict")
        return self._group(message, length, 1)

    cdef int _group(self, const uint8_t *messages, size_t size, unsigned int count) except -1 nogil:
        cdef uint8_t *cells = self.fixed.cells
        cdef uint16_t kind = (<const uint16_t *>(messages + 4))[0]
        cdef unsigned int shape = 0, power = 0, each
        if (<const uint16_t *>(messages + FLAGS))[0] != 1:
            with gil:
                raise ValueError("a request that is acknowledged is not a verdict that can be sent here")
        if kind == 0x303:
            shape = 2 * SIZES
        elif kind != 0x301:
            with gil:
                raise ValueError(f"a message of kind {kind:#x} is not a verdict")
        if size == MARKED:
            shape += SIZES
        while <unsigned int>1 << power < count:
            power += 1
        for each in range(count):
            memcpy(cells, messages + HEAD + ATTRIBUTE, BODY)
            cells += BODY
            if size == MARKED:
                memcpy(cells, messages + PLAIN + ATTRIBUTE, MARK)
                cells += MARK
            messages += size
        return self.fixed.post(self.descriptor, shape + power)

    cdef int _rewrite(self, const uint8_t *message, size_t length) except -1 nogil:
        """A message with the packet's new bytes, filled up to the next length that there is."""
        cdef uint8_t *cells = self.fixed.cells
        cdef size_t whole = (length + STEP - 1) // STEP * STEP
        cdef size_t rest = whole - length
        if whole > LONGEST:
            with gil:
                raise ValueError(f"a message of {length} bytes is too long")
        memcpy(cells, message + HEAD, length - HEAD)
        if rest:
            memset(cells + length - HEAD, 0, rest)
            (<uint16_t *>(cells + length - HEAD))[0] = <uint16_t>rest
            (<uint16_t *>(cells + length - HEAD + 2))[0] = FILLER
        return self.fixed.post(self.descriptor, REWRITES + <unsigned int>(whole // STEP) - 1)


cdef class Cutter:
    """Has the kernel cut packets that are many datagrams: one is queued again while the queue's GSO flag is off.

    The kernel cuts and queues it within the call (nfqnl_enqueue_packet() in net/netfilter/nfnetlink_queue.c). What other processors
    queue in that moment is cut too. messages: of `messages.cutting`. count: how many packets were cut. Methods raise OSError.
    """

    def __cinit__(self, int descriptor, bytes messages not None):
        self.length = len(messages)
        if not CUT_ID + 4 <= self.length <= LONGEST_CUT:
            raise ValueError(f"{self.length} bytes do not cut a packet")
        self.descriptor = descriptor
        memcpy(self.messages, <const char *>messages, self.length)

    cdef int cut(self, uint32_t identity) except -1 nogil:
        """Answer the packet of this number so that it comes again in parts."""
        self.count += 1
        if self.outbox is not None:
            return self.outbox.cut(htonl(identity))
        (<uint32_t *>(self.messages + CUT_ID))[0] = htonl(identity)
        if send(self.descriptor, self.messages, self.length, 0) < 0:
            with gil:
                PyErr_SetFromErrno(OSError)
        return 0
