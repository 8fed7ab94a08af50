"""Records of decided connections, as `nfq_agent.flow_memory` lays them out and reads them. Pure: the memory is given."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from .flow_key cimport mix
from .plain_packet cimport FORM_V6, K_ENDS, K_FORM, K_PORTS, KEY

cdef extern from *:
    """
    #include <stdint.h>
    /* A process may be killed between any two writes: what comes before is written before. */
    static inline void nfq_publish(unsigned char *place, unsigned int value)
    {
        __atomic_store_n((unsigned int *)place, value, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_RELEASE);
    }
    """
    void publish "nfq_publish"(uint8_t *, uint32_t) noexcept nogil
    uint16_t htons(uint16_t) noexcept nogil

cdef enum:
    # As in nfq_agent.flow_memory.
    M_PLACES = 32768
    M_RECORD = 384
    M_WAYS = 8
    M_SEED = 8
    M_TAGS = 64
    M_STAMPS = M_TAGS + 4 * M_PLACES
    M_RECORDS = M_STAMPS + 4 * M_PLACES
    M_SIZE = M_RECORDS + M_RECORD * M_PLACES
    M_BEGIN = 1048576
    M_UNANSWERED = 3600
    # Of a record: the length of the facts, protocol, length of an address, source, its port, destination, its port; the facts.
    M_HEAD = 40


cdef inline void make_head(const uint8_t *key, bint down, size_t text, uint8_t *head) noexcept nogil:
    """The head of the record of a flow, whose client's packets go down or up (see Segment)."""
    cdef size_t size = 16 if key[K_FORM] & FORM_V6 else 4
    cdef int client = 1 if down else 0
    memset(head, 0, M_HEAD)
    head[0] = text >> 8
    head[1] = text & 255
    head[2] = key[0]
    head[3] = size
    memcpy(head + 4, key + K_ENDS + 16 * client, size)
    memcpy(head + 20, key + K_PORTS + 2 * client, 2)
    memcpy(head + 22, key + K_ENDS + 16 * (1 - client), size)
    memcpy(head + 38, key + K_PORTS + 2 * (1 - client), 2)


cdef inline uint32_t row_of(const uint8_t *memory, const uint8_t *key, uint32_t *tag) noexcept nogil:
    """The first place of the row of a flow. tag: its tag, the same for both directions."""
    cdef uint64_t words[5]
    cdef uint64_t seeds[2]
    cdef uint64_t mixed
    cdef int at
    memcpy(seeds, memory + M_SEED, 16)
    memcpy(words, key, KEY)
    (<uint8_t *>words)[K_FORM] &= FORM_V6
    mixed = seeds[0]
    for at in range(5):
        mixed = mix(mixed ^ words[at], seeds[1] | 1)
    tag[0] = <uint32_t>(mixed >> 32)
    if tag[0] == 0:
        tag[0] = 1
    return <uint32_t>mixed % (M_PLACES // M_WAYS) * M_WAYS


cdef inline bint find_record(
    const uint8_t *memory, const uint8_t *key, uint32_t row, uint32_t tag, uint32_t *place
) noexcept nogil:
    """Whether there is a record of the flow, in either direction."""
    cdef const uint32_t *tags = <const uint32_t *>(memory + M_TAGS)
    cdef uint8_t head[M_HEAD]
    cdef uint32_t at
    cdef int down
    for at in range(row, row + M_WAYS):
        if tags[at] != tag:
            continue
        for down in range(2):
            make_head(key, down, 0, head)
            if memcmp(memory + M_RECORDS + M_RECORD * at + 2, head + 2, M_HEAD - 2) == 0:
                place[0] = at
                return True
        return False
    return False


cdef inline void forget_record(uint8_t *memory, const uint8_t *key) noexcept nogil:
    """Another connection begins on these ends."""
    cdef uint32_t tag, place, row = row_of(memory, key, &tag)
    if find_record(memory, key, row, tag, &place):
        publish(memory + M_TAGS + 4 * place, 0)


cdef inline void keep_record(
    uint8_t *memory, const uint8_t *key, bint down, const uint8_t *text, size_t size, bint answered, uint32_t seconds
) noexcept nogil:
    """Keep what a connection said. text: the facts, as `text_of` writes them."""
    cdef const uint32_t *tags = <const uint32_t *>(memory + M_TAGS)
    cdef const uint32_t *stamps = <const uint32_t *>(memory + M_STAMPS)
    cdef uint32_t tag, place, at, row = row_of(memory, key, &tag)
    cdef uint8_t *record
    if size > M_RECORD - M_HEAD:
        return
    if not find_record(memory, key, row, tag, &place):
        place = row
        for at in range(row, row + M_WAYS):
            if tags[at] == 0:
                place = at
                break
            if stamps[at] < stamps[place]:
                place = at
    publish(memory + M_TAGS + 4 * place, 0)
    record = memory + M_RECORDS + M_RECORD * place
    make_head(key, down, size, record)
    memcpy(record + M_HEAD, text, size)
    publish(memory + M_STAMPS + 4 * place, seconds + M_BEGIN - (0 if answered else M_UNANSWERED))
    publish(memory + M_TAGS + 4 * place, tag)
