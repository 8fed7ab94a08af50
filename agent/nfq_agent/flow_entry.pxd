"""What the flow table keeps of a flow. Values only."""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

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
    # O_FIRST: they are the first message. O_EARLIER: another connection with the same five-tuple was before it.
    # O_OFFLOADED: the kernel was told to keep the verdict, so that packets that still come are shown.
    O_SYN = 1
    O_ANSWERED = 2
    O_HTTP = 3
    O_TLS = 4
    O_READ = 5
    O_STATE = 7
    O_CLOSED = 8
    O_ENDED = 16
    O_FIRST = 32
    O_EARLIER = 64
    O_OFFLOADED = 128


cdef struct Request:
    # The requests that are expected of the client: the number of the next byte, its latest timestamp, and the host, which follows
    # this struct. And the bytes of the latest one, until the server has acknowledged them.
    uint32_t next
    uint32_t stamp
    uint32_t size
    uint32_t length
    # Of a connection that no element was shown: the client's initial number, and where the client of the one before began and
    # was.
    uint32_t initial
    uint32_t earlier_first
    uint32_t earlier_next
    uint8_t *data


cdef struct Entry:
    uint8_t key[KEY]
    uint32_t hashed
    # The next entry of the bucket, or of the free ones; and the neighbours in the order of the last packet. 0 is none.
    uint32_t next
    uint32_t older
    uint32_t newer
    # When the last packet came, in sixteenths of a second; and how many there were.
    uint32_t last
    uint32_t packets
    # Packets and bytes that went up and down (see Segment), as the IP header has the length.
    uint32_t counted[2]
    uint64_t bytes[2]
    # Whether the client's packets go down (see Segment); which directions were seen, a bit each; in which of the two lists it is.
    uint8_t client
    uint8_t seen
    uint8_t kind
    # What has to be looked at, and the verdict of every other packet.
    uint8_t watch
    uint8_t verdict
    # Of what is expected (see Expected in nfq_agent.flow): what is known, and the numbers.
    uint8_t known
    # How far a connection is that no element was shown, 0 for one that has a Flow. Until its first message `first` is the
    # client's initial number.
    uint8_t unshown
    uint32_t first
    uint32_t last_read
    uint32_t opening
    uint32_t stamp
    uint32_t acknowledged
    Request *request
    PyObject *flow
