# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The ring of a tap: frames of one packet socket, many at a time. Compiled, for speed.

It looks verdicts up; which verdict a packet gets, it does not know. Formats are those of linux/if_packet.h; packet(7),
networking/packet_mmap.rst of the kernel.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from ..answering cimport Answering
from ..flow_entry cimport ASK
from .frame cimport IS_ODD, IS_OUTGOING, IS_SEGMENTED, IS_TAGGED, IS_UNFINISHED, Found, find_packet, key_of
from .nfqueue.packet_message cimport FIVE_TUPLE, LONGEST_KEY, five_tuple

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
    PACKET_TYPE = 48 + 10
    PACKET_OUTGOING = 4
    # Packets that a turn asks about: what is asked may be slow.
    ASKED = 256
    # Seconds that a frame waits in a ring at most, as long as the worker is not stuck.
    LONGEST_WAIT = 10
    TP_STATUS_CSUMNOTREADY = 1 << 3
    TP_STATUS_VLAN_VALID = 1 << 4
    TP_STATUS_GSO_TCP = 1 << 8

# Flags that `read` returns.
OUTGOING = IS_OUTGOING
ODD = IS_ODD
TAGGED = IS_TAGGED
UNFINISHED = IS_UNFINISHED
SEGMENTED = IS_SEGMENTED


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
        """Unmap the memory. A closed ring has no frames."""
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
            found.flags |= IS_OUTGOING
        if status & TP_STATUS_VLAN_VALID:
            found.flags |= IS_TAGGED
        if status & TP_STATUS_CSUMNOTREADY:
            found.flags |= IS_UNFINISHED
        if status & TP_STATUS_GSO_TCP:
            found.flags |= IS_SEGMENTED
        return True

    def read(self, int budget):
        """Up to `budget` packets: a list of (payload, whole length, time in seconds, flags, ethertype)."""
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
            if not key_of(&found, self.interface, True, key):
                found.flags |= IS_ODD
            packets.append(self._seen(frame, &found))
        return packets

    cdef tuple _seen(self, uint8_t *frame, Found *found):
        payload = PyBytes_FromStringAndSize(<const char *>found.packet, found.copied)
        return payload, found.length, _seconds(frame), found.flags, found.kind

    def sort(self, int budget, dict known, decide, list runs):
        """Look up verdicts of up to `budget` packets by hook, interface and five-tuple. Returns how many packets were taken.

        decide(packet as `read` gives it, key or None): the verdict on one that is not in `known`; None leaves the packet out of
        the count. Runs of equal verdicts are appended to `runs` as [verdict, how many].
        """
        cdef Found found
        cdef uint8_t key[LONGEST_KEY]
        cdef uint8_t *frame
        cdef PyObject *cached
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
            length = key_of(&found, self.interface, True, key)
            named = None
            cached = NULL
            if not length:
                found.flags |= IS_ODD
            elif not found.flags & IS_ODD:
                named = PyBytes_FromStringAndSize(<char *>key, length)
                cached = PyDict_GetItem(known, named)
            if cached == NULL:
                verdict = decide(self._seen(frame, &found), named)
                if verdict is None:
                    continue
            else:
                verdict = <object>cached
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

    def judge(self, int budget, Answering table not None, double now, double ahead, uint32_t mtu, make, ask, list runs):
        """Take up to `budget` packets with the verdicts that `table` knows, and those of `ask`, 256 times at most.

        now, ahead: as in `moment`, for the ages of flows. mtu: a longer packet is one of an offload. make(packet as `read` gives it): the
        argument of `ask`; None leaves the packet out of the count. Appends to `runs` as `sort` does. Returns how many packets
        are in runs, whether there may be more, and a packet with a verdict that is more than an answer, or None: that is the
        last packet, and in no run.
        """
        cdef Found found
        cdef uint8_t key[FIVE_TUPLE]
        cdef uint8_t *frame
        cdef uint8_t index, current = ASK
        cdef int count = 0, asked = 0
        cdef long of_run = 0
        cdef bint more = True
        cdef object special = None
        while count < budget and asked < ASKED:
            frame = self._next()
            if frame == NULL:
                more = False
                break
            if not self._packet(frame, &found):
                continue
            if not five_tuple(found.packet, found.copied, key):
                found.flags |= IS_ODD
            index = ASK
            # A frame that the filter could not judge may be one that is not chosen.
            if not found.flags & IS_ODD:
                table.start_turn(moment(_seconds(frame), ahead, now))
                if table.timed:
                    table.now = _seconds(frame)
                table.joined = found.flags & IS_SEGMENTED or found.length > mtu
                index = table.look(
                    found.packet, found.copied, found.length,
                    not found.flags & (IS_UNFINISHED | IS_SEGMENTED) and found.length <= mtu,
                )
            if index == ASK or table.tells:
                asked += 1
                packet = make(self._seen(frame, &found))
                if packet is None:
                    continue
                if index == ASK:
                    verdict = ask(packet)
                    index = table.index_of(verdict)
                    if index == ASK:
                        special = packet, verdict
                        break
                    if table.hears:
                        table.heard.append((packet, verdict, 0))
                else:
                    table.heard.append((packet, table.verdicts[index], table.tells))
            if index != current:
                if of_run:
                    runs.append((table.verdicts[current], of_run))
                current = index
                of_run = 0
            of_run += 1
            count += 1
        if of_run:
            runs.append((table.verdicts[current], of_run))
        return count, more, special


cpdef double moment(double seconds, double ahead, double now) noexcept nogil:
    """When a frame with this time passed, in seconds of the monotonic clock. ahead: how far the frame's clock, which may be set, is
    ahead of it. now: the time where that cannot be.
    """
    cdef double passed = seconds - ahead
    return passed if now - LONGEST_WAIT < passed < now + 1 else now


cdef inline double _seconds(uint8_t *frame) noexcept nogil:
    return (<uint32_t *>(frame + SECONDS))[0] + (<uint32_t *>(frame + NANOSECONDS))[0] * 1e-9
