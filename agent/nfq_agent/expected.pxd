"""TCP packets that say no more than what is expected of them, so that no element has to be shown them. Pure.

What they say is noted in the flow's entry, and handed over with the next packet that is shown. These functions say what
`Soundness.refuses`, `ReadBytes.acknowledge` and `Conversation.client` would make of a packet; where that is not plain, they say
no.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from .dns_head cimport may_be_dns
from .flow_entry cimport (
    ASK, K_ACKNOWLEDGED, K_CLIENT_STAMP, K_NEW_CLIENT_STAMP, K_NEW_STAMP, K_OPENING, K_REQUEST, K_STAMP, O_ANSWERED, O_CLOSED,
    O_EARLIER, O_ENDED, O_FIRST, O_HTTP, O_READ, O_STATE, W_ACKNOWLEDGEMENT, W_CLIENT, W_CLIENT_BARE, W_DNS, W_QUIC, W_REQUEST,
    W_SERVER, W_SERVER_BARE, Entry, Request,
)
from .http_head cimport is_request
from .plain_packet cimport F_ACK, F_FIN, F_RST, F_SYN, F_URG, Segment, has_wrong_header, is_wrong, ntohl

cdef enum:
    # Bytes of a request that is read here.
    LONGEST_REQUEST = 4096


cdef inline bint is_sound(
    const uint8_t *packet, size_t length, const Segment *segment, bint ready, bint has_stamp, uint32_t stamp, uint32_t *value
) noexcept nogil:
    """Whether the receiver takes the packet for certain, by its options and its checksum. value: its timestamp, 0 for none."""
    cdef const uint8_t *transport = packet + (20 if packet[0] >> 4 == 4 else 40)
    cdef uint8_t header = transport[12] >> 4
    cdef uint32_t usual
    value[0] = 0
    if not segment.flags & F_ACK:
        return False
    if header == 8:
        # Two NOPs and a timestamp.
        memcpy(&usual, transport + 20, 4)
        if usual != ntohl(0x0101080A):
            return False
        memcpy(&usual, transport + 24, 4)
        value[0] = ntohl(usual)
        # A value of 0 stands for none here.
        if value[0] == 0 or (has_stamp and <int32_t>(value[0] - stamp) < 0):
            return False
    elif header != 5 or has_stamp:
        return False
    if not ready:
        return not has_wrong_header(packet)
    return segment.copied == segment.size and not is_wrong(packet, length, segment)


cdef inline bint hears_server(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready
) noexcept nogil:
    """Whether a packet of the server is sound, so that its timestamp counts."""
    cdef uint32_t value
    if not is_sound(packet, length, segment, ready, entry.known & K_STAMP, entry.request.server_stamp, &value):
        return False
    if value and (not entry.known & K_OPENING or <int32_t>(segment.sequence - entry.opening) <= 0):
        entry.request.server_stamp = value
        entry.known |= K_STAMP
    return True


cdef inline bint only_acknowledges(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, size_t *kept
) noexcept nogil:
    """Whether the server's packet is sound, and acknowledges all that was read or nothing of it. kept: bytes of all requests."""
    cdef uint32_t value
    if not is_sound(packet, length, segment, ready, entry.known & K_STAMP, entry.request.server_stamp, &value):
        return False
    if <int32_t>(segment.acknowledged - entry.first) >= 0:
        if <int32_t>(segment.acknowledged - entry.request.last_read) < 0:
            return False
        entry.known |= K_ACKNOWLEDGED
        entry.watch &= ~W_ACKNOWLEDGEMENT
        drop_request(entry.request, kept)
    if value and (not entry.known & K_OPENING or <int32_t>(segment.sequence - entry.opening) <= 0):
        entry.request.server_stamp = value
        entry.known |= K_STAMP | K_NEW_STAMP
    return True


cdef inline bint keep_bytes(Request *request, const uint8_t *data, size_t size, size_t *kept) noexcept nogil:
    """Keep bytes that were read, behind those that are kept, until the server acknowledges them. kept: bytes of all requests."""
    cdef uint8_t *joined = <uint8_t *>realloc(request.data, request.size + size)
    if joined == NULL:
        return False
    memcpy(joined + request.size, data, size)
    request.data = joined
    request.size += <uint32_t>size
    kept[0] += size
    return True


cdef inline bint only_asks_again(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, size_t *kept, size_t room
) noexcept nogil:
    """Whether the client's packet is sound, and one request in the plain form for the host of the one before.

    kept: bytes of all requests that are kept until they are acknowledged. room: how many there may be.
    """
    cdef Request *request = entry.request
    cdef uint32_t value
    if entry.watch & W_ACKNOWLEDGEMENT or segment.sequence != request.next:
        return False
    if segment.copied != segment.size or segment.size > LONGEST_REQUEST or kept[0] + segment.size > room:
        return False
    if not is_sound(packet, length, segment, ready, entry.known & K_CLIENT_STAMP, request.stamp, &value):
        return False
    if not is_request(packet + segment.data, segment.size, <const uint8_t *>request + sizeof(Request), request.length):
        return False
    if not keep_bytes(request, packet + segment.data, segment.size, kept):
        return False
    request.next += segment.size
    entry.first = request.last_read = request.next
    entry.watch |= W_ACKNOWLEDGEMENT
    entry.known |= K_REQUEST
    if value:
        request.stamp = value
        entry.known |= K_CLIENT_STAMP | K_NEW_CLIENT_STAMP
    return True


cdef inline void drop_request(Request *request, size_t *kept) noexcept nogil:
    """Free the bytes of a request."""
    if request.data != NULL:
        kept[0] -= request.size
        free(request.data)
        request.data = NULL
        request.size = 0


cdef inline int expect(Entry *entry, expected) except -1:
    """Note what is expected of the flow's packets."""
    cdef const uint8_t *name
    first, last_read, opening, stamp, requests = expected
    host = b"" if requests is None else requests[2]
    if entry.request != NULL and requests is not None and entry.request.length != <uint32_t>len(host):
        free(entry.request)
        entry.request = NULL
    if entry.request == NULL:
        entry.request = <Request *>malloc(sizeof(Request) + len(host))
        if entry.request == NULL:
            raise MemoryError
        entry.request.data = NULL
        entry.request.size = 0
        entry.request.length = len(host)
    entry.known = 0
    entry.first, entry.request.last_read = first, last_read
    if opening is not None:
        entry.opening = opening
        entry.known |= K_OPENING
    if stamp is not None:
        entry.request.server_stamp = stamp
        entry.known |= K_STAMP
    if requests is None:
        return 0
    number, stamp, host = requests
    name = host
    entry.request.data = NULL
    entry.request.size = 0
    entry.request.next = number
    memcpy(<uint8_t *>entry.request + sizeof(Request), name, len(host))
    if stamp is not None:
        entry.request.stamp = stamp
        entry.known |= K_CLIENT_STAMP
    return 0


cdef inline object heard_of(Entry *entry, size_t *kept):
    """The values of `Heard` for the packets that were not shown; the entry forgets them."""
    cdef Request *request = entry.request
    cdef uint8_t known = entry.known
    number = client_stamp = None
    piece = b""
    if known & K_REQUEST:
        number = request.next
        if request.data != NULL:
            piece = PyBytes_FromStringAndSize(<char *>request.data, request.size)
            drop_request(request, kept)
    if known & K_NEW_CLIENT_STAMP:
        client_stamp = request.stamp
    entry.known = 0
    return (
        request.last_read if known & K_ACKNOWLEDGED else None, request.server_stamp if known & K_NEW_STAMP else None,
        client_stamp, number, piece,
    )


cdef inline object opening_of(Entry *entry, size_t *kept):
    """The values of `Opening` for a connection that no element was shown; the entry forgets them."""
    cdef Request *request = entry.request
    cdef uint8_t state = entry.unshown & O_STATE
    server_first = entry.opening if entry.known & K_OPENING else None
    closed, ended = bool(entry.unshown & O_CLOSED), bool(entry.unshown & O_ENDED)
    earlier = None
    if state <= O_ANSWERED and not entry.unshown & O_FIRST:
        if entry.unshown & O_EARLIER:
            earlier = request.earlier_first, request.earlier_next
        return (entry.first, server_first, "", "", 0, False, b"", False, None, None, closed, ended, earlier)
    name = (<const char *>request + sizeof(Request))[: request.length].decode("ascii")
    client_stamp = request.stamp if entry.known & K_CLIENT_STAMP else None
    stamp = request.server_stamp if entry.known & K_STAMP else None
    number, piece = request.next, b""
    if request.data != NULL:
        piece = PyBytes_FromStringAndSize(<char *>request.data, request.size)
        number = <uint32_t>((request.next if state <= O_ANSWERED else request.last_read) - request.size)
        drop_request(request, kept)
    return (
        request.initial, server_first, "http" if state == O_HTTP else "tls", name, number, state == O_READ and not piece,
        piece, bool(entry.unshown & O_FIRST), client_stamp, stamp, closed, ended, earlier, request.began / 16.0, request.pieces,
        PyBytes_FromStringAndSize(<char *>request + sizeof(Request) + request.length, request.details),
    )


cdef inline bint passes_settled(
    Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, size_t *kept, size_t room
) noexcept nogil:
    """Whether a packet of a settled flow gets the flow's verdict, since no element watches for it."""
    cdef uint8_t watch
    cdef bint from_client
    if entry.verdict == ASK or segment.flags & (F_SYN | F_FIN | F_RST | F_URG):
        return False
    watch = entry.watch
    from_client = segment.down == entry.client
    if watch & W_ACKNOWLEDGEMENT and not from_client:
        if not only_acknowledges(entry, packet, length, segment, ready, kept):
            return False
    if segment.size == 0:
        if watch & (W_CLIENT_BARE if from_client else W_SERVER_BARE):
            return False
    elif watch & (W_CLIENT if from_client else W_SERVER):
        if not (from_client and watch & W_REQUEST) or watch & (W_SERVER | W_CLIENT_BARE | W_SERVER_BARE):
            return False
        if not only_asks_again(entry, packet, length, segment, ready, kept, room):
            return False
    elif watch & (W_DNS | W_QUIC):
        if segment.copied != segment.size:
            return False
        if watch & W_DNS and (may_be_dns(packet + segment.data, segment.size) or (ready and is_wrong(packet, length, segment))):
            return False
        if watch & W_QUIC and packet[segment.data] >= 0xC0:
            return False
    return True
