"""A packet's netlink message: where its attributes are, and the key by which its verdict is known. Pure: bytes in, places out.

Message formats are those of linux/netfilter/nfnetlink_queue.h; netlink(7). The kernel writes the packet header as the first
attribute and the payload as the last one (nfqnl_build_packet_message() in net/netfilter/nfnetlink_queue.c).
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t ntohs(uint16_t)
    uint32_t ntohl(uint32_t)

cdef enum:
    # NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET, and where a message says what it is
    MSG_PACKET = 3 << 8
    TYPE = 4
    # struct nlmsghdr and struct nfgenmsg; then the packet header.
    HEADER = 20
    ID = 24
    SHORTEST = 32
    # enum nfqnl_attr_type
    A_PACKET_HDR = 1
    A_MARK = 3
    A_TIMESTAMP = 4
    A_INDEV = 5
    A_OUTDEV = 6
    A_PHYSINDEV = 7
    A_PHYSOUTDEV = 8
    A_HWADDR = 9
    A_PAYLOAD = 10
    A_CAP_LEN = 13
    A_SKB_INFO = 14
    A_UID = 16
    A_GID = 17
    KINDS = 18
    # A flag of A_SKB_INFO: not cut into segments yet.
    SKB_GSO = 2
    TCP = 6
    UDP = 17
    # Hook and interfaces, then protocol, addresses and ports.
    PLACE = 9
    FIVE_TUPLE = 1 + 36
    LONGEST_KEY = PLACE + FIVE_TUPLE


cdef struct Attributes:
    # Where the data of each kind begins, and its length in bytes; 0 and 0 for a kind that is not in the message.
    uint32_t at[KINDS]
    uint32_t length[KINDS]


cdef inline bint is_packet(const uint8_t *message, ssize_t size, uint32_t *identity) noexcept nogil:
    cdef uint16_t length
    if size < SHORTEST or (<const uint16_t *>(message + TYPE))[0] != MSG_PACKET:
        return False
    length = (<const uint16_t *>(message + HEADER))[0]
    if (<const uint16_t *>(message + HEADER + 2))[0] != A_PACKET_HDR or length < 4 or HEADER + length > size:
        return False
    identity[0] = ntohl((<const uint32_t *>(message + ID))[0])
    return True


cdef inline void find_attributes(const uint8_t *message, size_t size, Attributes *found) noexcept nogil:
    """Find every attribute up to the first whose length does not fit. The last one of a kind counts."""
    cdef size_t offset = HEADER, length
    cdef uint16_t kind
    memset(found, 0, sizeof(Attributes))
    while offset + 4 <= size:
        length = (<const uint16_t *>(message + offset))[0]
        kind = (<const uint16_t *>(message + offset + 2))[0] & 0x3FFF
        if length < 4 or offset + length > size:
            break
        if kind < KINDS:
            found.at[kind] = offset + 4
            found.length[kind] = length - 4
        offset += (length + 3) & ~<size_t>3


cdef inline uint32_t number(const uint8_t *message, const Attributes *found, uint32_t kind) noexcept nogil:
    """An attribute of 32 bits in network order; 0 if it is not there."""
    if found.length[kind] < 4:
        return 0
    return ntohl((<const uint32_t *>(message + found.at[kind]))[0])


cdef inline double seconds_of(const uint8_t *message, const Attributes *found) noexcept nogil:
    """The kernel's time stamp, which is there: seconds and microseconds, 64 bits each."""
    cdef const uint32_t *stamp = <const uint32_t *>(message + found.at[A_TIMESTAMP])
    return (<uint64_t>ntohl(stamp[0]) << 32 | ntohl(stamp[1])) + (<uint64_t>ntohl(stamp[2]) << 32 | ntohl(stamp[3])) / 1e6


cdef inline bint is_joined(const uint8_t *message, const Attributes *found) noexcept nogil:
    """Whether an offloaded packet may be many datagrams: any but TCP with plain headers, whose bytes are one stream."""
    cdef const uint8_t *packet = message + found.at[A_PAYLOAD]
    if not number(message, found, A_SKB_INFO) & SKB_GSO:
        return False
    if found.length[A_PAYLOAD] < 20:
        return True
    return packet[9 if packet[0] >> 4 == 4 else 6] != TCP


cdef inline size_t five_tuple(const uint8_t *packet, size_t size, uint8_t *key) noexcept nogil:
    """Write the five-tuple of a whole TCP or UDP packet with plain headers. Returns its length, 0 for any other packet."""
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


cdef inline size_t key_of(const uint8_t *message, size_t size, uint8_t *key) noexcept nogil:
    """Write the key of a packet's verdict. Returns its length, 0 where there is no such key."""
    cdef Attributes found
    cdef size_t length
    find_attributes(message, size, &found)
    if found.length[A_PAYLOAD] == 0:
        return 0
    # An interface that is not given has the number 0.
    memset(key, 0, PLACE)
    if found.length[A_PACKET_HDR] >= 7:
        key[0] = message[found.at[A_PACKET_HDR] + 6]
    if found.length[A_INDEV] >= 4:
        memcpy(key + 1, message + found.at[A_INDEV], 4)
    if found.length[A_OUTDEV] >= 4:
        memcpy(key + 5, message + found.at[A_OUTDEV], 4)
    length = five_tuple(message + found.at[A_PAYLOAD], found.length[A_PAYLOAD], key + PLACE)
    return length + PLACE if length else 0


cdef inline object made(object make, const uint8_t *message, size_t size, uint32_t identity):
    """The packet that `make` makes of a message (see Inbox)."""
    cdef Attributes found
    cdef size_t length, head = size
    cdef uint16_t ethertype = 0
    cdef uint8_t hook = 0
    find_attributes(message, size, &found)
    payload = b""
    length = found.length[A_PAYLOAD]
    if found.at[A_PAYLOAD]:
        head = found.at[A_PAYLOAD] - 4
        payload = PyBytes_FromStringAndSize(<const char *>message + found.at[A_PAYLOAD], length)
    if found.length[A_CAP_LEN] >= 4:
        length = number(message, &found, A_CAP_LEN)
    if found.length[A_PACKET_HDR] >= 7:
        # struct nfqnl_msg_packet_hdr: number, ethertype, hook.
        ethertype = ntohs((<const uint16_t *>(message + found.at[A_PACKET_HDR] + 4))[0])
        hook = message[found.at[A_PACKET_HDR] + 6]
    return make(
        identity, hook, ethertype, number(message, &found, A_MARK), length,
        number(message, &found, A_SKB_INFO), payload, PyBytes_FromStringAndSize(<const char *>message, head),
    )
