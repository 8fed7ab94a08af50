"""Token buckets and counts of what was held back, as nfq_agent.rate has them: the same numbers from the same calls. Pure."""

from libc.stdint cimport uint64_t

cdef enum:
    # Seconds, as in nfq_agent.rate: a clock that was set back by more, and how often a count is due.
    SET_BACK = 1
    EVERY = 10


cdef struct Tokens:
    double left
    double last


cdef struct Held:
    uint64_t count
    double since


cdef inline bint take_token(Tokens *tokens, double per_second, double burst, double now) noexcept nogil:
    cdef double elapsed = now - tokens.last
    if elapsed > 0.0:
        tokens.last = now
        tokens.left = min(burst, tokens.left + elapsed * per_second)
    elif elapsed < -SET_BACK:
        tokens.last = now
    if tokens.left < 1.0:
        return False
    tokens.left -= 1.0
    return True


cdef inline bint has_token(const Tokens *tokens, double per_second, double burst, double now) noexcept nogil:
    """Whether `take_token` would take one."""
    cdef double elapsed = now - tokens.last
    return (min(burst, tokens.left + elapsed * per_second) if elapsed > 0.0 else tokens.left) >= 1.0


cdef inline void hold(Held *held, double now) noexcept nogil:
    """One more was held back."""
    if held.count == 0:
        held.since = now
    held.count += 1


cdef inline uint64_t due(Held *held, double now) noexcept nogil:
    """The count, if it is time to say it, and 0 otherwise. Counting then starts at 0."""
    cdef uint64_t count = held.count
    cdef double age = now - held.since
    if count == 0 or 0.0 <= age < EVERY:
        return 0
    held.count = 0
    return count
