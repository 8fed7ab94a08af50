# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Elements in their compiled form. Pure: no I/O, no clock.

Each element asks its own step too, for packets that are shown to it: one state and one rule serve both ways.
"""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from .address_tokens cimport AddressTokens
from .flow_key cimport mix
from .plain_packet cimport P_TCP, P_UDP, ntohs
from .thrown cimport Thrown, go_on, what_next
from .tokens cimport Held, Tokens, due, has_token, hold, take_token

cdef enum:
    # Flows whose choice is kept.
    KEPT = 1024
    FLOW = 37
    # What `chaos` does to a packet, a bit each: the drop, which needs no more than a verdict.
    BROKEN_DROP = 1
    # FIN, SYN, RST, ACK; and SYN alone.
    OPENING = 0x17
    SYN = 0x02

# `throw` says at once what happens to so many packets at most: a call into Python for each one takes longer than its verdict.
AHEAD = 256


cdef class Step:
    """Neither judges nor hears."""

    @property
    def drops(self):
        """Whether it may drop a packet."""
        return self.may_drop

    @property
    def judges(self):
        """Whether it may give a verdict of its own."""
        return self.decides

    @property
    def changes(self):
        """Whether it may give a verdict of its own, or another one than was given."""
        return self.decides or self.amends

    @property
    def goes_by_flow(self):
        """Whether it relies on the verdict of a flow to last."""
        return False

    @property
    def shows_openings(self):
        """Whether its element has to be shown every flow that begins."""
        return False

    def show_drops(self):
        """Have every packet shown that it would drop, from now on; False if it cannot say that before the packet is judged."""
        return False

    cdef void begin(self) noexcept nogil:
        """Another packet comes."""

    cdef uint8_t decide(self, const View *view) noexcept nogil:
        """The index of its verdict on a packet, or PASS."""
        return PASS

    cdef void end(self, bint answered) noexcept nogil:
        """Whether the packet is answered; else its element is asked about it, and answers the same."""

    cdef bint asks(self) noexcept nogil:
        """Whether its element has to change the packet, if that is accepted."""
        return False

    cdef uint8_t amend(self, uint8_t index) noexcept nogil:
        """The index of the verdict in place of the one that was given."""
        return index

    cdef uint8_t would_hear(self, const View *view, uint8_t index) noexcept nogil:
        """What `hear` would return."""
        return H_NEXT

    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil:
        """Hear of a packet that gets the verdict with this index."""
        return H_NEXT


cdef class Limited(Step):
    """Counts what is beyond a rate. say: takes the number of those packets, every ten seconds at most."""

    cdef Held held
    cdef object say

    def take_held(self):
        """How many were beyond it and not said. Counting then starts at 0."""
        count, self.held.count = self.held.count, 0
        return count

    cdef bint _counted(self, bint taken, double now) noexcept nogil:
        """The same, counted and said where it is time."""
        if not taken:
            hold(&self.held, now)
        cdef uint64_t count = due(&self.held, now)
        if count:
            self._say(count)
        return taken

    cdef void _say(self, uint64_t count) noexcept with gil:
        self.say(count)


cdef class LineLimit(Limited):
    """Which packets `log` writes a line for: per_second on average, 0 for all of them. drops_only: not for what is accepted.

    say: takes the number of those that were held back, every ten seconds at most.
    """

    cdef bint limited, drops_only
    cdef double per_second, burst
    cdef Tokens tokens

    def __cinit__(self, double per_second, double burst, bint drops_only, say):
        self.hears = self.timed = self.by_flow = True
        self.limited = per_second > 0
        self.per_second = per_second
        self.tokens.left = self.burst = burst
        self.drops_only = drops_only
        self.say = say

    def take(self, double now):
        """Whether there is a line for a packet now. now: seconds since the epoch."""
        return self._take(now)

    cdef bint _take(self, double now) noexcept nogil:
        cdef bint taken = not self.limited or take_token(&self.tokens, self.per_second, self.burst, now)
        return self._counted(taken, now)

    cdef uint8_t would_hear(self, const View *view, uint8_t index) noexcept nogil:
        if self.drops_only and index == I_ACCEPT:
            return H_NEXT
        return H_TELL if not self.limited or has_token(&self.tokens, self.per_second, self.burst, view.now) else H_NEXT

    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil:
        if self.drops_only and index == I_ACCEPT:
            return H_NEXT
        return H_TELL if self._take(view.now) else H_NEXT


cdef class AddressLimit(Limited):
    """Drops what exceeds a rate for one source, one destination, or all together, as `rate-limit`.

    per: "source", "destination" or "all". limit: addresses that are remembered. mask, mask6: bits of an address that count, packed.
    say: takes the number of packets that were dropped, every ten seconds at most.
    """

    cdef AddressTokens tokens
    cdef uint8_t masks[2][16]
    cdef bint all, source
    # Whether the packet at hand is within the rate, and the same for the packet that Python is asked about; -1 if it was not counted.
    cdef int8_t taken, left

    def __cinit__(self, double per_second, double burst, uint32_t limit, str per, bytes mask, bytes mask6, say):
        if per not in ("source", "destination", "all") or len(mask) != 4 or len(mask6) != 16:
            raise ValueError("per is source, destination or all; a mask has 4 bytes, and 16 for IPv6")
        self.tokens = AddressTokens(per_second, burst, limit)
        self.all = per == "all"
        self.source = per == "source"
        memcpy(self.masks[0], <const char *>mask, 4)
        memcpy(self.masks[1], <const char *>mask6, 16)
        self.reads_headers = not self.all
        self.timed = self.decides = self.may_drop = True
        self.taken = self.left = -1
        self.say = say

    def take(self, const uint8_t[::1] address, double now):
        """Whether a packet with this address is within the rate; None where all count together. now: seconds since the epoch."""
        cdef int8_t left = self.left
        self.left = -1
        if left >= 0:
            return bool(left)
        if address is None:
            return self._take(NULL, 0, now)
        if address.shape[0] not in (4, 16):
            raise ValueError("an address has 4 or 16 bytes")
        return self._take(&address[0], address.shape[0], now)

    cdef bint _take(self, const uint8_t *address, uint32_t size, double now) noexcept nogil:
        cdef uint8_t key[16]
        cdef const uint8_t *mask = self.masks[size == 16]
        cdef uint32_t place
        for place in range(size):
            key[place] = address[place] & mask[place]
        cdef bint taken = self.tokens.take(key, size, now)
        return self._counted(taken, now)

    cdef void begin(self) noexcept nogil:
        self.taken = self.left = -1

    cdef uint8_t decide(self, const View *view) noexcept nogil:
        if self.all:
            self.taken = self._take(NULL, 0, view.now)
        else:
            self.taken = self._take(view.src if self.source else view.dst, view.size, view.now)
        return PASS if self.taken else I_DROP

    cdef void end(self, bint answered) noexcept nogil:
        self.left = -1 if answered else self.taken


cdef struct Choice:
    uint8_t flow[FLOW]
    uint8_t size
    uint8_t chosen


cdef class Die(Step):
    """Chooses packets, or flows, as `sample`. one_in: every so many-th; 0 to ask `throw`.

    throw: without an argument how many packets are not chosen, and whether the one behind them is; with by_flow once for each flow,
    whether it is, with the five values of a five-tuple. rest: "accept" or "drop" what is not chosen; None to leave
    it to the next elements.
    """

    cdef uint64_t one_in, counted
    cdef object throw
    cdef bint by_flow
    cdef uint8_t rest
    # Of the packet that is judged: whether it is chosen, -1 if that is not known.
    cdef int8_t chosen
    cdef Thrown thrown
    cdef Choice *kept

    def __cinit__(self, uint64_t one_in, throw, bint by_flow, rest):
        self.one_in = one_in
        self.throw = throw
        self.reads_headers = self.by_flow = by_flow
        self.decides = rest is not None
        self.may_drop = rest == "drop"
        self.hears = True
        self.rest = I_DROP if rest == "drop" else I_ACCEPT
        self.chosen = self.thrown.happens = -1
        if by_flow:
            self.kept = <Choice *>calloc(KEPT, sizeof(Choice))
            if self.kept == NULL:
                raise MemoryError

    def __dealloc__(self):
        free(self.kept)

    def choose(self):
        """Whether the next packet is chosen, where that does not follow from its flow."""
        cdef bint chosen = self._next()
        self._advance()
        return chosen

    cdef bint _next(self) noexcept nogil:
        """Whether the next packet is chosen; it stays the next one."""
        if self.one_in:
            return self.counted + 1 >= self.one_in
        if self.thrown.happens < 0:
            self._throw()
        return what_next(&self.thrown) > 0

    cdef void _advance(self) noexcept nogil:
        go_on(&self.thrown)
        self.counted = 0 if self.counted + 1 >= self.one_in else self.counted + 1

    cdef bint _is_chosen(self, const View *view) noexcept nogil:
        return self._choose_flow(view) if self.by_flow else self._next()

    cdef void _throw(self) noexcept with gil:
        self.thrown.quiet, self.thrown.happens = self.throw()

    cdef bint _choose_flow(self, const View *view) noexcept nogil:
        cdef uint8_t flow[FLOW + 3]
        cdef uint64_t word, hashed = 0
        cdef uint32_t at
        cdef Choice *choice
        memset(flow, 0, FLOW + 3)
        flow[0] = view.protocol
        memcpy(flow + 1, view.src, view.size)
        memcpy(flow + 17, view.dst, view.size)
        if view.protocol == P_TCP or view.protocol == P_UDP:
            memcpy(flow + 33, view.transport, 4)
        for at in range(0, FLOW + 3, 8):
            memcpy(&word, flow + at, 8)
            hashed = mix(hashed ^ word, 0x9E3779B97F4A7C15ULL)
        choice = &self.kept[(hashed ^ hashed >> 32) & (KEPT - 1)]
        if choice.size != view.size or memcmp(choice.flow, flow, FLOW):
            choice.chosen = self._throw_for(view)
            memcpy(choice.flow, flow, FLOW)
            choice.size = view.size
        return choice.chosen

    cdef bint _throw_for(self, const View *view) noexcept with gil:
        cdef const uint16_t *ports = <const uint16_t *>view.transport
        cdef bint has_ports = view.protocol == P_TCP or view.protocol == P_UDP
        src, dst = (<const char *>view.src)[: view.size], (<const char *>view.dst)[: view.size]
        sport, dport = (ntohs(ports[0]), ntohs(ports[1])) if has_ports else (None, None)
        return self.throw(view.protocol, src, sport, dst, dport)

    cdef void begin(self) noexcept nogil:
        self.chosen = -1

    cdef uint8_t decide(self, const View *view) noexcept nogil:
        if not self.decides:
            return PASS
        self.chosen = self._is_chosen(view)
        return PASS if self.chosen else self.rest

    cdef void end(self, bint answered) noexcept nogil:
        if answered and self.chosen >= 0:
            self._advance()

    cdef uint8_t would_hear(self, const View *view, uint8_t index) noexcept nogil:
        cdef bint chosen = self._is_chosen(view) if self.chosen < 0 else self.chosen
        return H_NEXT if chosen else H_END

    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil:
        if self.chosen < 0:
            self.chosen = self._is_chosen(view)
            self._advance()
        return H_NEXT if self.chosen else H_END


cdef class OpeningHeard(Step):
    """Tells of the packets that open a TCP connection, as iptables' --syn matches them (`syn-monitor`)."""

    def __cinit__(self):
        self.hears = self.reads_headers = True

    cdef uint8_t would_hear(self, const View *view, uint8_t index) noexcept nogil:
        return H_TELL if view.protocol == P_TCP and view.flags & OPENING == SYN else H_NEXT

    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil:
        return self.would_hear(view, index)


cdef class FlowLines(Step):
    """`log` with a line for each flow, which is shown the packets that have one. all: also those of flows that are accepted."""

    cdef bint all

    def __cinit__(self, bint all):
        self.all = all
        self.hears = True

    @property
    def goes_by_flow(self):
        return True

    @property
    def shows_openings(self):
        return self.all


cdef class Odds(Step):
    """What `chaos` does to accepted packets. throw: to how many nothing happens, and what to the one behind, a bit each: 1 for a drop."""

    cdef object throw
    cdef Thrown thrown
    # Whether packets are shown that are only dropped.
    cdef bint shows_all

    def __cinit__(self, throw):
        self.throw = throw
        self.thrown.happens = -1
        self.amends = self.may_drop = True

    def show_drops(self):
        self.shows_all, self.may_drop = True, False
        return True

    def take(self):
        """What happens to the next packet."""
        cdef int happens = self._next()
        go_on(&self.thrown)
        return happens

    cdef int _next(self) noexcept nogil:
        if self.thrown.happens < 0:
            self._throw()
        return what_next(&self.thrown)

    cdef void _throw(self) noexcept with gil:
        self.thrown.quiet, self.thrown.happens = self.throw()

    cdef bint asks(self) noexcept nogil:
        return self._next() > (0 if self.shows_all else BROKEN_DROP)

    cdef uint8_t amend(self, uint8_t index) noexcept nogil:
        cdef int happens
        if index != I_ACCEPT:
            return index
        happens = self._next()
        go_on(&self.thrown)
        return I_DROP if happens == BROKEN_DROP else index
