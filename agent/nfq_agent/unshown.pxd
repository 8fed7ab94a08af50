"""Connections that no element was shown, since the chain's answer is known already: packets that do not change it.

These functions say what `Dpi` would make of a packet of a connection that is accepted; where that is not plain, they say no, and
the elements are shown the packet. Pure.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t

from .expected cimport LONGEST_REQUEST, hears_server, is_sound, keep_bytes, only_acknowledges, only_asks_again
from .flow_entry cimport (
    K_CLIENT_STAMP, K_OPENING, O_ANSWERED, O_CLOSED, O_EARLIER, O_ENDED, O_FIRST, O_OFFLOADED, O_READ, O_STATE, O_SYN, O_TLS,
    W_ACKNOWLEDGEMENT, Entry, Request,
)
from .first_message cimport passes_between
from .plain_packet cimport F_ACK, F_FIN, F_RST, F_SYN, F_URG, Segment, has_wrong_header, is_wrong

cdef enum:
    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    CLIENT_HELLO = 1
    # Records before the one that ends what can be read.
    RECORDS = 8


cdef inline bint has_plain_options(const uint8_t *option, const uint8_t *end) noexcept nogil:
    """Whether a SYN's options are the usual ones: segment size, window scale, selective acknowledgement, timestamp."""
    while option < end and option[0]:
        if option[0] == 1:
            option += 1
            continue
        if end - option < 2 or option[1] < 2 or option + option[1] > end:
            return False
        if option[0] > 4 and option[0] != 8:
            return False
        option += option[1]
    return True


cdef inline bint is_plain_syn(const uint8_t *packet, size_t length, const Segment *segment, bint ready) noexcept nogil:
    """Whether the receiver takes a SYN for certain, and it is nothing but that."""
    cdef size_t transport = 20 if packet[0] >> 4 == 4 else 40
    if segment.size or not segment.flags & F_SYN or segment.flags & (F_FIN | F_RST | F_URG):
        return False
    if not has_plain_options(packet + transport + 20, packet + segment.data):
        return False
    return not (is_wrong(packet, length, segment) if ready else has_wrong_header(packet))


cdef inline bint from_syn(const Entry *entry, const Segment *segment) noexcept nogil:
    """Whether a packet may begin another connection on the five-tuple of one that is over.

    Of one whose verdict the kernel keeps only the packets of another connection come here, or none is tracked.
    """
    if segment.flags & (F_SYN | F_ACK) != F_SYN or segment.down != entry.client:
        return False
    return entry.unshown & (O_CLOSED | O_OFFLOADED) and entry.unshown & O_STATE > O_ANSWERED


cdef inline void begin(Entry *entry, const Segment *segment) noexcept nogil:
    """The SYN of a client, on a new entry or on one whose connection is over."""
    cdef Request *request = entry.request
    if entry.unshown:
        request.earlier_first = request.initial + 1
        request.earlier_next = request.next
        entry.unshown = O_SYN | O_EARLIER
    else:
        entry.unshown = O_SYN
        entry.client = segment.down
    entry.first = segment.sequence
    entry.known = 0
    entry.watch = 0
    entry.verdict = 0


cdef inline bint passes_syn(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, bint from_client
) noexcept nogil:
    """The client's SYN again, or the SYN that answers it."""
    if entry.unshown & O_STATE > O_ANSWERED or entry.unshown & O_FIRST or not is_plain_syn(packet, length, segment, ready):
        return False
    if not segment.flags & F_ACK:
        return from_client and segment.sequence == entry.first
    if from_client or segment.acknowledged - 1 != entry.first:
        return False
    if entry.known & K_OPENING:
        return segment.sequence + 1 == entry.opening
    entry.opening = segment.sequence + 1
    entry.known = K_OPENING
    entry.unshown = (entry.unshown & ~O_STATE) | O_ANSWERED
    return True


cdef inline bint only_continues(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, size_t *kept, size_t room
) noexcept nogil:
    """Whether the client's packet continues behind its ClientHello without another one (see `tls.after_hello`)."""
    cdef Request *request = entry.request
    cdef const uint8_t *data = packet + segment.data
    cdef size_t at = 0
    cdef uint32_t value
    cdef int records = 0
    if entry.watch & W_ACKNOWLEDGEMENT or segment.sequence != request.next or segment.copied != segment.size:
        return False
    if segment.size > LONGEST_REQUEST or kept[0] + segment.size > room:
        return False
    if not is_sound(packet, length, segment, ready, entry.known & K_CLIENT_STAMP, request.stamp, &value):
        return False
    while at < segment.size and (data[at] == CHANGE_CIPHER_SPEC or data[at] == ALERT):
        records += 1
        if at + 5 > segment.size or records > RECORDS:
            return False
        at += 5 + (data[at + 3] << 8 | data[at + 4])
    if at > segment.size:
        return False
    if at < segment.size and data[at] == HANDSHAKE:
        # A hello may stand behind an empty record.
        if at + 6 > segment.size or not (data[at + 3] or data[at + 4]) or data[at + 5] == CLIENT_HELLO:
            return False
    if not keep_bytes(request, data, segment.size, kept):
        return False
    # What cannot be read any more begins with a record, and the bytes of that are kept to compare.
    request.next = segment.sequence + at
    entry.first = segment.sequence + 1
    request.last_read = segment.sequence + segment.size
    entry.watch |= W_ACKNOWLEDGEMENT
    entry.unshown &= ~(O_FIRST | O_STATE)
    entry.unshown |= O_READ if at < segment.size else O_TLS
    if value:
        request.stamp = value
        entry.known |= K_CLIENT_STAMP
    return True


cdef inline bint passes_client(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, size_t *kept, size_t room
) noexcept nogil:
    """A packet of the client behind the first message."""
    cdef Request *request = entry.request
    cdef uint8_t state = entry.unshown & O_STATE
    cdef uint32_t value
    if segment.flags & F_FIN:
        if segment.size or not is_sound(packet, length, segment, ready, entry.known & K_CLIENT_STAMP, request.stamp, &value):
            return False
        if value and <int32_t>(segment.sequence - request.next) <= 0:
            request.stamp = value
            entry.known |= K_CLIENT_STAMP
        entry.unshown |= O_CLOSED | O_ENDED
        return True
    if segment.size == 0:
        return True
    if state == O_READ:
        return not entry.watch & W_ACKNOWLEDGEMENT or <int32_t>(segment.sequence - request.next) >= 0
    if entry.unshown & O_CLOSED:
        return False
    if state == O_TLS:
        return only_continues(entry, packet, length, segment, ready, kept, room)
    if not only_asks_again(entry, packet, length, segment, ready, kept, room):
        return False
    entry.unshown &= ~O_FIRST
    return True


cdef inline bint passes_server(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, size_t *kept
) noexcept nogil:
    """A packet of the server behind the first message."""
    if entry.watch & W_ACKNOWLEDGEMENT:
        if not only_acknowledges(entry, packet, length, segment, ready, kept):
            return False
    elif segment.flags & F_FIN and not hears_server(entry, packet, length, segment, ready):
        return False
    if segment.flags & F_FIN:
        entry.unshown |= O_CLOSED
    return True


cdef inline bint passes(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, uint32_t tick, size_t *kept, size_t room
) noexcept nogil:
    """Whether a packet leaves its connection accepted; of all but the client's first message. tick: sixteenths of a second."""
    cdef bint from_client = segment.down == entry.client
    if segment.flags & (F_RST | F_URG):
        return False
    if segment.flags & F_SYN:
        return passes_syn(entry, packet, length, segment, ready, from_client)
    if entry.unshown & O_STATE <= O_ANSWERED:
        return passes_between(entry, packet, length, segment, ready, tick)
    if from_client:
        return passes_client(entry, packet, length, segment, ready, kept, room)
    return passes_server(entry, packet, length, segment, ready, kept)
