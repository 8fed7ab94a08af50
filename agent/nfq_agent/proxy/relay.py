"""Two connected sockets, and the bytes between them: directly if no element looks at them, else through the stream.

Non-blocking and edge-triggered: `turn` gets the events of epoll and moves the bytes that can be moved. It never waits, keeps no
more
than a bounded number of bytes, and closes nothing but its own two sockets. Source: epoll(7), tcp(7).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterable
from itertools import groupby
from typing import Final

from nfq_agent.host.sockets import reset_on_close
from nfq_agent.stream import Close, Connection, End, Failed, Output, Send, Stream, Way

# One read of a way that no element looks at. What does not fit into the other socket at once is kept: at most one read.
READ: Final = 256 * 1024
# One read of a way that elements look at.
READ_ELEMENTS: Final = 64 * 1024
# Reads in one turn before the other connections get theirs.
READS: Final = 8
EVENTS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_HUNG: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_READ: Final = select.EPOLLIN | _HUNG
_OUT: Final = select.EPOLLOUT
_ERROR: Final = select.EPOLLERR
_NOW: Final = socket.MSG_DONTWAIT
_SEND: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Half:
    """One socket of a pair. way: the direction of the bytes that are read from it."""

    __slots__ = ("active", "ended", "hung", "pair", "peer", "pending", "raw", "readable", "shut", "sock", "way", "wound_up")

    peer: Half

    def __init__(self, pair: Pair, sock: socket.socket, way: Way, raw: bool, now: float) -> None:
        self.pair = pair
        self.sock = sock
        self.way = way
        self.raw = raw
        # The latest events of epoll; a short read clears them (epoll(7), question 9), unless an end or an error is still to come.
        self.readable = False
        self.hung = False
        # What the other side sent and this socket has not taken yet.
        self.pending = bytearray()
        # Nothing more comes from it; nothing more goes to it once `pending` is empty; its sending side is closed.
        self.ended = False
        self.wound_up = False
        self.shut = False
        # When this side last sent or took a byte.
        self.active = now


class Pair:
    """A client's connection and the one to its destination. over: why it ended, an empty text for an orderly end."""

    __slots__ = (
        "carried", "client", "connected", "connection", "counts", "failures", "limit", "now", "over", "stream", "timed",
        "upstream",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        client: socket.socket,
        upstream: socket.socket,
        stream: Stream | None,
        counts: list[int],
        limit: int,
    ) -> None:
        """stream: None where no element looks at anything. counts: bytes of all connections, each way. limit: bytes that may
        wait each way while elements look at it."""
        self.connection = connection
        self.stream = stream
        self.counts = counts
        self.limit = limit
        self.connected = False
        self.over: str | None = None
        self.failures: list[Failed] = []
        # When the proxy's timer for it goes off, if it has one.
        self.timed: float | None = None
        # The time of the turn that runs, and whether a byte has reached the other side.
        self.now = now = connection.now
        self.carried = False
        self.client = Half(self, client, Way.REQUEST, stream is None or stream.raw(Way.REQUEST), now)
        self.upstream = Half(self, upstream, Way.RESPONSE, stream is None or stream.raw(Way.RESPONSE), now)
        self.client.peer = self.upstream
        self.upstream.peer = self.client

    @property
    def key(self) -> Connection:
        """What its attempt to connect is known by."""
        return self.connection

    @property
    def opened(self) -> float:
        """When it was accepted."""
        return self.connection.opened

    @property
    def client_active(self) -> float:
        """When the client last sent or took a byte."""
        return self.client.active

    @property
    def server_active(self) -> float:
        """When the server last sent or took a byte."""
        return self.upstream.active

    @property
    def waiting(self) -> bool:
        """Whether an element holds bytes back until a time that it has set."""
        return self.stream is not None and self.stream.due is not None

    def turn(self, half: Half, mask: int, buffer: memoryview, now: float) -> bool:
        """Process the events of one socket. True if there is more to be moved at once. buffer: READ bytes, free to use."""
        if mask & _READ and not half.ended:
            half.readable = True
            if mask & _HUNG:
                half.hung = True
        if not self.connected:
            return False
        again = False
        if half.pending and mask & _OUT:
            self.now = now
            self._flush(half)
            again = self.pump(half.peer, buffer, now)
        if half.readable:
            again = self.pump(half, buffer, now) or again
        # Reset by the peer: what could be read has been read, and the peer takes nothing more.
        if mask & _ERROR and self.over is None:
            self.over = f"reset: {failure(half.sock) or 'by the peer'}"
        return again and self.over is None

    def pump(self, half: Half, buffer: memoryview, now: float) -> bool:
        """Move what can be read from one socket to the other. True if its turn ended with bytes left."""
        sink = half.peer
        self.now = now
        for _ in range(READS):
            if not half.readable or self.over is not None:
                return False
            if sink.pending and (half.raw or len(sink.pending) >= self.limit):
                return False
            if not half.raw:
                if self.stream is not None and self.stream.held_bytes[half.way] + len(sink.pending) >= self.limit:
                    return False
                view = buffer[:READ_ELEMENTS]
            else:
                view = buffer
            try:
                count = half.sock.recv_into(view, 0, _NOW)
            except BlockingIOError:
                half.readable = False
                return False
            except OSError as error:
                self.over = f"reset: {error.strerror}"
                return False
            if count == 0:
                half.readable = False
                self._ended(half, now)
                return False
            if count < len(view) and not half.hung:
                half.readable = False
            half.active = now
            self._count(half.way, count)
            if half.raw:
                self._send(sink, view[:count])
            elif self.stream is not None:
                self.apply(self.stream.received(half.way, bytes(view[:count]), now))
                half.raw = self.stream.raw(half.way)
        return half.readable and self.over is None

    def woken(self, buffer: memoryview, now: float) -> bool:
        """The stream's timer has expired."""
        if self.stream is None:
            return False
        self.now = now
        self.apply(self.stream.woken(now))
        again = False
        for half in (self.client, self.upstream):
            half.raw = self.stream.raw(half.way)
            again = self.pump(half, buffer, now) or again
        return again

    def apply(self, outputs: Iterable[Output]) -> None:
        """Carry out the stream's commands. Consecutive chunks in one direction are sent as one, unless they are to be apart."""
        for kind, group in groupby(outputs, _kind):
            if isinstance(kind, Way):
                chunks = [output.data for output in group if isinstance(output, Send)]
                sink = self.upstream if kind is Way.REQUEST else self.client
                if len(chunks) > 1 and not (self.stream is not None and self.stream.apart):
                    chunks = [b"".join(chunks)]
                for chunk in chunks:
                    self._send(sink, chunk)
                continue
            for output in group:
                if isinstance(output, End):
                    self._wind_up(self.upstream if output.way is Way.REQUEST else self.client)
                elif isinstance(output, Close):
                    self.over = self.over or f"closed by {output.element}"
                elif isinstance(output, Failed):
                    self.failures.append(output)

    def close(self) -> None:
        """Close both sockets: with FIN after an orderly end, else with RST, so that no truncated stream looks complete."""
        for half in (self.client, self.upstream):
            if self.over:
                with contextlib.suppress(OSError):
                    reset_on_close(half.sock)
            half.sock.close()
            # This breaks a reference cycle for each connection, which the garbage collector would have to find.
            del half.peer
        del self.client, self.upstream

    def _count(self, way: Way, count: int) -> None:
        self.counts[way] += count
        if way is Way.REQUEST:
            self.connection.requested += count
        else:
            self.connection.responded += count

    def _send(self, sink: Half, data: bytes | memoryview) -> None:
        if sink.pending:
            sink.pending += data
            return
        try:
            sent = sink.sock.send(data, _SEND)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._broken(sink, error)
            return
        if sent:
            sink.active = self.now
            self.carried = True
        if sent < len(data):
            sink.pending += data[sent:]

    def _flush(self, sink: Half) -> None:
        try:
            sent = sink.sock.send(sink.pending, _SEND)
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(sink, error)
            return
        sink.active = self.now
        self.carried = True
        del sink.pending[:sent]
        if sink.wound_up and not sink.pending:
            self._shut(sink)

    def _broken(self, sink: Half, error: OSError) -> None:
        """One side accepts no more bytes. What it sent before that (an error page, for example) is still carried."""
        if sink.raw and not sink.ended and not sink.peer.pending:
            with contextlib.suppress(OSError):
                while data := sink.sock.recv(READ_ELEMENTS, _NOW):
                    self._count(sink.way, len(data))
                    if sink.peer.sock.send(data, _SEND) < len(data):
                        break
        self.over = self.over or f"reset: {error.strerror}"

    def _ended(self, half: Half, now: float) -> None:
        half.ended = True
        if self.stream is None:
            self._wind_up(half.peer)
        else:
            self.apply(self.stream.ended(half.way, now))

    def _wind_up(self, sink: Half) -> None:
        sink.wound_up = True
        if not sink.pending:
            self._shut(sink)

    def _shut(self, sink: Half) -> None:
        sink.shut = True
        if sink.peer.shut:
            # close() ends both sides.
            self.over = self.over or ""
            return
        try:
            sink.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            # ENOTCONN: it has been reset.
            self.over = f"reset: {error.strerror}"


def _kind(output: Output) -> Way | None:
    return output.way if isinstance(output, Send) else None


def failure(sock: socket.socket) -> str:
    """The error that waits on a socket (socket(7), SO_ERROR), in words; empty if there is none."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return os.strerror(number) if number else ""
