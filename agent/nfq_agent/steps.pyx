# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Elements in their compiled form, and a chain of them that judges packets without the interpreter. Pure: no I/O, no clock.

Each element asks its own step too, for packets that are shown to it: one state and one rule serve both ways.
"""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from .address_tokens cimport AddressTokens
from .answering cimport Answering
from .flow_entry cimport ASK
from .flow_key cimport mix
from .plain_packet cimport P_TCP, P_UDP, ntohs
from .tokens cimport Held, Tokens, due, hold, take_token

cdef enum:
    # Indices of the verdicts that every Answering knows.
    I_ACCEPT = 0
    I_DROP = 1
    I_WOULD_DROP = 2
    # Steps of a chain, and flows whose choice is kept.
    MOST_STEPS = 4
    KEPT = 1024
    FLOW = 37
    # FIN, SYN, RST, ACK; and SYN alone.
    OPENING = 0x17
    SYN = 0x02

MOST = MOST_STEPS


cdef class Step:
    """Neither judges nor hears."""

    @property
    def drops(self):
        """Whether it may drop a packet."""
        return self.may_drop

    cdef uint8_t decide(self, const View *view) noexcept nogil:
        """The index of its verdict on a packet, or PASS."""
        return PASS

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
        self.hears = self.timed = True
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
        self.say = say

    def take(self, const uint8_t[::1] address, double now):
        """Whether a packet with this address is within the rate; None where all count together. now: seconds since the epoch."""
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

    cdef uint8_t decide(self, const View *view) noexcept nogil:
        if self.all:
            return PASS if self._take(NULL, 0, view.now) else I_DROP
        return PASS if self._take(view.src if self.source else view.dst, view.size, view.now) else I_DROP


cdef struct Choice:
    uint8_t flow[FLOW]
    uint8_t size
    uint8_t chosen


cdef class Die(Step):
    """Chooses packets, or flows, as `sample`. one_in: every so many-th; 0 to ask `throw`, without an argument for each packet, or

    with by_flow once for each flow, with the five values of a five-tuple. rest: "accept" or "drop" what is not chosen; None to leave
    it to the next elements.
    """

    cdef uint64_t one_in, counted
    cdef object throw
    cdef bint by_flow
    cdef uint8_t rest
    # Of the packet that is judged: whether it is chosen, -1 if that is not known.
    cdef int8_t chosen
    cdef Choice *kept

    def __cinit__(self, uint64_t one_in, throw, bint by_flow, rest):
        self.one_in = one_in
        self.throw = throw
        self.reads_headers = self.by_flow = by_flow
        self.decides = rest is not None
        self.may_drop = rest == "drop"
        self.hears = True
        self.rest = I_DROP if rest == "drop" else I_ACCEPT
        self.chosen = -1
        if by_flow:
            self.kept = <Choice *>calloc(KEPT, sizeof(Choice))
            if self.kept == NULL:
                raise MemoryError

    def __dealloc__(self):
        free(self.kept)

    def count(self):
        """Whether the next packet is chosen by its number."""
        return self._count()

    cdef bint _count(self) noexcept nogil:
        self.counted += 1
        if self.counted < self.one_in:
            return False
        self.counted = 0
        return True

    cdef bint _choose(self, const View *view) noexcept nogil:
        if self.by_flow:
            return self._choose_flow(view)
        return self._count() if self.one_in else self._throw()

    cdef bint _throw(self) noexcept with gil:
        return self.throw()

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

    cdef uint8_t decide(self, const View *view) noexcept nogil:
        if not self.decides:
            return PASS
        self.chosen = self._choose(view)
        return PASS if self.chosen else self.rest

    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil:
        cdef bint chosen = self._choose(view) if self.chosen < 0 else self.chosen
        self.chosen = -1
        return H_NEXT if chosen else H_END


cdef class OpeningHeard(Step):
    """Tells of the packets that open a TCP connection, as iptables' --syn matches them (`syn-monitor`)."""

    def __cinit__(self):
        self.hears = self.reads_headers = True

    cdef uint8_t hear(self, const View *view, uint8_t index) noexcept nogil:
        return H_TELL if view.protocol == P_TCP and view.flags & OPENING == SYN else H_NEXT


cdef class Steps(Answering):
    """The steps of a whole chain, four at most, in their order. What none of them judges is accepted. monitor: so is what is dropped."""

    cdef Step first, second, third, fourth
    cdef bint reads_headers, decides
    cdef uint8_t dropped

    def __init__(self, steps, bint monitor):
        if not 1 <= len(steps) <= MOST_STEPS:
            raise ValueError(f"{len(steps)} steps; allowed: 1 to {MOST_STEPS}")
        self.first, self.second, self.third, self.fourth = [*steps, Step(), Step(), Step()][:MOST_STEPS]
        cdef Step step
        for step in steps:
            self.reads_headers |= step.reads_headers
            self.timed |= step.timed
            self.decides |= step.decides
            self.hears |= step.hears
        self.dropped = I_WOULD_DROP if monitor else I_DROP

    def look_up(self, const uint8_t[::1] packet not None, double now):
        """The verdict on a packet, None to ask the chain; and the elements that have to be told of it, a bit each."""
        self.now = now
        cdef uint8_t index = self.look(&packet[0] if packet.shape[0] else NULL, packet.shape[0], packet.shape[0], True)
        return (None, 0) if index == ASK else (self.verdicts[index], self.tells)

    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil:
        cdef View view
        cdef uint8_t index = PASS
        self.tells = 0
        view.now = self.now
        if self.reads_headers and not read_headers(packet, copied, &view):
            return ASK
        if self.decides:
            index = self._decide(&view)
        index = I_ACCEPT if index == PASS else self.dropped if index == I_DROP else index
        if self.hears:
            self._hear(&view, index)
        return index

    cdef inline uint8_t _decide(self, const View *view) noexcept nogil:
        cdef uint8_t index = self.first.decide(view)
        if index == PASS:
            index = self.second.decide(view)
        if index == PASS:
            index = self.third.decide(view)
        if index == PASS:
            index = self.fourth.decide(view)
        return index

    cdef inline void _hear(self, const View *view, uint8_t index) noexcept nogil:
        cdef uint8_t said = self.first.hear(view, index)
        if said == H_TELL:
            self.tells |= 1
        if said != H_END:
            said = self.second.hear(view, index)
            if said == H_TELL:
                self.tells |= 2
        if said != H_END:
            said = self.third.hear(view, index)
            if said == H_TELL:
                self.tells |= 4
        if said != H_END and self.fourth.hear(view, index) == H_TELL:
            self.tells |= 8
