"""The order of the flows by their last packet, in two lists: half-open flows and settled ones. Pure."""

from libc.stdint cimport uint8_t, uint32_t

from .flow_entry cimport Entry


cdef struct Order:
    # Of the half-open flows and of the settled ones: how many, and the ends of the list.
    uint32_t number[2]
    uint32_t oldest[2]
    uint32_t newest[2]


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
