"""The layout of the answers to openings, for the flow table."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .name_class cimport Names

cdef enum:
    # Elements that decide about one opening.
    MOST_DECIDED = 4
    # The beginning of a ClientHello, beside O_SYN, O_HTTP and O_TLS.
    BEGUN = 64
    # With a kind of UDP: a later datagram of the flow, with another name, or after which it is known that none will say anything.
    AGAIN = 8


cdef struct Answer:
    # What the answer is to, `size` bytes; whether the chain accepts; and the facts for the flow memory, or nothing.
    uint64_t hashed
    uint8_t *key
    uint32_t size
    uint32_t text_size
    uint8_t accepts
    # What decided, as numbers in `counts`.
    uint8_t decided
    uint16_t places[MOST_DECIDED]
    uint8_t *text
    # Where in the facts the name stands, where they are for all names that fit the same patterns; 0 for one name alone.
    uint32_t name_at
    uint32_t name_size
    # What a hello says besides its name, as text, where that is asked for.
    uint8_t *details
    uint32_t details_size


cdef class Openings:
    cdef Answer *answers
    cdef Answer latest
    cdef uint64_t seed
    cdef uint32_t reads
    cdef uint32_t apart[4]
    # Of UDP: datagrams, and their bytes, that may say nothing while the answer is for the packet alone; 0 where datagrams that say
    # nothing are not answered. Whether messages of DNS are.
    cdef uint32_t within, within_bytes
    cdef bint questions
    cdef object foresee
    # The flow memory, NULL for none.
    cdef uint8_t *memory
    cdef object held
    # The numbers of decisions, NULL for none.
    cdef uint64_t *counts
    cdef object counted
    # The patterns that answers follow from, and whether names need not be told apart by more.
    cdef Names names
    cdef bint by_class
    # What a hello says besides its name, where answers follow from that, else None.
    cdef object tell
    cdef bint tells

    cdef bint accepts(
        self, const uint8_t *key, bint down, uint8_t kind, const uint8_t *name, size_t length, const uint8_t *hello
    ) noexcept nogil
    cdef bint is_apart(self, const uint8_t *key) noexcept nogil
    cdef bint _ask(
        self, const uint8_t *key, bint down, uint8_t kind, const uint8_t *name, size_t length, const uint8_t *hello, Answer *answer
    ) noexcept with gil
    cdef void forget(self, const uint8_t *key) noexcept nogil
    cdef void keep(
        self, const uint8_t *key, bint down, bint answered, uint32_t tick, uint8_t kind, const uint8_t *name, size_t length,
        const uint8_t *hello,
    ) noexcept nogil
    cdef void _keep_long(
        self, const uint8_t *key, bint down, bint answered, uint32_t tick, uint8_t kind, const uint8_t *name, size_t length,
        const uint8_t *hello,
    ) noexcept with gil
