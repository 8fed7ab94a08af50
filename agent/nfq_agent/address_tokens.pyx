# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A token bucket for each address, as nfq_agent.rate.Buckets: the one that was used longest ago is forgotten first. Pure."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

from .flow_key cimport mix
from .tokens cimport take_token

cdef enum:
    # Addresses for which there is room at first; it doubles when it is full.
    FIRST = 256


cdef class AddressTokens:
    """per_second tokens are added to a bucket, it holds at most burst, and it starts full. limit: addresses that are remembered."""

    def __cinit__(self, double per_second, double burst, uint32_t limit):
        if not 1 <= limit < 1 << 30:
            raise ValueError("at least one address is remembered")
        self.per_second = per_second
        self.burst = burst
        self.limit = limit
        # Python draws the secret of its own hashes at each start.
        self.seed = <uint64_t>hash(b"nfq-agent addresses") | 1
        if not self._grow():
            raise MemoryError

    def __dealloc__(self):
        free(self.owners)
        free(self.buckets)

    def __len__(self):
        return self.used

    def take_from(self, const uint8_t[::1] address not None, double now):
        """Take one token of an address of 4 or 16 bytes, or of none; False where there is none. now: seconds."""
        if address.shape[0] > 16:
            raise ValueError("an address has at most 16 bytes")
        return self.take(&address[0] if address.shape[0] else NULL, address.shape[0], now)

    cdef bint take(self, const uint8_t *key, uint32_t size, double now) noexcept nogil:
        cdef uint64_t words[2]
        cdef uint64_t mixed
        cdef uint32_t place
        words[0] = words[1] = 0
        memcpy(words, key, size)
        mixed = mix(mix(self.seed ^ words[0], 0x9E3779B97F4A7C15ULL ^ size) ^ words[1], self.seed)
        place = self._find(key, size, <uint32_t>(mixed ^ mixed >> 32))
        if place == 0:
            place = self._add(key, size, <uint32_t>(mixed ^ mixed >> 32), now)
        elif place != self.newest:
            self._unlink(place)
            self._append(place)
        return take_token(&self.owners[place].tokens, self.per_second, self.burst, now)

    cdef uint32_t _find(self, const uint8_t *key, uint32_t size, uint32_t hashed) noexcept nogil:
        cdef uint32_t place = self.buckets[hashed & self.mask]
        cdef Owner *owner
        while place:
            owner = &self.owners[place]
            if owner.hashed == hashed and owner.size == size and memcmp(owner.key, key, size) == 0:
                return place
            place = owner.next
        return 0

    cdef uint32_t _add(self, const uint8_t *key, uint32_t size, uint32_t hashed, double now) noexcept nogil:
        cdef uint32_t place
        cdef uint32_t *link
        cdef Owner *owner
        if self.used == self.limit or (self.used == self.room and not self._grow()):
            place = self.oldest
            link = &self.buckets[self.owners[place].hashed & self.mask]
            while link[0] != place:
                link = &self.owners[link[0]].next
            link[0] = self.owners[place].next
            self._unlink(place)
            self.evicted += 1
        else:
            self.used += 1
            place = self.used
        owner = &self.owners[place]
        memset(owner, 0, sizeof(Owner))
        memcpy(owner.key, key, size)
        owner.size = size
        owner.hashed = hashed
        owner.tokens.left = self.burst
        owner.tokens.last = now
        owner.next = self.buckets[hashed & self.mask]
        self.buckets[hashed & self.mask] = place
        self._append(place)
        return place

    cdef bint _grow(self) noexcept nogil:
        """Make room for twice as many; False if there is no memory."""
        cdef uint32_t room = min(self.limit, 2 * self.room if self.room else FIRST), count = 64, place
        cdef Owner *owners
        cdef uint32_t *buckets
        while count < room:
            count *= 2
        buckets = <uint32_t *>calloc(count, sizeof(uint32_t))
        owners = <Owner *>realloc(self.owners, (room + 1) * sizeof(Owner))
        if owners != NULL:
            self.owners = owners
        if owners == NULL or buckets == NULL:
            free(buckets)
            return False
        free(self.buckets)
        self.buckets = buckets
        self.mask = count - 1
        self.room = room
        for place in range(1, self.used + 1):
            owners[place].next = buckets[owners[place].hashed & self.mask]
            buckets[owners[place].hashed & self.mask] = place
        return True

    cdef void _unlink(self, uint32_t place) noexcept nogil:
        cdef Owner *owner = &self.owners[place]
        if owner.older:
            self.owners[owner.older].newer = owner.newer
        else:
            self.oldest = owner.newer
        if owner.newer:
            self.owners[owner.newer].older = owner.older
        else:
            self.newest = owner.older

    cdef void _append(self, uint32_t place) noexcept nogil:
        cdef Owner *owner = &self.owners[place]
        owner.older = self.newest
        owner.newer = 0
        if self.newest:
            self.owners[self.newest].newer = place
        else:
            self.oldest = place
        self.newest = place
