"""What was thrown for the next packets, for steps.pyx: to `quiet` of them nothing happens, and then something to one, or nothing."""

# happens: -1 if it has to be thrown again.
cdef struct Thrown:
    int quiet, happens


cdef inline int what_next(const Thrown *thrown) noexcept nogil:
    """What happens to the next packet; it stays the next one."""
    return 0 if thrown.quiet else thrown.happens


cdef inline void go_on(Thrown *thrown) noexcept nogil:
    """The next packet is the one behind it."""
    if thrown.quiet:
        thrown.quiet -= 1
    else:
        thrown.happens = -1
