"""A frame: where the IP packet in it is, and the key by which its verdict is known. Pure: bytes in, places out.

The key is that of nfqueue/packet_message.pxd: hook and interfaces, then protocol, addresses and ports.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from .nfqueue.packet_message cimport LONGEST_KEY, PLACE, five_tuple

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t ntohs(uint16_t)

cdef enum:
    ETHERNET = 14
    IPV4 = 0x0800
    IPV6 = 0x86DD
    VLAN = 0x8100
    VLAN_OF_VLANS = 0x88A8
    # enum nf_inet_hooks
    PREROUTING = 0
    POSTROUTING = 4
    # What is known of a frame.
    IS_OUTGOING = 1
    IS_ODD = 2
    IS_TAGGED = 4
    IS_UNFINISHED = 8
    IS_SEGMENTED = 16


cdef struct Found:
    # One IP packet in a frame.
    const uint8_t *packet
    uint32_t copied
    uint32_t length
    uint16_t kind
    int flags


cdef inline bint find_packet(const uint8_t *frame, uint32_t copied, uint32_t length, Found *found) noexcept nogil:
    """Find the IP packet behind the Ethernet header and up to two tags. Returns False if there is none."""
    cdef uint32_t offset = ETHERNET
    cdef int tags = 0
    if copied < ETHERNET:
        return False
    found.kind = ntohs((<const uint16_t *>(frame + 12))[0])
    found.flags = 0
    while found.kind == VLAN or found.kind == VLAN_OF_VLANS:
        if tags == 2 or copied < offset + 4:
            return False
        found.kind = ntohs((<const uint16_t *>(frame + offset + 2))[0])
        found.flags = IS_TAGGED | IS_ODD
        offset += 4
        tags += 1
    if found.kind != IPV4 and found.kind != IPV6:
        return False
    found.packet = frame + offset
    found.copied = copied - offset
    found.length = length - offset
    return True


cdef inline size_t key_of(const Found *found, uint32_t interface, bint both, uint8_t *key) noexcept nogil:
    """Write the key of the verdict on a packet at an interface. both: with the interface as `indev` and `outdev`.

    Returns the length of the key; 0 for a packet that is not a whole TCP or UDP packet with plain headers.
    """
    cdef bint outgoing = found.flags & IS_OUTGOING
    cdef size_t length = five_tuple(found.packet, found.copied, key + PLACE)
    if not length:
        return 0
    memset(key, 0, PLACE)
    key[0] = POSTROUTING if outgoing else PREROUTING
    if both or not outgoing:
        memcpy(key + 1, &interface, 4)
    if both or outgoing:
        memcpy(key + 5, &interface, 4)
    return PLACE + length
