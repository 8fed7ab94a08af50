"""How often a reader looks for a packet again before it sleeps. Pure: what was found in, a number out.

A sleep costs the sender of the next packet a wake-up. So a reader whose packets follow each other looks a few times more, for less
time than a sleep and a wake-up take. It stops where that finds nothing: there packets are far apart, or their sender needs this
processor. Then it tries again after twice as many sleeps, up to a bound.
"""

from libc.stdint cimport uint32_t

cdef enum:
    # Looks before a sleep: about 6 microseconds. tests/bench/NOTES.md has other numbers.
    GLANCES = 12
    # Attempts that are weighed together: it continues while half of them find a packet.
    WEIGHED = 16
    # Sleeps without a look after the first attempts that did not pay, and at most.
    RESTS = 32
    MOST_RESTS = 2048


cdef struct Glance:
    uint32_t tried
    uint32_t found
    # Sleeps until it looks again, and how many they were at the last time.
    uint32_t rests
    uint32_t rested


cdef inline uint32_t looks_before_sleep(Glance *glance) noexcept nogil:
    """How often to look before this sleep; 0 for not at all."""
    if glance.rests == 0:
        return GLANCES
    glance.rests -= 1
    return 0


cdef inline void weigh(Glance *glance, bint found) noexcept nogil:
    """Record an attempt that did not find a packet at once. found: it found one before it slept."""
    glance.tried += 1
    glance.found += found
    if glance.tried < WEIGHED:
        return
    if 2 * glance.found >= WEIGHED:
        glance.rested = 0
    else:
        glance.rested = min(2 * glance.rested, <uint32_t>MOST_RESTS) if glance.rested else RESTS
        glance.rests = glance.rested
    glance.tried = glance.found = 0
