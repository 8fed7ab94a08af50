# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The connections of a proxy that no element looks at, by their descriptors: accepted, connected, relayed and closed. Compiled, for speed.

Unit tests hold it and relay.py to one contract. What is rare it leaves to its owner in Python: destinations that need a decision, attempts
that failed, limits, and all of the log.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, errno
from libc.math cimport ceil
from libc.stdlib cimport free, malloc

from ..tokens cimport Tokens, take_token
from .plain_counts cimport Counts, OPENED, note_counts, taken_from
from .plain_relay cimport (
    AT_ONCE, CLIENT, Carried, HUNG_UP, NEVER, ORDERLY, READ, RUNNING, TOLD, Turn, UPSTREAM, discard, on_event, pump,
    reason_of, watch, why_over,
)
from .socket_calls cimport (
    AF_INET6, Address, EPOLLIN, EPOLLOUT, EPOLL_CTL_ADD, EPOLL_CTL_DEL, accept_quietly, close, connecting, epoll_ctl, epoll_event,
    epoll_wait, error_of, family_of, is_mapped, monotonic, original_address, own_address, port_of, reset_on_close, text_of,
)

cdef enum:
    # Events that are read at once.
    POLLED = 512
    # Connections that one listener accepts in one turn, before the other listeners get theirs (listeners.py).
    ACCEPTS = 64

cdef enum How:
    FIN
    RESET
    KEEP

# After this many seconds of work the owner gets its turn, so that what became due is seen; sooner if new pairs may be due sooner.
cdef double LAG = 0.05


cdef class PlainPair:
    """A client's connection and the one to its destination.

    key: what its attempt to connect is known by. connection: None until it is needed in the log. opened: when it was accepted.
    """

    cdef Carried carried_
    cdef Address peer, destination
    cdef PlainPairs pairs
    cdef readonly object key
    cdef public object connection
    cdef object told
    cdef readonly double opened
    cdef bint queued

    def __cinit__(self):
        self.carried_.halves[CLIENT].fd = self.carried_.halves[UPSTREAM].fd = -1

    def __dealloc__(self):
        discard(&self.carried_)

    @property
    def over(self):
        """Why it ended, an empty text for an orderly end; None while it runs. The owner may end it."""
        return self.told if self.carried_.over == TOLD else why_over(&self.carried_)

    @over.setter
    def over(self, why):
        self.told = why
        self.carried_.over = TOLD

    @property
    def connected(self):
        """Whether the destination has answered."""
        return self.carried_.connected

    @property
    def carried(self):
        """Whether a byte has reached the other side."""
        return self.carried_.carried

    @property
    def client_active(self):
        """When the client last sent or took a byte."""
        return self.carried_.halves[CLIENT].active

    @property
    def server_active(self):
        """When the server last sent or took a byte."""
        return self.carried_.halves[UPSTREAM].active

    @property
    def waiting(self):
        """No element holds bytes back."""
        return False

    @property
    def addresses(self):
        """The client's address and the destination's."""
        return text_of(&self.peer), text_of(&self.destination)

    @property
    def counted(self):
        """Bytes from the client and from the destination."""
        return self.carried_.counts[CLIENT], self.carried_.counts[UPSTREAM]

    @property
    def upstream_fd(self):
        """The descriptor to the destination."""
        return self.carried_.halves[UPSTREAM].fd

    def close(self):
        """Close both sockets: with FIN after an orderly end, else with RST, so that no truncated stream looks complete."""
        for side in range(2):
            self.pairs.release(self, side, FIN if self.carried_.over == ORDERLY else RESET)

    def abandon(self):
        """Close the attempt to connect; the client's descriptor, which the caller then has."""
        self.pairs.release(self, UPSTREAM, FIN)
        return self.pairs.release(self, CLIENT, KEEP)


cdef class PlainPairs:
    """All of them in one process, and the waiting for their events and for those of others on the same epoll."""

    cdef int epoll
    cdef object owner
    # The pair of each descriptor; those closed in the batch of events that is being worked on; pairs with more bytes to move.
    cdef list at, closed, again
    # What it shares with its owner.
    cdef dict running, new, attempts
    cdef double first, timeout, lag
    cdef Py_buffer memory
    cdef Counts counts
    # How it connects by itself, and from which listeners it accepts then.
    cdef object second_hop, own_ports, listeners
    # The checks that are left, and how many a second there are, and at most.
    cdef Tokens checks
    cdef double check_rate
    cdef unsigned int mark
    cdef bint straight, tproxy
    cdef Py_ssize_t limit
    cdef Turn turn
    # leaving: something was left to the owner, which continues with it.
    cdef bint leaving, in_batch
    cdef epoll_event events[POLLED]

    def __cinit__(self):
        self.turn.buffer = <char *>malloc(READ)
        if self.turn.buffer == NULL:
            raise MemoryError
        self.turn.counts = self.counts.total

    def __dealloc__(self):
        free(self.turn.buffer)

    def __init__(self, int epoll, object owner):
        """owner: what is rare is left to it (class Owner in plain_pairs.pyi)."""
        self.epoll = self.turn.epoll = epoll
        self.owner = owner
        self.at = []
        self.closed = []
        self.again = []
        self.listeners = ()

    def share(self, dict running, dict new, double first, dict attempts, double timeout):
        """Where it notes pairs: all that run, by key; new ones, with the time of their first look; attempts, with their deadline."""
        self.running, self.new, self.first, self.attempts, self.timeout = running, new, first, attempts, timeout
        self.lag = min(LAG, timeout, first or LAG)

    def go_straight(self, bint tproxy, unsigned int mark, object own_ports, double checks, object second_hop):
        """From now on connect to original destinations, as far as nothing but these arguments matters.

        tproxy: the destination is the socket's own address. own_ports: connections to these are left to the owner. checks: how many a
        second are to be checked by second_hop(peer, destination), which says that the owner is to refuse this one.
        """
        self.straight, self.tproxy, self.mark = True, tproxy, mark
        self.own_ports, self.second_hop = own_ports, second_hop
        self.check_rate = self.checks.left = checks

    def listen(self, listeners, Py_ssize_t limit):
        """Accept by itself from these descriptors while it waits, as long as fewer pairs run than `limit`."""
        self.listeners, self.limit = listeners, limit

    def count_in(self, object memory, tuple places):
        """Keep counters up to date: numbers of 64 bits in memory, and the places of the four of plain_counts.pxd."""
        PyObject_GetBuffer(memory, &self.memory, PyBUF_WRITABLE)
        self.counts.slots = <unsigned long long *>self.memory.buf
        for which in range(4):
            self.counts.places[which] = places[which]

    def take_counts(self):
        """Since the last call, for the owner to write: bytes from clients, from destinations, connections that it accepted by itself."""
        return taken_from(&self.counts)

    def close(self):
        """Give the counters' memory back."""
        if self.counts.slots != NULL:
            self.counts.slots = NULL
            PyBuffer_Release(&self.memory)

    def adopt(self, int client, int upstream, object key, object connection, double now):
        """A pair of two descriptors, which are its own from now on, the second one connecting. Raises OSError: then they are not."""
        cdef PlainPair pair = self.pair_of(client, upstream, now)
        cdef int number
        pair.key, pair.connection = key, connection
        if not self.watch(pair):
            number = errno
            self.release(pair, CLIENT, KEEP)
            self.release(pair, UPSTREAM, KEEP)
            raise OSError(number, reason_of(number))
        return pair

    def accept(self, int listener, int most, double now):
        """Accept what waits, at most so many: 0, or the error that ended it, EAGAIN where nothing waits any more."""
        cdef Address peer
        cdef bint due
        cdef int fd, number
        for _ in range(most):
            fd = accept_quietly(listener, &peer)
            if fd < 0:
                number = errno
                if number == EAGAIN or number == EMFILE or number == ENFILE or number == ENOBUFS or number == ENOMEM:
                    return number
                # The connection ended before it was accepted (accept(2)).
                continue
            due = self.straight and take_token(&self.checks, self.check_rate, self.check_rate, now)
            if not (self.straight and self.begin(fd, &peer, due, now)):
                self.leaving = True
                self.owner.take(fd, AF_INET6 if is_mapped(&peer) else family_of(&peer), text_of(&peer), due, now)
        return 0

    def wait(self, double seconds):
        """Carry pairs for so long, or until something needs the owner: events of other descriptors, each with its mask, or none."""
        cdef list found = [], ready = []
        cdef double until = monotonic() + seconds
        cdef int count, fd, milliseconds
        self.counts.active = len(self.running)
        self.turn.now = until - seconds
        while True:
            milliseconds = 0 if self.again or until <= self.turn.now else <int>ceil(min(until - self.turn.now, 1e6) * 1000)
            with nogil:
                count = epoll_wait(self.epoll, self.events, POLLED, milliseconds)
            if count < 0:
                if errno != EINTR:
                    PyErr_SetFromErrno(OSError)
                PyErr_CheckSignals()
            self.turn.now = monotonic()
            self.in_batch = True
            for place in range(count):
                fd = self.events[place].data.fd
                if fd < len(self.at) and self.at[fd] is not None:
                    # What was closed in this batch has no events any more.
                    if self.at[fd] is not self:
                        self.on_event(<PlainPair>self.at[fd], fd, self.events[place].events)
                elif fd in self.listeners:
                    ready.append(fd)
                else:
                    found.append((fd, self.events[place].events))
            self.in_batch = False
            for fd in self.closed:
                self.at[fd] = None
            self.closed.clear()
            if self.again:
                self.move_more()
            # Last, so that a descriptor that was closed in this batch does not come up again under another owner.
            for fd in ready:
                if found or not self.accept_alone(fd):
                    found.append((fd, <int>EPOLLIN))
            ready.clear()
            if note_counts(&self.counts, len(self.running)):
                until = min(until, self.turn.now + self.lag)
            if found or self.leaving or self.turn.now >= until:
                self.leaving = False
                return found

    cdef bint accept_alone(self, int listener) except -1:
        """Accept what waits; False where the owner is to do it, since no more may be accepted or that failed."""
        cdef Py_ssize_t room = min(self.limit - len(self.running), <Py_ssize_t>ACCEPTS)
        cdef int number
        if room <= 0:
            return False
        number = self.accept(listener, room, self.turn.now)
        return number == EAGAIN or (number == 0 and len(self.running) < self.limit)

    cdef PlainPair pair_of(self, int client, int upstream, double now):
        cdef PlainPair pair = PlainPair.__new__(PlainPair)
        pair.pairs = self
        pair.key = pair
        pair.opened = now
        for side in range(2):
            pair.carried_.halves[side].fd = upstream if side else client
            pair.carried_.halves[side].active = now
            # A client's socket has TCP_NODELAY from its listener, one of the owner's was given it (upstream.py).
            pair.carried_.halves[side].sends = AT_ONCE
        return pair

    cdef bint watch(self, PlainPair pair) except -1:
        cdef int fd
        for side in range(2):
            fd = pair.carried_.halves[side].fd
            while len(self.at) <= fd:
                self.at.append(None)
            self.at[fd] = pair
            # Whether the client has room matters once it had none; by the room of the destination it is known to be connected.
            if not watch(&pair.carried_.halves[side], self.epoll, EPOLL_CTL_ADD, side == UPSTREAM):
                return False
        return True

    cdef int release(self, PlainPair pair, int side, How how) except -2:
        """Close a descriptor, or give it to the caller; -1 if the pair has none."""
        cdef int fd = pair.carried_.halves[side].fd
        pair.carried_.halves[side].fd = -1
        if 0 <= fd < len(self.at):
            self.at[fd] = self if self.in_batch else None
            if self.in_batch:
                self.closed.append(fd)
        if how == KEEP:
            epoll_ctl(self.epoll, EPOLL_CTL_DEL, fd, NULL)
        elif fd >= 0:
            if how == RESET:
                reset_on_close(fd)
            close(fd)
        return fd

    cdef bint begin(self, int client, Address *peer, bint due, double now) except -1:
        """Connect a new connection to where it was going; False if its owner is to decide."""
        cdef Address destination
        cdef PlainPair pair
        cdef int upstream, number
        if (own_address(client, &destination) if self.tproxy else original_address(client, peer, &destination)) != 0:
            return False
        if port_of(&destination) in self.own_ports:
            return False
        if due and self.second_hop(text_of(peer)[:2], text_of(&destination)[:2]):
            return False
        upstream = connecting(&destination, self.mark, &number)
        pair = self.pair_of(client, upstream, now)
        pair.carried_.halves[UPSTREAM].sends = NEVER
        pair.peer = peer[0]
        pair.destination = destination
        if number != 0:
            self.leaving = True
            self.owner.failed(pair, number, now)
        elif self.watch(pair):
            self.running[pair] = pair
            self.new[pair] = now + self.first
            self.attempts[pair] = (now + self.timeout, ())
            self.counts.total[OPENED] += 1
        else:
            self.release(pair, UPSTREAM, FIN)
            self.release(pair, CLIENT, KEEP)
            return False
        return True

    cdef int on_event(self, PlainPair pair, int fd, unsigned int mask) except -1:
        cdef int side = CLIENT if pair.carried_.halves[CLIENT].fd == fd else UPSTREAM
        cdef bint more = False
        if side == UPSTREAM and not pair.carried_.connected:
            if mask & HUNG_UP:
                self.leaving = True
                self.owner.unreachable(pair, reason_of(error_of(fd)) or "connection closed")
                return 0
            if not mask & EPOLLOUT:
                return 0
            pair.carried_.connected = True
            del self.attempts[pair.key]
            more = pump(&pair.carried_, CLIENT, &self.turn)
        more = on_event(&pair.carried_, side, mask, &self.turn) or more
        return self.after(pair, more)

    cdef int move_more(self) except -1:
        cdef list again = self.again
        cdef PlainPair pair
        self.again = []
        for pair in again:
            pair.queued = False
            if pair.carried_.over == RUNNING:
                more = pump(&pair.carried_, CLIENT, &self.turn)
                self.after(pair, pump(&pair.carried_, UPSTREAM, &self.turn) or more)
        return 0

    cdef int after(self, PlainPair pair, bint more) except -1:
        """After a turn of a pair: note that there is more to be moved, or close it if it has ended.

        The owner closes it, unless all that is known of it is in the tables here.
        """
        if pair.carried_.over == RUNNING:
            if more and not pair.queued:
                pair.queued = True
                self.again.append(pair)
        elif pair.carried_.over == ORDERLY and pair.key is pair and pair in self.new and len(self.running) < self.limit:
            del self.running[pair], self.new[pair]
            # It refers to itself no longer: so its memory is free at once, without the garbage collector.
            pair.key = None
            self.release(pair, CLIENT, FIN)
            self.release(pair, UPSTREAM, FIN)
        else:
            self.leaving = True
            self.owner.ended(pair, self.turn.now)
        return 0
