# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Frames of packet sockets, many at a time: the ring of a tap, and what an inline link reads and sends. Compiled, since every frame costs these steps.

It finds IP packets in frames and looks verdicts up; which verdict a packet gets, it does not know. Formats are those of
linux/if_packet.h; packet(7), networking/packet_mmap.rst of the kernel.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t ntohs(uint16_t)

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

cdef extern from *:
    """
    #define taken_by_user(status) __atomic_load_n((status), __ATOMIC_ACQUIRE)
    #define give_back(status) __atomic_store_n((status), 0, __ATOMIC_RELEASE)
    """
    uint32_t taken_by_user(uint32_t *status) nogil
    void give_back(uint32_t *status) nogil

cdef enum:
    # struct tpacket_block_desc: status, number of packets, offset of the first
    BLOCK_STATUS = 8
    BLOCK_PACKETS = 12
    BLOCK_FIRST = 16
    TP_STATUS_USER = 1
    # struct tpacket3_hdr, and the struct sockaddr_ll behind it
    NEXT = 0
    SECONDS = 4
    NANOSECONDS = 8
    COPIED = 12
    LENGTH = 16
    STATUS = 20
    MAC = 24
    TCI = 32
    PACKET_TYPE = 48 + 10
    PACKET_OUTGOING = 4
    TP_STATUS_CSUMNOTREADY = 1 << 3
    TP_STATUS_VLAN_VALID = 1 << 4
    TP_STATUS_GSO_TCP = 1 << 8
    ETHERNET = 14
    TCP = 6
    UDP = 17
    # Hook and interfaces, then protocol, addresses and ports: the key of nfqueue/inbox.pyx.
    PLACE = 9
    LONGEST_KEY = PLACE + 37
    PREROUTING = 0
    POSTROUTING = 4

    # struct virtio_net_hdr, and room for the longest frame behind it
    VNET = 10
    GSO_TYPE = 1
    ROOM = 10 + 65536 + 64
    CONTROL = 64
    # The mark of what is on its way to a container; the other bits are the interface.
    TO_CONTAINER = 0x80000000

# What `read` says of a frame besides.
OUTGOING = 1
ODD = 2
TAGGED = 4
UNFINISHED = 8
SEGMENTED = 16


cdef struct Found:
    # One IP packet in a frame.
    const uint8_t *packet
    uint32_t copied
    uint32_t length
    uint16_t kind
    int flags


cdef bint find_packet(const uint8_t *frame, uint32_t copied, uint32_t length, Found *found) noexcept nogil:
    """Find the IP packet behind the Ethernet header and up to two tags that stand in the frame; False where there is none."""
    cdef uint32_t offset = ETHERNET
    cdef int tags = 0
    if copied < ETHERNET:
        return False
    found.kind = ntohs((<const uint16_t *>(frame + 12))[0])
    found.flags = 0
    while found.kind == 0x8100 or found.kind == 0x88A8:
        if tags == 2 or copied < offset + 4:
            return False
        found.kind = ntohs((<const uint16_t *>(frame + offset + 2))[0])
        found.flags = 4 | 2
        offset += 4
        tags += 1
    if found.kind != 0x0800 and found.kind != 0x86DD:
        return False
    found.packet = frame + offset
    found.copied = copied - offset
    found.length = length - offset
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


cdef class Ring:
    """The ring (TPACKET_V3) of one packet socket that is bound to one interface.

    descriptor: the socket. block: bytes of a block. blocks: how many. interface: index of the interface.
    """

    cdef uint8_t *memory
    cdef size_t size
    cdef uint32_t block_size, blocks, current, left, interface
    cdef uint8_t *frame
    cdef readonly long unknown

    def __init__(self, int descriptor, uint32_t block, uint32_t blocks, uint32_t interface):
        cdef void *memory
        self.size = <size_t>block * blocks
        self.block_size = block
        self.blocks = blocks
        self.interface = interface
        # Frames that hold no IP packet that could be found.
        self.unknown = 0
        memory = mmap(NULL, self.size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
        if memory == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.memory = <uint8_t *>memory

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.size)

    def close(self):
        """Give the memory back. A ring that is closed has no frames."""
        if self.memory != NULL:
            munmap(self.memory, self.size)
            self.memory = NULL
        self.frame = NULL

    cdef uint8_t *_next(self) noexcept nogil:
        """The next frame, or NULL. It stays valid until the call after this."""
        cdef uint8_t *block
        cdef uint8_t *frame
        if self.memory == NULL:
            return NULL
        block = self.memory + <size_t>self.current * self.block_size
        if self.frame != NULL:
            if self.left:
                self.frame += (<uint32_t *>(self.frame + NEXT))[0]
            else:
                self.frame = NULL
                give_back(<uint32_t *>(block + BLOCK_STATUS))
                self.current = (self.current + 1) % self.blocks
                block = self.memory + <size_t>self.current * self.block_size
        while self.frame == NULL:
            if not taken_by_user(<uint32_t *>(block + BLOCK_STATUS)) & TP_STATUS_USER:
                return NULL
            self.left = (<uint32_t *>(block + BLOCK_PACKETS))[0]
            if self.left:
                self.frame = block + (<uint32_t *>(block + BLOCK_FIRST))[0]
            else:
                give_back(<uint32_t *>(block + BLOCK_STATUS))
                self.current = (self.current + 1) % self.blocks
                block = self.memory + <size_t>self.current * self.block_size
        self.left -= 1
        return self.frame

    cdef bint _packet(self, uint8_t *frame, Found *found) noexcept nogil:
        cdef uint32_t status = (<uint32_t *>(frame + STATUS))[0]
        cdef uint16_t mac = (<uint16_t *>(frame + MAC))[0]
        if not find_packet(frame + mac, (<uint32_t *>(frame + COPIED))[0], (<uint32_t *>(frame + LENGTH))[0], found):
            self.unknown += 1
            return False
        if frame[PACKET_TYPE] == PACKET_OUTGOING:
            found.flags |= 1
        if status & TP_STATUS_VLAN_VALID:
            found.flags |= 4
        if status & TP_STATUS_CSUMNOTREADY:
            found.flags |= 8
        if status & TP_STATUS_GSO_TCP:
            found.flags |= 16
        return True

    def read(self, int budget):
        """Up to so many packets: a list of (payload, its whole length, time in seconds, flags, ethertype)."""
        cdef Found found
        cdef uint8_t key[LONGEST_KEY]
        cdef uint8_t *frame
        cdef list packets = []
        while len(packets) < budget:
            frame = self._next()
            if frame == NULL:
                break
            if not self._packet(frame, &found):
                continue
            if five_tuple(found.packet, found.copied, key) == 0:
                found.flags |= 2
            packets.append(self._told(frame, &found))
        return packets

    cdef tuple _told(self, uint8_t *frame, Found *found):
        cdef double seconds = (<uint32_t *>(frame + SECONDS))[0] + (<uint32_t *>(frame + NANOSECONDS))[0] * 1e-9
        payload = PyBytes_FromStringAndSize(<const char *>found.packet, found.copied)
        return payload, found.length, seconds, found.flags, found.kind

    def sort(self, int budget, dict known, decide, list runs):
        """Look verdicts of up to so many packets up by hook, interface and five-tuple: how many packets were taken.

        decide(packet as `read` gives it, key or None): the verdict on one that is not in `known`; None leaves the packet out of
        the count. Runs of equal verdicts are appended to `runs` as [verdict, how many].
        """
        cdef Found found
        cdef uint8_t key[LONGEST_KEY]
        cdef uint8_t *frame
        cdef PyObject *there
        cdef size_t length
        cdef int count = 0
        cdef long of_run = 0
        current = None
        while count < budget:
            frame = self._next()
            if frame == NULL:
                break
            if not self._packet(frame, &found):
                continue
            length = five_tuple(found.packet, found.copied, key + PLACE)
            named = None
            there = NULL
            if length and not found.flags & 2:
                key[0] = POSTROUTING if found.flags & 1 else PREROUTING
                memcpy(key + 1, &self.interface, 4)
                memcpy(key + 5, &self.interface, 4)
                named = PyBytes_FromStringAndSize(<char *>key, PLACE + length)
                there = PyDict_GetItem(known, named)
            elif not length:
                found.flags |= 2
            if there == NULL:
                verdict = decide(self._told(frame, &found), named)
                if verdict is None:
                    continue
            else:
                verdict = <object>there
            if verdict is not current:
                if of_run:
                    runs.append((current, of_run))
                current = verdict
                of_run = 0
            of_run += 1
            count += 1
        if of_run:
            runs.append((current, of_run))
        return count


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
        """Read up to so many frames that are there; the turn before is over. How many. Raises OSError."""
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
            found.flags |= 1
        # VIRTIO_NET_HDR_F_NEEDS_CSUM
        if frame[0] & 1:
            found.flags |= 8
        if frame[GSO_TYPE]:
            found.flags |= 16
        return True

    def packet(self, int number):
        """(payload, flags, ethertype, interface) of one frame; None where there is no packet in it."""
        cdef Found found
        if not self._packet(number, &found):
            return None
        payload = PyBytes_FromStringAndSize(<const char *>found.packet, found.copied)
        return payload, found.flags, found.kind, self.marks[number] & 0x7FFFFFFF

    def frame(self, int number):
        """All of a frame with what belongs before it, and its mark: for `put`."""
        cdef uint32_t length = self.incoming[number].msg_len
        return PyBytes_FromStringAndSize(<const char *>self.memory + <size_t>ROOM * number, min(length, ROOM)), self.marks[number]

    def sort(self, dict known, decide, list runs):
        """Look the verdicts of this turn's frames up as `Ring.sort` does; for each frame 1 where it goes on, as bytes.

        decide(number, key or None): the verdict on one that is not in `known`. A run is one interface's: its index comes third.
        """
        cdef Found found
        cdef uint8_t key[LONGEST_KEY]
        cdef uint32_t interface, of_interface = 0
        cdef PyObject *there
        cdef size_t length
        cdef int number
        cdef long of_run = 0
        cdef bint goes_on = False
        cdef bytearray going = bytearray(self.count)
        current = None
        for number in range(self.count):
            if not self._packet(number, &found):
                # No packet that could be judged; `send` knows whether it is one of ours at all.
                going[number] = 1
                continue
            length = five_tuple(found.packet, found.copied, key + PLACE)
            named = None
            there = NULL
            interface = self.marks[number] & 0x7FFFFFFF
            if length:
                memset(key, 0, PLACE)
                key[0] = POSTROUTING if found.flags & 1 else PREROUTING
                memcpy(key + (5 if found.flags & 1 else 1), &interface, 4)
                named = PyBytes_FromStringAndSize(<char *>key, PLACE + length)
                there = PyDict_GetItem(known, named)
            verdict = decide(number, named) if there == NULL else <object>there
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

    def send(self, going not None):
        """Send on those of this turn's frames whose byte is not 0, in their order; how many could not be sent."""
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
        """Send one frame, as `frame` gives it; how many could not be sent."""
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
            # On its interface, past the queueing discipline and our own program.
            memset(&self.addresses[place], 0, sizeof(Address))
            self.addresses[place].family = 17
            self.addresses[place].interface = interface
            header.msg_name = &self.addresses[place]
            header.msg_namelen = 20
            header.msg_control = NULL
            header.msg_controllen = 0
        else:
            # On our pair, whose other end puts it where it came from.
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
        cdef int done = 0, step, failed = 0
        while done < count:
            with nogil:
                step = sendmmsg(self.descriptor, self.outgoing + done, count - done, 0)
            if step > 0:
                done += step
            elif errno != EINTR:
                # This one can't be sent: its interface is gone or down, or it is too long.
                failed += 1
                done += 1
        self.failed += failed
        return failed
