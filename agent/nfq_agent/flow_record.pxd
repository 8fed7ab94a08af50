"""Records of decided connections, as `nfq_agent.flow_memory` lays them out and reads them. Pure: the memory is given."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from .plain_packet cimport FORM_V6, K_ENDS, K_FORM, K_PORTS

cdef extern from *:
    """
    #include <stdint.h>
    /* The first eight bytes of BLAKE2b (RFC 7693) of at most 128 bytes, padded with zeros, for a digest of eight bytes. */
    static inline uint64_t nfq_blake2b(const uint64_t message[16], uint64_t size)
    {
        static const uint64_t iv[8] = {
            0x6a09e667f3bcc908ULL, 0xbb67ae8584caa73bULL, 0x3c6ef372fe94f82bULL, 0xa54ff53a5f1d36f1ULL,
            0x510e527fade682d1ULL, 0x9b05688c2b3e6c1fULL, 0x1f83d9abfb41bd6bULL, 0x5be0cd19137e2179ULL};
        static const unsigned char sigma[10][16] = {
            {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
            {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
            {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
            {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
            {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
        static const unsigned char lanes[8][4] = {
            {0, 4, 8, 12}, {1, 5, 9, 13}, {2, 6, 10, 14}, {3, 7, 11, 15},
            {0, 5, 10, 15}, {1, 6, 11, 12}, {2, 7, 8, 13}, {3, 4, 9, 14}};
        const uint64_t first = iv[0] ^ 0x01010008ULL;
        uint64_t v[16];
        for (int i = 0; i < 8; i++) {
            v[i] = iv[i];
            v[i + 8] = iv[i];
        }
        v[0] = first;
        v[12] ^= size;
        v[14] = ~v[14];
    #define NFQ_ROTATED(x, n) ((x) >> (n) | (x) << (64 - (n)))
        for (int round = 0; round < 12; round++)
            for (int i = 0; i < 8; i++) {
                const unsigned char *s = &sigma[round % 10][2 * i], *l = lanes[i];
                uint64_t a = v[l[0]], b = v[l[1]], c = v[l[2]], d = v[l[3]];
                a += b + message[s[0]];
                d = NFQ_ROTATED(d ^ a, 32);
                c += d;
                b = NFQ_ROTATED(b ^ c, 24);
                a += b + message[s[1]];
                d = NFQ_ROTATED(d ^ a, 16);
                c += d;
                b = NFQ_ROTATED(b ^ c, 63);
                v[l[0]] = a, v[l[1]] = b, v[l[2]] = c, v[l[3]] = d;
            }
    #undef NFQ_ROTATED
        return first ^ v[0] ^ v[8];
    }
    /* A process may be killed between any two writes: what comes before is written before. */
    static inline void nfq_publish(unsigned char *place, unsigned int value)
    {
        __atomic_store_n((unsigned int *)place, value, __ATOMIC_SEQ_CST);
    }
    """
    uint64_t blake2b "nfq_blake2b"(const uint64_t *, uint64_t) noexcept nogil
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
    cdef uint64_t message[16]
    cdef uint8_t *data = <uint8_t *>message
    cdef size_t size = 16 if key[K_FORM] & FORM_V6 else 4
    cdef uint64_t digest
    memset(message, 0, sizeof(message))
    memcpy(data, memory + M_SEED, 16)
    memcpy(data + 16, key + K_ENDS, size)
    memcpy(data + 16 + size, key + K_ENDS + 16, size)
    memcpy(data + 16 + 2 * size, key + K_PORTS, 4)
    digest = blake2b(message, 20 + 2 * size)
    tag[0] = <uint32_t>(digest >> 32) + key[0]
    if tag[0] == 0:
        tag[0] = 1
    return <uint32_t>digest % (M_PLACES // M_WAYS) * M_WAYS


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
