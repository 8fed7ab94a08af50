"""Descriptors handed to a worker over its control socket, each with a line that says what it is (SCM_RIGHTS, unix(7)).

The sender closes its copies: what the worker holds is closed when the worker ends, for whatever reason.
"""

from __future__ import annotations

import contextlib
import os
import socket
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

# The kernel takes 253 descriptors in a message (SCM_MAX_FD).
_MOST: Final = 250
_ROOM: Final = 8 << 20
_SO_SNDBUFFORCE: Final = 32


def give(control: socket.socket, line: str, descriptors: Sequence[int]) -> None:
    """Send descriptors with a line of words. Raises OSError if the worker is gone or does not read."""
    # Not socket.send_fds and recv_fds: they ignore the flags that they are given.
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    control.sendmsg([line.encode() + b"\n"], ancillary, socket.MSG_NOSIGNAL)


def make_room(control: socket.socket) -> None:
    """Enlarge the socket's buffer: a worker may be busy while a hundred interfaces appear."""
    with contextlib.suppress(OSError):
        control.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM)


class Handed:
    """The worker's end of the control socket. Lines that begin with one of the `words` go to their function, with the number of
    descriptors that the function takes; `recv` returns the other lines.
    """

    def __init__(self, control: socket.socket, words: dict[str, tuple[int, Callable[..., None]]]) -> None:
        """words: how many descriptors a line with this word has, and what is called with them and the words behind it."""
        self._control = control
        self._words = words
        self._rest = b""
        self._descriptors: deque[int] = deque()
        self.ended = False
        """True once the supervisor has ended."""

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._control.fileno()

    def send(self, data: bytes) -> int:
        """Send bytes to the supervisor."""
        return self._control.send(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """The lines for the worker's loop: an empty line if there are none, no bytes once the supervisor has ended."""
        others = b""
        while True:
            try:
                data, ancillary, _, _ = self._control.recvmsg(max(size, 4096), socket.CMSG_SPACE(_MOST * 4), flags)
            except BlockingIOError:
                return others or b"\n"
            for _, kind, value in ancillary:
                if kind == socket.SCM_RIGHTS:
                    self._descriptors.extend(array("i", value))
            if not data:
                self.ended = True
                return others
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                word, *rest = line.decode().split(" ")
                if word in self._words:
                    count, function = self._words[word]
                    function(*(self._descriptors.popleft() for _ in range(count)), *rest)
                else:
                    others += line + b"\n"

    def close(self) -> None:
        """Close descriptors that arrived without their line."""
        while self._descriptors:
            os.close(self._descriptors.popleft())
