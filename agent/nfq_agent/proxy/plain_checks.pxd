"""Which of the connections that plain_pairs.pyx accepts are checked for a loop: so many a second. A token bucket, as rate.Bucket."""

# per_second: also how many tokens it holds at most.
cdef struct Checks:
    double per_second, tokens, last


cdef inline bint take_check(Checks *checks, double now) noexcept nogil:
    """Take a token; False if there is none. now: monotonic seconds."""
    if now > checks.last:
        checks.tokens = min(checks.per_second, checks.tokens + (now - checks.last) * checks.per_second)
        checks.last = now
    if checks.tokens < 1:
        return False
    checks.tokens -= 1
    return True
