# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Frames of packet sockets, many at a time: the ring that a tap reads. Compiled, since every frame costs these steps.

It finds IP packets in frames and looks verdicts up; which verdict a packet gets, it does not know. Formats are those of
linux/if_packet.h; packet(7), networking/packet_mmap.rst of the kernel.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t ntohs(uint16_t)

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
