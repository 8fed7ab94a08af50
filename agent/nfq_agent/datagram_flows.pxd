"""UDP flows that no element was shown, since the chain's answer is known already: DNS, and datagrams that say nothing.

These functions say what `Datagrams` would make of a datagram of a flow that is accepted; where that is not plain, they say no, and
the elements are shown it. Pure.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport realloc
from libc.string cimport memcmp, memcpy

from .dns_head cimport name_of_message
from .flow_entry cimport O_DNS, O_GAVE_UP, O_QUIET, O_STATE, Entry, Request
from .host_name cimport LONGEST_NAME
from .openings cimport AGAIN, Openings
from .plain_packet cimport Segment, has_wrong_header, is_wrong
from .silent_datagram cimport may_be_message, may_say

cdef enum:
    # PACKETS and SECONDS of nfq_agent.message_events, in 1,024ths of a second.
    MOST_QUIET = 32
    LONGEST_QUIET = 10240


cdef inline bint is_taken(const uint8_t *packet, size_t length, const Segment *segment, bint ready) noexcept nogil:
    """Whether there is a payload, copied whole, that its receiver takes (see nfq_agent.checksum.is_wrong)."""
    if segment.size == 0 or segment.copied != segment.size:
        return False
    return not (is_wrong(packet, length, segment) if ready else has_wrong_header(packet))


cdef inline bint keep_name(Entry *entry, const uint8_t *name, size_t size) noexcept nogil:
    """Keep the name of the latest message."""
    cdef Request *request = entry.request
    if request == NULL or request.length != size:
        request = <Request *>realloc(request, sizeof(Request) + size)
        if request == NULL:
            return False
        entry.request = request
        request.data = NULL
        request.size = request.details = 0
        request.length = size
    memcpy(<uint8_t *>request + sizeof(Request), name, size)
    return True


cdef inline uint8_t first_says(
    Openings openings, const uint8_t *key, const uint8_t *packet, size_t length, const Segment *segment, bint ready, uint8_t *name,
    size_t *size,
) noexcept nogil:
    """What the first datagram of a flow is, where the chain accepts it: O_DNS with a name, or O_QUIET; else 0."""
    cdef const uint8_t *data = packet + segment.data
    cdef uint8_t kind = O_QUIET
    size[0] = 0
    if not is_taken(packet, length, segment, ready):
        return 0
    if openings.is_apart(key):
        kind = O_DNS
        if not openings.questions or not name_of_message(data, segment.size, name, size):
            return 0
    elif openings.within == 0 or segment.size > openings.within_bytes or may_say(data, segment.size):
        return 0
    return kind if openings.accepts(key, segment.down, kind, name, size[0], NULL) else 0


cdef inline bint begin_datagrams(
    Entry *entry, uint8_t kind, const Segment *segment, uint32_t moment, const uint8_t *name, size_t size
) noexcept nogil:
    """The first datagram, on a new entry. moment: in 1,024ths of a second."""
    entry.client = segment.down
    if kind == O_DNS and not keep_name(entry, name, size):
        return False
    entry.unshown = kind
    entry.verdict = entry.watch = 0
    entry.known = 1
    entry.first = moment
    entry.opening = segment.size
    return True


cdef inline bint says_again(Openings openings, Entry *entry, const uint8_t *data, size_t size) noexcept nogil:
    """Whether a later datagram of DNS is one for a name that is accepted."""
    cdef uint8_t name[LONGEST_NAME]
    cdef size_t length = 0
    if not name_of_message(data, size, name, &length):
        return False
    if length == entry.request.length and memcmp(<uint8_t *>entry.request + sizeof(Request), name, length) == 0:
        return True
    return openings.accepts(entry.key, entry.client, O_DNS | AGAIN, name, length, NULL) and keep_name(entry, name, length)


cdef inline bint stays_quiet(Openings openings, Entry *entry, const uint8_t *data, size_t size, uint32_t moment) noexcept nogil:
    """Whether a later datagram says nothing either, so that its flow is accepted still, or accepted for having said nothing."""
    if may_say(data, size):
        return False
    if entry.known + 1 >= MOST_QUIET or <int32_t>(moment - entry.first) > LONGEST_QUIET:
        if not openings.accepts(entry.key, entry.client, O_QUIET | AGAIN, NULL, 0, NULL):
            return False
        entry.unshown |= O_GAVE_UP
    elif <uint32_t>entry.known + 1 > openings.within or entry.opening + size > openings.within_bytes:
        return False
    entry.known += 1
    entry.opening += <uint32_t>size
    return True


cdef inline bint goes_on(
    Openings openings, Entry *entry, const uint8_t *packet, size_t length, const Segment *segment, bint ready, uint32_t moment
) noexcept nogil:
    """Whether a later datagram leaves its flow accepted."""
    cdef const uint8_t *data = packet + segment.data
    if not is_taken(packet, length, segment, ready):
        return False
    if entry.unshown & O_STATE == O_DNS:
        return says_again(openings, entry, data, segment.size)
    if entry.unshown & O_GAVE_UP:
        return not may_be_message(data, segment.size)
    return stays_quiet(openings, entry, data, segment.size, moment)


cdef inline object exchange_of(const Entry *entry):
    """The values of `Exchange` for a flow that no element was shown."""
    if entry.unshown & O_STATE == O_DNS:
        return "dns", (<const char *>entry.request + sizeof(Request))[: entry.request.length].decode("ascii"), 0, 0, 0.0, False
    return "", "", entry.known, entry.opening, entry.first / 1024.0, bool(entry.unshown & O_GAVE_UP)
