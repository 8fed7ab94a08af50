# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Frames of an inline link that wait for their verdict: read together, sent on together. Compiled, for speed.

It looks verdicts up; which verdict a packet gets, it does not know. Formats are those of linux/if_packet.h and
linux/virtio_net.h; packet(7), recvmmsg(2).
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from ..answering cimport Answering
from ..flow_entry cimport ASK
from .frame cimport IS_OUTGOING, IS_SEGMENTED, IS_UNFINISHED, Found, find_packet, key_of
from .nfqueue.packet_message cimport FIVE_TUPLE, LONGEST_KEY, five_tuple

cdef extern from "<sys/socket.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """
    ctypedef unsigned int socklen_t
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    cdef struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    int MSG_DONTWAIT
    int MSG_TRUNC
    int SOL_SOCKET
    int SO_MARK
    int recvmmsg(int, mmsghdr *, unsigned int, int, void *)
    int sendmmsg(int, mmsghdr *, unsigned int, int)
    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    unsigned char *CMSG_DATA(cmsghdr *)
    size_t CMSG_SPACE(size_t)
    size_t CMSG_LEN(size_t)

cdef enum:
    # struct virtio_net_hdr, and room for the longest frame behind it
    VNET = 10
    GSO_TYPE = 1
    ROOM = 10 + 65536 + 64
    CONTROL = 64
    # The mark of what is on its way to a container; the other bits are the interface.
    TO_CONTAINER = 0x80000000

# Flags that `packet` returns.
OUTGOING = IS_OUTGOING
UNFINISHED = IS_UNFINISHED
SEGMENTED = IS_SEGMENTED


cdef struct Address:
    # struct sockaddr_ll
    uint16_t family
    uint16_t protocol
    int interface
    uint16_t kind
    uint8_t packet_type
    uint8_t length
    uint8_t address[8]


cdef class Frames:
    """Frames that wait for their verdict, a turn at a time: read together, sent on together.

    descriptor: the packet socket at our end of the pair, with PACKET_VNET_HDR and SO_RCVMARK. most: frames of a turn.
    """

    cdef int descriptor
    cdef int most
    cdef readonly int count
    cdef readonly uint64_t size
    cdef readonly uint64_t failed
    cdef readonly uint64_t crossed
    cdef uint8_t *memory
    cdef uint8_t *control
    cdef mmsghdr *incoming
    cdef mmsghdr *outgoing
    cdef iovec *vectors
    cdef iovec *sent
    cdef Address *addresses
    cdef uint32_t *marks

    def __init__(self, int descriptor, int most):
        cdef int number
        self.descriptor = descriptor
        self.most = most
        self.count = 0
        # Bytes of the frames of this turn, and frames that could not be sent or were cut.
        self.size = 0
        self.failed = 0
        # Frames that were sent over the pair.
        self.crossed = 0
        self.memory = <uint8_t *>malloc(<size_t>ROOM * most)
        self.control = <uint8_t *>calloc(most, CONTROL)
        self.incoming = <mmsghdr *>calloc(most, sizeof(mmsghdr))
        self.outgoing = <mmsghdr *>calloc(most, sizeof(mmsghdr))
        self.vectors = <iovec *>calloc(most, sizeof(iovec))
        self.sent = <iovec *>calloc(most, sizeof(iovec))
        self.addresses = <Address *>calloc(most, sizeof(Address))
        self.marks = <uint32_t *>calloc(most, sizeof(uint32_t))
        if (self.memory == NULL or self.control == NULL or self.incoming == NULL or self.outgoing == NULL
                or self.vectors == NULL or self.sent == NULL or self.addresses == NULL or self.marks == NULL):
            raise MemoryError
        for number in range(most):
            self.vectors[number].iov_base = self.memory + <size_t>ROOM * number
            self.vectors[number].iov_len = ROOM
            self.incoming[number].msg_hdr.msg_iov = &self.vectors[number]
            self.incoming[number].msg_hdr.msg_iovlen = 1
            self.incoming[number].msg_hdr.msg_control = self.control + CONTROL * number

    def __dealloc__(self):
        free(self.memory)
        free(self.control)
        free(self.incoming)
        free(self.outgoing)
        free(self.vectors)
        free(self.sent)
        free(self.addresses)
        free(self.marks)

    def receive(self, int budget):
        """Begin a turn: read up to `budget` frames that wait. Returns how many. Raises OSError."""
        cdef int number, got
        cdef cmsghdr *said
        self.count = 0
        self.size = 0
        if budget > self.most:
            budget = self.most
        for number in range(budget):
            self.incoming[number].msg_hdr.msg_controllen = CONTROL
        with nogil:
            got = recvmmsg(self.descriptor, self.incoming, budget, MSG_DONTWAIT | MSG_TRUNC, NULL)
        if got < 0:
            if errno != EAGAIN and errno != EINTR:
                PyErr_SetFromErrno(OSError)
            return 0
        for number in range(got):
            self.marks[number] = 0
            said = CMSG_FIRSTHDR(&self.incoming[number].msg_hdr)
            if said != NULL and said.cmsg_level == SOL_SOCKET and said.cmsg_type == SO_MARK:
                memcpy(&self.marks[number], CMSG_DATA(said), 4)
            self.size += self.incoming[number].msg_len - VNET
        self.count = got
        return got

    cdef bint _packet(self, int number, Found *found) noexcept nogil:
        cdef uint8_t *frame = self.memory + <size_t>ROOM * number
        cdef uint32_t length = self.incoming[number].msg_len
        if length <= VNET or length > ROOM or self.marks[number] == 0:
            return False
        if not find_packet(frame + VNET, length - VNET, length - VNET, found):
            return False
        if self.marks[number] & TO_CONTAINER:
            found.flags |= IS_OUTGOING
        # VIRTIO_NET_HDR_F_NEEDS_CSUM
        if frame[0] & 1:
            found.flags |= IS_UNFINISHED
        if frame[GSO_TYPE]:
            found.flags |= IS_SEGMENTED
        return True

    def packet(self, int number):
        """(payload, flags, ethertype, interface) of one frame; None where there is no packet in it."""
        cdef Found found
        if not self._packet(number, &found):
            return None
        payload = PyBytes_FromStringAndSize(<const char *>found.packet, found.copied)
        return payload, found.flags, found.kind, self.marks[number] & 0x7FFFFFFF

    def frame(self, int number):
        """A whole frame with its virtio header, and its mark: for `put`."""
        cdef uint32_t length = self.incoming[number].msg_len
        return PyBytes_FromStringAndSize(<const char *>self.memory + <size_t>ROOM * number, min(length, ROOM)), self.marks[number]

    def sort(self, dict known, decide, list runs):
        """Look the verdicts of this turn's frames up as `Ring.sort` does; for each frame a byte, 1 to send it on.

        decide(number, key or None): the verdict on one that is not in `known`. A run is one interface's: its index comes third.
        """
        cdef Found found
        cdef uint8_t key[LONGEST_KEY]
        cdef uint32_t interface, of_interface = 0
        cdef PyObject *cached
        cdef size_t length
        cdef int number
        cdef long of_run = 0
        cdef bint goes_on = False
        cdef bytearray going = bytearray(self.count)
        current = None
        for number in range(self.count):
            if not self._packet(number, &found):
                # Not a packet that can be judged; `send` checks whether the frame is from an interface.
                going[number] = 1
                continue
            interface = self.marks[number] & 0x7FFFFFFF
            length = key_of(&found, interface, False, key)
            named = None
            cached = NULL
            if length:
                named = PyBytes_FromStringAndSize(<char *>key, length)
                cached = PyDict_GetItem(known, named)
            verdict = decide(number, named) if cached == NULL else <object>cached
            if verdict is not current or interface != of_interface:
                if of_run:
                    runs.append((current, of_run, of_interface))
                current = verdict
                of_interface = interface
                of_run = 0
                goes_on = verdict.outcome != 0
            of_run += 1
            going[number] = goes_on
        if of_run:
            runs.append((current, of_run, of_interface))
        return going

    def judge(self, int first, Answering table not None, double now, make, ask, bytearray going not None, list runs, list kept):
        """Take this turn's frames from `first` on with the verdicts that `table` knows, and those of `ask`.

        now: seconds, for the ages of flows. make(number): the packet, the argument of `ask`. Writes the byte of each frame into
        `going`, 1 to send it on. Appends to `runs` as `sort` does, and to `kept` the number and the verdict of each frame whose
        flow the kernel is to decide (`Verdict.means`). Returns the number of the frame behind the last one with a verdict, and a
        packet with a verdict that is more than an answer, or None: that packet is the next frame, and in no run.
        """
        cdef Found found
        cdef uint8_t key[FIVE_TUPLE]
        cdef uint8_t index, current = ASK
        cdef uint32_t interface, of_interface = 0
        cdef int number
        cdef long of_run = 0
        cdef bint goes_on = False, is_kept = False
        cdef object special = None
        cdef int end = self.count
        cdef timespec wall
        table.start_turn(now)
        if table.timed:
            clock_gettime(CLOCK_REALTIME, &wall)
            table.now = wall.tv_sec + wall.tv_nsec * 1e-9
        for number in range(first, self.count):
            if not self._packet(number, &found):
                going[number] = 1
                continue
            interface = self.marks[number] & 0x7FFFFFFF
            index = ASK
            if five_tuple(found.packet, found.copied, key):
                table.joined = found.flags & IS_SEGMENTED
                index = table.look(
                    found.packet, found.copied, found.length, not found.flags & (IS_UNFINISHED | IS_SEGMENTED)
                )
            if index == ASK or table.tells:
                packet = make(number)
                if index == ASK:
                    verdict = ask(packet)
                    index = table.index_of(verdict)
                    if index == ASK:
                        special = packet, verdict
                        end = number
                        break
                    if table.hears:
                        table.heard.append((packet, verdict, 0))
                else:
                    table.heard.append((packet, table.verdicts[index], table.tells))
            if index != current or interface != of_interface:
                if of_run:
                    runs.append((table.verdicts[current], of_run, of_interface))
                current = index
                of_interface = interface
                of_run = 0
                verdict = table.verdicts[index]
                goes_on = verdict.outcome != 0
                is_kept = verdict.means is not None
            of_run += 1
            going[number] = goes_on
            if is_kept:
                kept.append((number, table.verdicts[index]))
        if of_run:
            runs.append((table.verdicts[current], of_run, of_interface))
        return end, special

    def send(self, going not None):
        """Send on the frames of this turn whose byte is not 0, in order. Returns how many could not be sent."""
        cdef const uint8_t[::1] bits = going
        cdef int number, count = 0
        cdef uint32_t length
        for number in range(min(self.count, <int>bits.shape[0])):
            length = self.incoming[number].msg_len
            if bits[number] and length <= ROOM and self.marks[number]:
                self._prepare(count, self.memory + <size_t>ROOM * number, length, self.marks[number])
                count += 1
        return self._send(count)

    def put(self, const uint8_t[::1] frame not None, uint32_t mark):
        """Send one frame, as `frame` returns it. Returns how many could not be sent."""
        self._prepare(0, <uint8_t *>&frame[0], frame.shape[0], mark)
        return self._send(1)

    cdef void _prepare(self, int place, uint8_t *frame, uint32_t length, uint32_t mark) noexcept nogil:
        cdef msghdr *header = &self.outgoing[place].msg_hdr
        cdef cmsghdr *said
        cdef uint32_t interface = mark & 0x7FFFFFFF
        self.sent[place].iov_base = frame
        self.sent[place].iov_len = length
        header.msg_iov = &self.sent[place]
        header.msg_iovlen = 1
        header.msg_flags = 0
        if mark & TO_CONTAINER:
            # On its interface, without passing the queueing discipline and our own program.
            memset(&self.addresses[place], 0, sizeof(Address))
            self.addresses[place].family = 17
            self.addresses[place].interface = interface
            header.msg_name = &self.addresses[place]
            header.msg_namelen = 20
            header.msg_control = NULL
            header.msg_controllen = 0
        else:
            # On the veth pair: the program at its other end sends it back to its interface.
            header.msg_name = NULL
            header.msg_namelen = 0
            header.msg_control = self.control + CONTROL * place
            header.msg_controllen = CMSG_SPACE(4)
            said = CMSG_FIRSTHDR(header)
            said.cmsg_level = SOL_SOCKET
            said.cmsg_type = SO_MARK
            said.cmsg_len = CMSG_LEN(4)
            memcpy(CMSG_DATA(said), &interface, 4)

    cdef int _send(self, int count) except -1:
        cdef int done = 0, step, number, failed = 0
        while done < count:
            with nogil:
                step = sendmmsg(self.descriptor, self.outgoing + done, count - done, 0)
            if step > 0:
                for number in range(done, done + step):
                    if self.outgoing[number].msg_hdr.msg_name == NULL:
                        self.crossed += 1
                done += step
            elif errno != EINTR:
                # This frame cannot be sent: its interface is gone or down, or it is too long.
                failed += 1
                done += 1
        self.failed += failed
        return failed
