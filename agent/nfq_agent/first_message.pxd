"""The first message of a client that no element was shown: a request, or a ClientHello, whole or in a few segments. Pure.

These functions say what `Dpi` would make of its packets; where that is not plain, they say no, and the elements are shown them.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy

from .expected cimport LONGEST_REQUEST, hears_server, is_sound, keep_bytes
from .flow_entry cimport (
    BOTH, K_CLIENT_STAMP, K_OPENING, O_ANSWERED, O_EARLIER, O_FIRST, O_HTTP, O_OFFLOADED, O_STATE, O_TLS, W_ACKNOWLEDGEMENT,
    Entry, Request,
)
from .host_name cimport LONGEST_NAME
from .http_head cimport host_of_request
from .openings cimport BEGUN, Answer, Openings
from .plain_packet cimport F_FIN, F_RST, F_SYN, F_URG, Segment
from .tls_head cimport name_of_hello, size_of_hello

cdef enum:
    # Segments of one message (BEGUN_PACKETS in nfq_agent.foresight).
    PIECES = 8
    # The time that there is for it (SECONDS in nfq_agent.message_events), in sixteenths of a second.
    PATIENCE = 160
    # What a segment was taken for, besides nothing.
    WHOLE = 1
    PART = 2


cdef struct Message:
    # What it is to the chain: O_HTTP, O_TLS or BEGUN; the timestamp of the segment, 0 for none; a whole hello, else NULL; the name,
    # which a part does not have.
    uint8_t kind
    uint32_t stamp
    const uint8_t *hello
    size_t length
    uint8_t name[LONGEST_NAME]
    # What came before, and the segment behind it.
    uint8_t joined[LONGEST_REQUEST]


cdef inline bint is_first(const Entry *entry, const Segment *segment) noexcept nogil:
    """Whether a packet may have bytes of the client's first message."""
    if segment.size == 0 or segment.flags & (F_SYN | F_FIN | F_RST | F_URG) or segment.down != entry.client:
        return False
    return entry.unshown & O_STATE <= O_ANSWERED


cdef inline bint is_late(const Entry *entry, uint32_t tick) noexcept nogil:
    """Whether the rest of a message may come too late. tick: sixteenths of a second."""
    return <int32_t>(tick - entry.request.began) >= PATIENCE


cdef inline bint find_message(
    const Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, uint32_t tick, Message *found
) noexcept nogil:
    """Whether a segment has the first message, whole and sound, or a part of a ClientHello that continues what came before."""
    cdef const uint8_t *data = packet + segment.data
    cdef const Request *request = entry.request
    cdef size_t size = segment.size
    found.hello = NULL
    if segment.copied != size or size > LONGEST_REQUEST:
        return False
    if entry.unshown & O_FIRST:
        if segment.sequence != request.next or request.pieces >= PIECES or is_late(entry, tick):
            return False
        if request.size + size > LONGEST_REQUEST:
            return False
        if not is_sound(packet, length, segment, ready, entry.known & K_CLIENT_STAMP, request.stamp, &found.stamp):
            return False
        memcpy(found.joined, request.data, request.size)
        memcpy(found.joined + request.size, data, size)
        data = found.joined
        size += request.size
    elif segment.sequence != entry.first + 1 or (entry.unshown & O_EARLIER and not entry.known & K_OPENING):
        return False
    elif not is_sound(packet, length, segment, ready, False, 0, &found.stamp):
        return False
    elif host_of_request(data, size, found.name, &found.length):
        found.kind = O_HTTP
        return True
    found.kind = O_TLS
    if name_of_hello(data, size, found.name, &found.length):
        found.hello = data
        return True
    found.kind = BEGUN
    found.length = 0
    return size < size_of_hello(data, size) <= LONGEST_REQUEST


cdef inline bint keep_first(
    Entry *entry, const uint8_t *data, const Segment *segment, uint32_t tick, const Message *found, const uint8_t *details,
    size_t size, size_t *kept,
) noexcept nogil:
    """Keep what was found, until the server acknowledges it. data: of the segment. kept: bytes of all flows.

    details: what a hello says besides its name, as text of this size, where that is kept.
    """
    cdef Request *request = <Request *>realloc(entry.request, sizeof(Request) + found.length + size)
    if request == NULL:
        return False
    entry.request = request
    # What there is room for behind it.
    request.length = found.length
    if not entry.unshown & O_FIRST:
        request.data = NULL
        request.size = 0
        request.initial = entry.first
        request.began = tick
        request.pieces = 0
        # The server has answered: no earlier connection counts any more.
        entry.unshown &= ~O_EARLIER
    if not keep_bytes(request, data, segment.size, kept):
        return False
    memcpy(<uint8_t *>request + sizeof(Request), found.name, found.length)
    request.details = size
    if size:
        memcpy(<uint8_t *>request + sizeof(Request) + found.length, details, size)
    request.next = segment.sequence + segment.size
    request.pieces += 1
    if found.kind == BEGUN:
        entry.unshown |= O_FIRST
    else:
        entry.unshown = found.kind | O_FIRST
        entry.first = request.last_read = request.next
        entry.watch = W_ACKNOWLEDGEMENT
    if found.stamp:
        request.stamp = found.stamp
        entry.known |= K_CLIENT_STAMP
    return True


cdef inline uint8_t take_first(
    Openings openings, Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, bint lasts,
    uint32_t tick, size_t *kept, size_t room,
) noexcept nogil:
    """WHOLE or PART of the client's first message, if it is accepted; else 0. lasts: the kernel keeps the verdict on it."""
    cdef Message found
    cdef const Answer *answer
    if kept[0] + segment.size > room or not find_message(entry, packet, length, segment, ready, tick, &found):
        return 0
    if not openings.accepts(entry.key, entry.client, found.kind, found.name, found.length, found.hello):
        return 0
    answer = &openings.latest
    if not keep_first(entry, packet + segment.data, segment, tick, &found, answer.details, answer.details_size, kept):
        return 0
    if found.kind != BEGUN or entry.request.pieces == 1:
        openings.keep(entry.key, entry.client, entry.seen == BOTH, tick, found.kind, found.name, found.length, found.hello)
    if found.kind == BEGUN:
        return PART
    if lasts:
        entry.unshown |= O_OFFLOADED
    return WHOLE


cdef inline bint passes_between(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, uint32_t tick
) noexcept nogil:
    """A packet without payload that comes between the SYN and the end of the first message."""
    if segment.size or segment.flags & F_FIN:
        return False
    if not entry.unshown & O_FIRST:
        return segment.down == entry.client
    if is_late(entry, tick):
        return False
    return segment.down == entry.client or hears_server(entry, packet, length, segment, ready)
