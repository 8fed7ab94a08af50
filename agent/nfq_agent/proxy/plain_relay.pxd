"""The bytes between two connected sockets that no element looks at: what relay.py does without a stream, on descriptors.

Non-blocking and edge-triggered: `on_event` gets the events of epoll and moves the bytes that can be moved. It never waits, keeps at
most one read each way, and closes nothing. Sources: epoll(7), tcp(7).
"""

from libc.errno cimport EAGAIN, ENOMEM, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strerror

from .socket_calls cimport (
    EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CTL_MOD, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, epoll_ctl, epoll_event,
    close, error_of, no_delay, recv, send, shutdown,
)

cdef enum:
    CLIENT = 0
    UPSTREAM = 1
    # One read. What does not fit into the other socket at once is kept.
    READ = 256 * 1024
    # Reads in one turn before the other connections get theirs.
    READS = 8
    HUNG = EPOLLRDHUP | EPOLLHUP | EPOLLERR
    HUNG_UP = EPOLLERR | EPOLLHUP

# How often was sent to a socket: the first time needs no TCP_NODELAY, later ones do.
cdef enum Sends:
    NEVER = 0
    ONCE
    # It has the option.
    AT_ONCE

cdef enum Over:
    RUNNING = 0
    # Both sides have ended.
    ORDERLY
    # A side was reset: `error` says why.
    BROKEN
    # The client closed before its destination answered.
    LEFT
    # The owner ended it.
    TOLD

cdef struct Half:
    int fd
    # The latest events of epoll; a short read clears `readable` (epoll(7), question 9), unless an end or an error is still to come.
    bint readable, hung
    # Nothing more comes from it; nothing more goes to it once `pending` is sent; its sending side is closed.
    bint ended, wound_up, shut
    Sends sends
    # Whether epoll says when it takes bytes again: most never need that.
    bint room_watched
    # What the other side sent and this socket has not taken yet.
    char *pending
    size_t start, end
    # When this side last sent or took a byte.
    double active

# A client's connection and the one to its destination. counts: bytes that came from each.
cdef struct Carried:
    Half halves[2]
    bint connected, carried
    Over over
    int error
    unsigned long long counts[2]

# What all of them use: their epoll, a buffer of READ bytes, the time of this turn, the bytes that came from either side.
cdef struct Turn:
    int epoll
    char *buffer
    double now
    unsigned long long *counts


cdef inline void discard(Carried *pair) noexcept nogil:
    """Free what it keeps, and close what is still open of it."""
    for side in range(2):
        free(pair.halves[side].pending)
        if pair.halves[side].fd >= 0:
            close(pair.halves[side].fd)


cdef inline bint on_event(Carried *pair, int side, uint32_t mask, Turn *turn) noexcept nogil:
    """Process the events of one socket. True if there is more to be moved at once. Those of a destination come once it is connected."""
    cdef Half *half = &pair.halves[side]
    cdef bint more = False
    if mask & (EPOLLIN | HUNG) and not half.ended:
        half.readable = True
        if mask & HUNG:
            half.hung = True
    if not pair.connected:
        if mask & HUNG_UP:
            pair.over = LEFT
        return False
    if half.pending != NULL and mask & EPOLLOUT:
        flush(pair, side, turn)
        more = pump(pair, 1 - side, turn)
    if pump(pair, side, turn):
        more = True
    # Reset by the peer: what could be read has been read, and the peer takes nothing more.
    if mask & EPOLLERR and pair.over == RUNNING:
        break_off(pair, error_of(half.fd))
    return more and pair.over == RUNNING


cdef inline bint pump(Carried *pair, int side, Turn *turn) noexcept nogil:
    """Move what can be read from one socket to the other. True if its turn ended with bytes left."""
    cdef Half *half = &pair.halves[side]
    cdef ssize_t count
    for _ in range(READS):
        if not half.readable or pair.over != RUNNING or pair.halves[1 - side].pending != NULL:
            return False
        count = recv(half.fd, turn.buffer, READ, MSG_DONTWAIT)
        if count <= 0:
            half.readable = False
            if count == 0:
                half.ended = True
                wind_up(pair, 1 - side)
            elif errno != EAGAIN:
                break_off(pair, errno)
            return False
        if count < READ and not half.hung:
            half.readable = False
        half.active = turn.now
        add(pair, side, count, turn)
        pass_on(pair, 1 - side, count, turn)
    return half.readable and pair.over == RUNNING


cdef inline void add(Carried *pair, int side, ssize_t count, Turn *turn) noexcept nogil:
    pair.counts[side] += count
    turn.counts[side] += count


cdef inline void prepare(Half *sink) noexcept nogil:
    """Before each send. Nagle's algorithm holds nothing back unless a small segment is under way (tcp_nagle_check() in tcp_output.c)."""
    if sink.sends == ONCE:
        no_delay(sink.fd)
        sink.sends = AT_ONCE
    elif sink.sends == NEVER:
        sink.sends = ONCE


cdef inline bint watch(Half *half, int epoll, int how, bint room) noexcept nogil:
    """Get events of it from now on, of what is the case already at once. False on an error, see errno. how: EPOLL_CTL_ADD or _MOD."""
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (EPOLLOUT if room else 0)
    event.data.fd = half.fd
    half.room_watched = room
    return epoll_ctl(epoll, how, half.fd, &event) == 0


cdef inline ssize_t put(Carried *pair, int side, const char *data, size_t size, Turn *turn) noexcept nogil:
    """Send; how much was sent, -1 if the pair is over by that."""
    cdef Half *sink = &pair.halves[side]
    cdef ssize_t sent
    prepare(sink)
    sent = send(sink.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent < 0:
        if errno == EAGAIN:
            return 0
        refuse(pair, side, errno, turn)
        return -1
    if sent > 0:
        sink.active = turn.now
        pair.carried = True
    return sent


cdef inline void pass_on(Carried *pair, int side, size_t size, Turn *turn) noexcept nogil:
    """Send the first bytes of the buffer, and keep what the socket does not take."""
    cdef Half *sink = &pair.halves[side]
    cdef ssize_t sent = put(pair, side, turn.buffer, size, turn)
    if 0 <= sent < <ssize_t>size:
        sink.start = 0
        sink.end = size - sent
        sink.pending = <char *>malloc(sink.end)
        if sink.pending == NULL:
            break_off(pair, ENOMEM)
        else:
            memcpy(sink.pending, turn.buffer + sent, sink.end)
            if not sink.room_watched and not watch(sink, turn.epoll, EPOLL_CTL_MOD, True):
                break_off(pair, errno)


cdef inline void flush(Carried *pair, int side, Turn *turn) noexcept nogil:
    cdef Half *sink = &pair.halves[side]
    cdef ssize_t sent = put(pair, side, sink.pending + sink.start, sink.end - sink.start, turn)
    if sent > 0:
        sink.start += sent
        if sink.start == sink.end:
            free(sink.pending)
            sink.pending = NULL
            if sink.wound_up:
                shut(pair, side)


cdef inline void wind_up(Carried *pair, int side) noexcept nogil:
    pair.halves[side].wound_up = True
    if pair.halves[side].pending == NULL:
        shut(pair, side)


cdef inline void shut(Carried *pair, int side) noexcept nogil:
    pair.halves[side].shut = True
    if pair.halves[1 - side].shut:
        # Closing ends both sides.
        if pair.over == RUNNING:
            pair.over = ORDERLY
    elif shutdown(pair.halves[side].fd, SHUT_WR) != 0:
        # ENOTCONN: it has been reset.
        break_off(pair, errno)


cdef inline void refuse(Carried *pair, int side, int error, Turn *turn) noexcept nogil:
    """One side accepts no more bytes. What it sent before that (an error page, for example) is still carried."""
    cdef Half *sink = &pair.halves[side]
    cdef Half *peer = &pair.halves[1 - side]
    cdef ssize_t count
    if not sink.ended and peer.pending == NULL:
        while True:
            count = recv(sink.fd, turn.buffer, READ, MSG_DONTWAIT)
            if count <= 0:
                break
            add(pair, side, count, turn)
            prepare(peer)
            if send(peer.fd, turn.buffer, count, MSG_DONTWAIT | MSG_NOSIGNAL) < count:
                break
    break_off(pair, error)


cdef inline void break_off(Carried *pair, int error) noexcept nogil:
    if pair.over == RUNNING or pair.over == ORDERLY:
        pair.over = BROKEN
        pair.error = error


cdef inline str why_over(const Carried *pair):
    """Why a pair ended, as `relay.Pair.over` has it; None while it runs, and where the owner ended it."""
    if pair.over == ORDERLY:
        return ""
    if pair.over == BROKEN:
        return f"reset: {reason_of(pair.error) or 'by the peer'}"
    return "the client closed the connection" if pair.over == LEFT else None


cdef inline str reason_of(int number):
    """The words for an error; none for no error."""
    return strerror(number).decode() if number else ""
