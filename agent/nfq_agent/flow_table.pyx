# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The flows of one worker: both directions of each conversation, what of it has to be looked at, and its verdict.

It owns every flow and its age. Pure: no I/O, no clock, no decision; what it answers, an element chain has answered before.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from .answering cimport Answering
from .datagram_flows cimport begin_datagrams, exchange_of, first_says, goes_on
from .expected cimport LONGEST_REQUEST, drop_request, expect, heard_of, opening_of, passes_settled
from .flow_account cimport account_of
from .flow_entry cimport ASK, BOTH, K_NEW, K_REQUEST, O_ANSWERED, O_DNS, O_OFFLOADED, O_STATE, O_SYN
from .flow_entry cimport W_ACKNOWLEDGEMENT, W_ALL, W_REQUEST, Entry, count
from .first_message cimport PART, WHOLE, is_first, take_first
from .flow_key cimport ends_of, hash_of, key_of
from .flow_order cimport HALF_OPEN, KINDS, OFFLOADED, SETTLED, append, detach, refresh, to_forget
from .host_name cimport LONGEST_NAME
from .openings cimport Openings
from .plain_packet cimport F_ACK, F_SYN, KEY, P_UDP, Segment, read_plain
from .unshown cimport begin, from_syn, is_plain_syn, passes

from nfq_agent.flow import Account, Exchange, Flow, Heard, Opening
from nfq_agent.packet import FiveTuple
from nfq_agent.verdict import ACCEPT, WOULD_DROP, Action

cdef enum:
    # A flow that was not answered and sent fewer packets than this is half open, as all flows of a flood from spoofed addresses are.
    SETTLED_BY = 3
    ACCEPTS = 0  # the index of ACCEPT

_KEPT = frozenset((Action.ACCEPT, Action.DROP))


cdef class FlowTable(Answering):
    """At most `limit` flows; one that saw no packet for `max_idle` seconds is forgotten, and the longest idle when it is full.

    Half-open flows are forgotten first. In a full table an eighth is theirs: a flood of them makes room among itself.
    Ages are kept in sixteenths of a second. evicted: flows that were forgotten so far. shows_openings: how many of the next new flows
    are shown, also where `judge_openings` has answers to them. passed_by: flows that were forgotten and never shown.
    """

    def __cinit__(self, uint32_t limit=65536, double max_idle=300.0):
        if not 1 <= limit < 1 << 30:
            raise ValueError("a flow table holds at least one flow")
        self.limit = limit
        self.max_idle = max_idle
        cdef uint32_t buckets = 64
        while buckets < limit:
            buckets *= 2
        self.mask = buckets - 1
        # The system gives pages when they are written to.
        self.entries = <Entry *>calloc(limit + 1, sizeof(Entry))
        self.buckets = <uint32_t *>calloc(buckets, sizeof(uint32_t))
        if self.entries == NULL or self.buckets == NULL:
            raise MemoryError
        # Python draws the secret of its own hashes at each start.
        self.seed = <uint64_t>hash(b"nfq-agent flows") | 1

    def __dealloc__(self):
        cdef uint32_t place
        if self.entries != NULL:
            for place in range(1, self.used + 1):
                if self.entries[place].flow != NULL:
                    Py_DECREF(<object>self.entries[place].flow)
                if self.entries[place].request != NULL:
                    drop_request(self.entries[place].request, &self.kept)
                    free(self.entries[place].request)
        free(self.entries)
        free(self.buckets)

    def __len__(self):
        return self.size

    def observe(self, five_tuple, double now, size_t length=0):
        """The flow that a packet with this five-tuple belongs to, made if it is new, and counted. now: seconds. length: bytes."""
        cdef uint8_t key[KEY]
        cdef bint down = key_of(five_tuple, key)
        cdef uint32_t hashed = hash_of(key, self.seed), place = self._find(key, hashed)
        cdef Entry *entry
        self.tick = <uint32_t>(now * 16)
        if place == 0:
            place = self._add(key, hashed)
            entry = &self.entries[place]
            entry.client = down
            flow = Flow(five_tuple, now, now)
            Py_INCREF(flow)
            entry.flow = <PyObject *>flow
        else:
            entry = &self.entries[place]
            flow = self._show(place, now) if entry.flow == NULL else <object>entry.flow
        self._see(place, down, length)
        # Until it is settled, every packet is asked about.
        entry.verdict = ASK
        self.current = place
        flow.last = max(flow.last, now)
        flow.packets = entry.counted[0] + entry.counted[1]
        flow.answered = entry.seen == BOTH
        if entry.known & K_NEW:
            flow.heard = Heard(*heard_of(entry, &self.kept))
        return flow

    def find(self, five_tuple):
        """The flow of packets with this five-tuple, uncounted; None if there is none."""
        cdef uint8_t key[KEY]
        key_of(five_tuple, key)
        cdef uint32_t place = self._find(key, hash_of(key, self.seed))
        return <object>self.entries[place].flow if place and self.entries[place].flow != NULL else None

    def judge_openings(self, Openings openings not None, lasting=ACCEPT):
        """Answer to new connections by these answers, without a Flow, as long as they say nothing else.

        lasting: the verdict on a first message that is accepted, of a packet without a mark. Where it is not a plain accept, the
        kernel keeps it, and what comes behind that is shown.
        """
        self.openings = openings
        self.lasting = self.index_of(lasting)
        self.marked = self.lasting != ACCEPTS

    def settle(self, unsigned int watch, flow, verdict):
        """What of the flow that was observed last has to be looked at, and the verdict of every other packet of it.

        watch: see Watch. A verdict that is more than accept or drop is not kept.
        """
        cdef Entry *entry = &self.entries[self.current]
        cdef uint8_t key[KEY]
        if <PyObject *>flow != entry.flow or watch & W_ALL == W_ALL or verdict is WOULD_DROP:
            return
        if verdict.action not in _KEPT or verdict.means is not None or verdict.rejects:
            return
        entry.verdict = self.index_of(verdict)
        entry.watch = watch
        entry.known = 0
        if watch & (W_ACKNOWLEDGEMENT | W_REQUEST):
            expect(entry, flow.expects)
        entry.client = key_of(flow.origin, key) == <bint>flow.origin_is_client

    def look_up(self, const uint8_t[::1] packet not None, size_t length, double now, bint ready=True, uint32_t mark=0, bint joined=False):
        """The verdict on a packet that need not be looked at, and counts it; None where the chain has to be asked.

        length: bytes before it was cut. ready: its checksum is that of its bytes. joined: an offload joined it.
        """
        self.start_turn(now)
        self.mark, self.joined = mark, joined
        cdef uint8_t index = self.look(&packet[0], packet.shape[0], length, ready) if packet.shape[0] else ASK
        return None if index == ASK else self.verdicts[index]

    def keep_forgotten(self):
        """Let `take_forgotten` give the flows that are forgotten from now on."""
        self.forgotten = []

    def take_forgotten(self, double now, unsigned int most=1024):
        """The flows that were forgotten since the last time, each with its account. Forgets those that are too old, `most` at once."""
        cdef uint32_t idle = <uint32_t>(self.max_idle * 16), place, kind
        self.tick = <uint32_t>(now * 16)
        for kind in range(KINDS):
            while most and (place := self.order.oldest[kind]) and <int32_t>(self.tick - idle - self.entries[place].last) > 0:
                self._evict(place)
                most -= 1
        found, self.forgotten = self.forgotten, []
        return found

    def account(self, flow):
        """What has passed of a flow; None if it is forgotten."""
        cdef uint8_t key[KEY]
        key_of(flow.origin, key)
        cdef uint32_t place = self._find(key, hash_of(key, self.seed))
        return Account(*account_of(&self.entries[place])) if place and self.entries[place].flow == <PyObject *>flow else None

    def flows(self, bint undecided=False):
        """All flows, or those that are undecided, each with its account."""
        cdef uint32_t place, kind
        cdef list found = []
        for kind in range(KINDS):
            place = self.order.oldest[kind]
            while place:
                if self.entries[place].flow != NULL and not (undecided and not (<object>self.entries[place].flow).undecided):
                    found.append((<object>self.entries[place].flow, Account(*account_of(&self.entries[place]))))
                place = self.entries[place].newer
        return found

    def flows_from(self, uint32_t place, unsigned int most):
        """Those among `most` places from one on that have a Flow; and the next place, 0 behind the last one."""
        cdef uint32_t each, end = min(<uint64_t>place + most, <uint64_t>self.used + 1)
        flows = [<object>self.entries[each].flow for each in range(max(place, 1), end) if self.entries[each].flow != NULL]
        return flows, end if end <= self.used else 0

    def show_openings(self, double now, unsigned int most, bint silent=False):
        """Flows of connections that no element was shown, `most` at once; from now on elements are shown their packets.

        Each has to be adopted (`Flow.opening`), as one that `observe` returns. silent: those whose client said nothing.
        """
        cdef Entry *entry
        cdef uint32_t place, kind
        cdef list found = []
        for kind in range(KINDS):
            place = self.order.oldest[kind]
            while place and most:
                if self.entries[place].unshown and not (silent and self.entries[place].unshown & O_STATE > O_ANSWERED):
                    flow = self._show(place, now)
                    entry = &self.entries[place]
                    flow.packets, flow.answered = entry.counted[0] + entry.counted[1], entry.seen == BOTH
                    found.append(flow)
                    most -= 1
                place = self.entries[place].newer
        return found

    cdef void start_turn(self, double now) noexcept:
        self.tick, self.moment = <uint32_t>(now * 16), <uint32_t><uint64_t>(now * 1024)

    cdef uint8_t look(self, const uint8_t *packet, size_t copied, size_t length, bint ready) noexcept nogil:
        """The index of the verdict on a packet that need not be looked at, which is counted; else ASK."""
        cdef uint8_t key[KEY]
        cdef Segment segment
        cdef uint32_t place
        cdef uint8_t index
        cdef Entry *entry
        if not read_plain(packet, copied, length, key, &segment):
            return ASK
        if (place := self._find(key, hash_of(key, self.seed))) == 0:
            return ASK if self.shows else self._open(key, 0, packet, length, &segment, ready)
        entry = &self.entries[place]
        if self.shows if entry.verdict == ACCEPTS else self.shows_denied:
            if entry.unshown or entry.known & K_REQUEST or (entry.watch & W_REQUEST and segment.size):
                return ASK
        index = entry.verdict
        if entry.unshown == 0:
            if not passes_settled(entry, packet, length, &segment, ready, &self.kept, ROOM):
                return ASK
        elif entry.unshown & O_STATE >= O_DNS:
            if self.joined or not goes_on(self.openings, entry, packet, length, &segment, ready, self.moment):
                return ASK
        elif from_syn(entry, &segment):
            return self._open(key, place, packet, length, &segment, ready)
        elif is_first(entry, &segment):
            index = self._read_first(place, packet, length, &segment, ready)
            if index == ASK:
                return ASK
        elif entry.unshown & O_OFFLOADED or not passes(entry, packet, length, &segment, ready, self.tick, &self.kept, ROOM):
            return ASK
        self._see(place, segment.down, length)
        return index

    cdef bint note(self, const uint8_t *packet, size_t copied, size_t length) noexcept nogil:
        """Count a packet that was judged without its flow. False for one that is not plain."""
        cdef uint8_t key[KEY]
        cdef Segment segment
        cdef uint32_t place
        if not read_plain(packet, copied, length, key, &segment):
            return False
        if (place := self._find(key, hash_of(key, self.seed))) == 0 and (place := self._add_entry(key)):
            self.entries[place].client = segment.down
        if place:
            self._see(place, segment.down, length)
        return place != 0

    cdef uint8_t _open(
        self, const uint8_t *key, uint32_t place, const uint8_t *packet, size_t length, const Segment *segment, bint ready
    ) noexcept nogil:
        """The SYN of a connection, or a datagram; place: of the entry whose connection is over, 0 for none."""
        if self.openings is None or self.shows_openings:
            self.shows_openings -= self.shows_openings > 0
            return ASK
        if segment.protocol == P_UDP:
            return self._open_datagrams(key, packet, length, segment, ready)
        if segment.flags & (F_SYN | F_ACK) != F_SYN or self.openings.is_apart(key):
            return ASK
        if not is_plain_syn(packet, length, segment, ready) or not self.openings.accepts(key, segment.down, O_SYN, NULL, 0, NULL):
            return ASK
        if place:
            drop_request(self.entries[place].request, &self.kept)
        elif (place := self._add_entry(key)) == 0:
            return ASK
        begin(&self.entries[place], segment)
        self.openings.forget(key)
        self._see(place, segment.down, length)
        return self.entries[place].verdict

    cdef uint8_t _open_datagrams(
        self, const uint8_t *key, const uint8_t *packet, size_t length, const Segment *segment, bint ready
    ) noexcept nogil:
        """The first datagram of a flow."""
        cdef uint8_t name[LONGEST_NAME]
        cdef uint8_t kind
        cdef size_t size
        cdef uint32_t place
        if self.joined or not (kind := first_says(self.openings, key, packet, length, segment, ready, name, &size)):
            return ASK
        place = self._add_entry(key)
        if place == 0 or not begin_datagrams(&self.entries[place], kind, segment, self.moment, name, size):
            return ASK
        self._see(place, segment.down, length)
        return self.entries[place].verdict

    cdef uint8_t _read_first(
        self, uint32_t place, const uint8_t *packet, size_t length, const Segment *segment, bint ready
    ) noexcept nogil:
        """The index of the verdict on a packet of the client's first message; ASK where it is not accepted, or not plain."""
        cdef Entry *entry = &self.entries[place]
        if self.mark and self.lasting != ACCEPTS:
            return ASK
        while self.kept + LONGEST_REQUEST > ROOM and self.order.oldest[OFFLOADED]:
            self._unlink(self.order.oldest[OFFLOADED])
        cdef uint8_t taken = take_first(self.openings, entry, packet, length, segment, ready, self.lasting, self.tick, &self.kept, ROOM)
        return self.lasting if taken == WHOLE else entry.verdict if taken == PART else ASK

    cdef uint32_t _add_entry(self, const uint8_t *key) noexcept with gil:
        """A new entry, 0 without memory."""
        return self._add(key, hash_of(key, self.seed))

    cdef object _show(self, uint32_t place, double now):
        """The flow of which no element was shown a packet, with what is known of it."""
        cdef Entry *entry = &self.entries[place]
        flow = Flow(FiveTuple(*ends_of(entry.key, entry.client)), now, now)
        if entry.unshown:
            flow.kept = entry.last / 16.0 if entry.unshown & O_OFFLOADED else None
            flow.opening = Exchange(*exchange_of(entry)) if entry.unshown & O_STATE >= O_DNS else Opening(*opening_of(entry, &self.kept))
            entry.unshown = entry.known = 0
            entry.verdict = ASK
        Py_INCREF(flow)
        entry.flow = <PyObject *>flow
        return flow

    cdef uint32_t _find(self, const uint8_t *key, uint32_t hashed) noexcept nogil:
        """The place of the entry with this key; 0 if there is none."""
        cdef uint32_t place = self.buckets[hashed & self.mask]
        while place:
            if memcmp(self.entries[place].key, key, KEY) == 0:
                return place
            place = self.entries[place].next
        return 0

    cdef uint32_t _add(self, const uint8_t *key, uint32_t hashed) except 0:
        """A new entry. Makes room first: two entries at most, so that a turn is never long."""
        cdef uint32_t place, before = self.tick - <uint32_t>(self.max_idle * 16)
        cdef Entry *entry
        for _ in range(2):
            place = to_forget(self.entries, &self.order, self.size >= self.limit, max(1, self.limit // 8), before)
            if place:
                self._evict(place)
        if self.unused:
            place = self.unused
            self.unused = self.entries[place].next
        else:
            self.used += 1
            place = self.used
        entry = &self.entries[place]
        memset(entry, 0, sizeof(Entry))
        memcpy(entry.key, key, KEY)
        entry.verdict = ASK
        entry.last = self.tick
        entry.next = self.buckets[hashed & self.mask]
        self.buckets[hashed & self.mask] = place
        self.size += 1
        append(self.entries, &self.order, place)
        return place

    cdef void _see(self, uint32_t place, bint down, size_t length) noexcept nogil:
        """Count a packet of an entry."""
        cdef Entry *entry = &self.entries[place]
        count(entry, down, length)
        cdef uint8_t kind = SETTLED if entry.seen == BOTH or entry.counted[0] + entry.counted[1] >= SETTLED_BY else HALF_OPEN
        refresh(self.entries, &self.order, place, OFFLOADED if entry.unshown & O_OFFLOADED else kind, self.tick)

    cdef void _evict(self, uint32_t place):
        cdef Entry *entry = &self.entries[place]
        self.passed_by += entry.unshown != 0
        if self.lapsed is not None and entry.counted[0] + entry.counted[1] > 1 and len(self.lapsed) < LAPSED:
            if entry.unshown and entry.unshown & O_STATE <= O_ANSWERED:
                self._show(place, entry.last / 16.0).undecided = True
            if entry.flow != NULL and (<object>entry.flow).undecided:
                self.lapsed.append(<object>entry.flow)
        self._unlink(place)
        if entry.flow != NULL:
            if self.forgotten is not None:
                self.forgotten.append((<object>entry.flow, Account(*account_of(entry))))
            Py_DECREF(<object>entry.flow)
            entry.flow = NULL

    cdef void _unlink(self, uint32_t place) noexcept nogil:
        """Forget an entry. A Flow of it is the caller's."""
        cdef Entry *entry = &self.entries[place]
        cdef uint32_t *link = &self.buckets[hash_of(entry.key, self.seed) & self.mask]
        while link[0] != place:
            link = &self.entries[link[0]].next
        link[0] = entry.next
        detach(self.entries, &self.order, place)
        entry.next = self.unused
        self.unused = place
        if entry.request != NULL:
            drop_request(entry.request, &self.kept)
            free(entry.request)
            entry.request = NULL
        self.size -= 1
        self.evicted += 1
        self.current = 0 if self.current == place else self.current
