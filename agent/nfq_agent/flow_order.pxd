"""The order of the flows by their last packet, in three lists: half-open flows, settled ones, and those whose verdict the kernel keeps. Pure."""

from libc.stdint cimport int32_t, uint8_t, uint32_t

from .flow_entry cimport Entry


cdef enum:
    HALF_OPEN = 0
    SETTLED = 1
    OFFLOADED = 2
    KINDS = 3


cdef struct Order:
    # Of each kind of flow: how many, and the ends of the list.
    uint32_t number[KINDS]
    uint32_t oldest[KINDS]
    uint32_t newest[KINDS]


cdef inline void detach(Entry *entries, Order *order, uint32_t place) noexcept nogil:
    """Take an entry out of its list."""
    cdef Entry *entry = &entries[place]
    if entry.older:
        entries[entry.older].newer = entry.newer
    else:
        order.oldest[entry.kind] = entry.newer
    if entry.newer:
        entries[entry.newer].older = entry.older
    else:
        order.newest[entry.kind] = entry.older
    order.number[entry.kind] -= 1


cdef inline void append(Entry *entries, Order *order, uint32_t place) noexcept nogil:
    """Put an entry at the end of the list of its kind."""
    cdef Entry *entry = &entries[place]
    entry.older = order.newest[entry.kind]
    entry.newer = 0
    if entry.older:
        entries[entry.older].newer = place
    else:
        order.oldest[entry.kind] = place
    order.newest[entry.kind] = place
    order.number[entry.kind] += 1


cdef inline void refresh(Entry *entries, Order *order, uint32_t place, uint8_t kind, uint32_t tick) noexcept nogil:
    """A packet of an entry came: it moves to the end of the list of its kind. Within one tick the order stays as it is."""
    cdef Entry *entry = &entries[place]
    if kind == entry.kind and (entry.last == tick or order.newest[kind] == place):
        entry.last = tick
        return
    entry.last = tick
    detach(entries, order, place)
    entry.kind = kind
    append(entries, order, place)


cdef inline uint32_t to_forget(const Entry *entries, const Order *order, bint full, uint32_t share, uint32_t before) noexcept nogil:
    """The flow that makes room for a new one, half-open as all are at first; 0 if none has to go.

    share: half-open flows that a full table may have. before: a flow whose last packet came before this tick is too old.
    """
    cdef uint32_t half = order.oldest[HALF_OPEN], kept = order.oldest[OFFLOADED], settled = order.oldest[SETTLED]
    if half and ((full and order.number[HALF_OPEN] + 1 > share) or <int32_t>(entries[half].last - before) < 0):
        return half
    # The kernel does not ask about it again.
    if kept and (full or <int32_t>(entries[kept].last - before) < 0):
        return kept
    if settled and (full or <int32_t>(entries[settled].last - before) < 0):
        return settled
    return half if full else 0
