"""What the flow table keeps of a flow. Values only."""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .plain_packet cimport KEY

cdef enum:
    # The index of no verdict: ask.
    ASK = 255
    # Watch, in nfq_agent.flow.
    W_CLIENT = 1
    W_SERVER = 2
    W_CLIENT_BARE = 4
    W_SERVER_BARE = 8
    W_ALL = 15
    W_DNS = 16
    W_QUIC = 32
    W_ACKNOWLEDGEMENT = 64
    W_REQUEST = 128
    # What is known of the packets that are expected: the server's first byte, and a timestamp of each side. What is new of it: a
    # timestamp of each side, an acknowledgement of all that was read, a request.
    K_OPENING = 1
    K_STAMP = 2
    K_CLIENT_STAMP = 4
    K_NEW_STAMP = 8
    K_NEW_CLIENT_STAMP = 16
    K_ACKNOWLEDGED = 32
    K_REQUEST = 64
    K_NEW = 120
    # A connection that no element was shown yet: how far it is, and what is known besides. Of the client's bytes that are kept,
    # O_FIRST: they are the first message, or its beginning, where that is not whole (O_SYN, O_ANSWERED). O_EARLIER: another
    # connection with the same five-tuple was before it. O_OFFLOADED: the kernel was told to keep the verdict, so that packets that
    # still come are shown.
    O_SYN = 1
    O_ANSWERED = 2
    O_HTTP = 3
    O_TLS = 4
    O_READ = 5
    # Of UDP: messages of DNS, and datagrams that say nothing, with O_GAVE_UP once they cannot say anything any more.
    O_DNS = 6
    O_QUIET = 7
    O_STATE = 7
    O_CLOSED = 8
    O_GAVE_UP = 8
    O_ENDED = 16
    O_FIRST = 32
    O_EARLIER = 64
    O_OFFLOADED = 128
    # `seen` of a flow that was answered.
    BOTH = 3

cdef extern from *:
    """
    #include <stdint.h>
    typedef struct {
        uint32_t next, stamp, size, length, details, initial, last_read, server_stamp;
        union { uint32_t earlier_first, began; };
        union { uint32_t earlier_next, pieces; };
        uint8_t *data;
    } nfq_request;
    /* Without gaps: a table has many of them. */
    typedef struct __attribute__((packed)) {
        nfq_request *request;
        PyObject *flow;
        uint32_t next, older, newer, last, first, opening;
        uint32_t counted[2];
        uint32_t low_bytes[2];
        uint16_t high_bytes[2];
        uint8_t key[40];
        uint8_t watch, verdict, known, unshown;
        uint8_t client : 1, seen : 2, kind : 2;
    } nfq_entry;
    /* With its place in the hash, 110 bytes at most: 128 MB hold a million. */
    _Static_assert(sizeof(nfq_entry) + sizeof(uint32_t) <= 110, "an entry of the flow table");
    """
    ctypedef struct Request "nfq_request":
        # The requests that are expected of the client: the number of the next byte, its latest timestamp, and the host, which follows
        # this struct; behind it what a hello says besides, of so many bytes. And the bytes of the latest one, until the server has
        # acknowledged them.
        uint32_t next
        uint32_t stamp
        uint32_t size
        uint32_t length
        uint32_t details
        # Of a connection that no element was shown: the client's initial number. Until its first message comes, where the client
        # of the connection before began and was; then when it came, in sixteenths of a second, and in how many segments.
        uint32_t initial
        uint32_t earlier_first
        uint32_t earlier_next
        uint32_t began
        uint32_t pieces
        # Behind the last byte that was read (see Expected in nfq_agent.flow), and the server's latest timestamp.
        uint32_t last_read
        uint32_t server_stamp
        uint8_t *data

    ctypedef struct Entry "nfq_entry":
        uint8_t key[KEY]
        # The next entry of the bucket, or of the free ones; and the neighbours in the order of the last packet. 0 is none.
        uint32_t next
        uint32_t older
        uint32_t newer
        # When the last packet came, in sixteenths of a second.
        uint32_t last
        # Packets and bytes that went up and down (see Segment), as the IP header has the length. Of the bytes, 48 bits.
        uint32_t counted[2]
        uint32_t low_bytes[2]
        uint16_t high_bytes[2]
        # Whether the client's packets go down (see Segment); which directions were seen, a bit each; in which list it is.
        uint8_t client
        uint8_t seen
        uint8_t kind
        # What has to be looked at, and the verdict of every other packet.
        uint8_t watch
        uint8_t verdict
        # Of what is expected: what is known, and the numbers.
        uint8_t known
        # How far a connection is that no element was shown, 0 for one that has a Flow. Until its first message `first` is the
        # client's initial number. Of O_QUIET: `known` is the number of datagrams, `opening` their bytes, and `first` when the first
        # came, in 1,024ths of a second.
        uint8_t unshown
        uint32_t first
        uint32_t opening
        # Where something is expected, or a first message was read; else NULL.
        Request *request
        PyObject *flow


cdef inline uint64_t bytes_of(const Entry *entry, bint down) noexcept nogil:
    """The bytes that went down, or up."""
    return <uint64_t>entry.high_bytes[down] << 32 | entry.low_bytes[down]


cdef inline void count(Entry *entry, bint down, size_t length) noexcept nogil:
    """Count a packet of so many bytes."""
    entry.counted[down] += 1
    entry.low_bytes[down] += <uint32_t>length
    if entry.low_bytes[down] < length:
        entry.high_bytes[down] += 1
    entry.seen = entry.seen | (2 if down else 1)
