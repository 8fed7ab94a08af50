"""What plain_pairs.pyx counts: for its owner, and in memory that others read, as far as it has changed since the last time."""

cdef enum:
    # Bytes from clients, bytes from destinations, connections that it accepted by itself, and those that are open.
    FORWARD = 0
    REVERSE = 1
    OPENED = 2
    ACTIVE = 3

# slots: numbers of 64 bits, or NULL; places: of these four among them. total: since the start; noted: what was written of it; taken: what
# the owner has of it. active: how many were counted as open.
cdef struct Counts:
    unsigned long long *slots
    int places[4]
    unsigned long long total[3]
    unsigned long long noted[3]
    unsigned long long taken[3]
    Py_ssize_t active


cdef inline tuple taken_from(Counts *counts):
    """What has grown since the last call, of the first three."""
    cdef unsigned long long grown[3]
    for which in range(3):
        grown[which] = counts.total[which] - counts.taken[which]
        counts.taken[which] = counts.noted[which] = counts.total[which]
    return grown[FORWARD], grown[REVERSE], grown[OPENED]


cdef inline bint note_counts(Counts *counts, Py_ssize_t active) noexcept nogil:
    """Write what has changed; False if nothing has. Only differences are added: others may write the same numbers."""
    cdef bint changed = active != counts.active
    cdef unsigned long long grown
    for which in range(3):
        grown = counts.total[which] - counts.noted[which]
        if grown:
            changed = True
            counts.noted[which] = counts.total[which]
            if counts.slots != NULL:
                counts.slots[counts.places[which]] += grown
    if active != counts.active and counts.slots != NULL:
        counts.slots[counts.places[ACTIVE]] += active - counts.active
    counts.active = active
    return changed
