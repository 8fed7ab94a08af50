"""Host names by the patterns that they fit: names that fit the same ones get the same answers. Pure.

Patterns of one kind alone: a whole name, or `*.` and a name. They come in groups of which a rule asks whether any fits.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from .flow_key cimport mix

cdef enum:
    # Groups of patterns: a bit each.
    GROUPS = 64


cdef struct Slot:
    # A name, by its place in the text; the groups that have it, and those that have what is below it.
    uint64_t hashed
    uint32_t at
    uint32_t size
    uint64_t whole
    uint64_t below


cdef struct Names:
    Slot *slots
    uint8_t *text
    uint32_t mask
    uint64_t seed


cdef inline uint64_t with_byte(uint64_t hashed, uint8_t byte, uint64_t seed) noexcept nogil:
    """The hash of a name from its end on, one byte further."""
    return mix(hashed ^ byte, 0x9E3779B97F4A7C15ULL ^ (seed << 1))


cdef inline Slot *slot_of(const Names *names, const uint8_t *name, size_t size, uint64_t hashed) noexcept nogil:
    """The place of a name, which is free if it is of no pattern. At most half of them are taken."""
    cdef uint32_t place = <uint32_t>hashed & names.mask
    cdef Slot *slot = &names.slots[place]
    while slot.size and (slot.hashed != hashed or slot.size != size or memcmp(names.text + slot.at, name, size)):
        place = place + 1 & names.mask
        slot = &names.slots[place]
    return slot


cdef inline uint64_t class_of(const Names *names, const uint8_t *name, size_t size) noexcept nogil:
    """The groups of which a pattern fits the name."""
    cdef uint64_t hashed = names.seed, found = 0
    cdef size_t at = size
    while at:
        at -= 1
        if name[at] == 0x2E:
            found |= slot_of(names, name + at + 1, size - at - 1, hashed).below
        hashed = with_byte(hashed, name[at], names.seed)
    return found | slot_of(names, name, size, hashed).whole


cdef inline int put(Names *names, const uint8_t *name, size_t size, uint32_t *used, uint64_t whole, uint64_t below) except -1:
    cdef uint64_t hashed = names.seed
    cdef size_t at
    cdef Slot *slot
    if size == 0:
        # No name fits it.
        return 0
    for at in range(size, 0, -1):
        hashed = with_byte(hashed, name[at - 1], names.seed)
    slot = slot_of(names, name, size, hashed)
    if slot.size == 0:
        slot.hashed, slot.at, slot.size = hashed, used[0], size
        memcpy(names.text + used[0], name, size)
        used[0] += size
    slot.whole |= whole
    slot.below |= below
    return 0


cdef inline int fill(Names *names, groups, uint64_t seed) except -1:
    """Take the groups of patterns: of each its whole names, and those of which what is below fits, as text."""
    cdef size_t count = 0, room = 1
    cdef uint32_t used = 0
    cdef uint64_t bit = 1
    cdef bytes text
    for each in groups:
        for kind in each:
            for name in kind:
                count += 1
                room += len(name.encode())
    names.mask = 1
    while names.mask < 2 * count:
        names.mask = names.mask * 2
    names.slots = <Slot *>calloc(names.mask, sizeof(Slot))
    names.text = <uint8_t *>malloc(room)
    if names.slots == NULL or names.text == NULL:
        raise MemoryError
    names.mask -= 1
    names.seed = seed
    for whole, below in groups:
        for name in whole:
            text = name.encode()
            put(names, text, len(text), &used, bit, 0)
        for name in below:
            text = name.encode()
            put(names, text, len(text), &used, 0, bit)
        bit <<= 1
    return 0


cdef inline void drop_names(Names *names) noexcept nogil:
    free(names.slots)
    free(names.text)
