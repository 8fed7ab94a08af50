"""The keys looked up last, each with the verdict that was found: a table of 64 places in front of a dictionary. Pure.

An entry is good only in the era in which it was kept: its owner starts an era whenever the dictionary may have changed. The table
does not own the verdicts; the dictionary does.
"""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from .packet_message cimport LONGEST_KEY, PLACE

cdef enum:
    # As many as 6 bits tell apart; each holds the key that was kept last.
    RECENT = 64


cdef struct Answered:
    uint64_t era
    size_t length
    uint8_t key[LONGEST_KEY]
    PyObject *verdict


cdef inline size_t slot(const uint8_t *key, size_t length) noexcept nogil:
    """The place of a key, by its addresses and ports."""
    cdef uint32_t mixed = 0, word
    cdef size_t offset = PLACE + 1
    while offset < length:
        memcpy(&word, key + offset, 4)
        mixed ^= word
        offset += 4
    # The golden ratio spreads them; the upper 6 bits are as many as there are places.
    return (mixed * <uint32_t>0x9E3779B1) >> 26


cdef inline bint has_verdict(
    const Answered *places, uint64_t era, const uint8_t *key, size_t length, const PyObject *verdict
) noexcept nogil:
    """Whether this key was found to have this verdict, in this era."""
    cdef const Answered *place = &places[slot(key, length)]
    if place.era != era or place.verdict != verdict:
        return False
    return place.length == length and memcmp(place.key, key, length) == 0


cdef inline void keep_verdict(Answered *places, uint64_t era, const uint8_t *key, size_t length, PyObject *verdict) noexcept nogil:
    """Keep the verdict of a key, in the place of whatever is there."""
    cdef Answered *place = &places[slot(key, length)]
    place.era = era
    place.length = length
    place.verdict = verdict
    memcpy(place.key, key, length)
