"""Messages to the kernel's links, routes, rules and filters (rtnetlink(7)): requests and listings."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, Self

from nfq_agent.host.attributes import attribute, attributes

REQUEST: Final = 1
_ACK: Final = 4
_DUMP: Final = 0x300
# Flags of a request that makes something: it must not exist yet, or it replaces what exists.
CREATE_EXCLUSIVE: Final = 0x600
CREATE_REPLACE: Final = 0x500
_ERROR, _DONE = 2, 3
_NESTED: Final = 0x8000
_SOL_NETLINK: Final = 270
_STRICT_CHECK: Final = 12
_PATIENCE: Final = 10.0
# struct nlmsghdr
_HEADER: Final = struct.Struct("=IHHII")


class Rtnetlink:
    """A socket. It may be opened before capabilities are dropped, and used by a process with CAP_NET_ADMIN."""

    def __init__(self, strict: bool = False) -> None:
        """strict: the kernel lists only what the request names, as one routing table. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(_PATIENCE)
        if strict:
            # An older kernel lists everything.
            with suppress(OSError):
                self._socket.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes) -> None:
        """Send one request and wait for its acknowledgement. Raises OSError."""
        self._socket.send(message(kind, REQUEST | _ACK | flags, body))
        for answer, content in messages(self._socket.recv(1 << 16)):
            if answer == _ERROR:
                _raise(content)

    def get(self, kind: int, body: bytes) -> bytes:
        """The body of the one answer to a request. Raises OSError."""
        self._socket.send(message(kind, REQUEST, body))
        answer, content = next(messages(self._socket.recv(1 << 16)))
        if answer == _ERROR:
            _raise(content)
        return content

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all that the kernel lists. Raises OSError."""
        self._socket.send(message(kind, REQUEST | _DUMP, body))
        found: list[bytes] = []
        while True:
            for answer, content in messages(self._socket.recv(1 << 20)):
                if answer in (_ERROR, _DONE):
                    _raise(content)
                    return found
                found.append(content)


def dump(kind: int, body: bytes) -> list[bytes]:
    """The same over a socket of its own. Raises OSError."""
    with Rtnetlink() as rtnetlink:
        return rtnetlink.dump(kind, body)


def message(kind: int, flags: int, body: bytes) -> bytes:
    """One request."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, body) of all messages that were received together."""
    place = 0
    while place + _HEADER.size <= len(data):
        size, kind, *_ = _HEADER.unpack_from(data, place)
        if size < _HEADER.size:
            return
        yield kind, data[place + _HEADER.size : place + size]
        place += size + 3 & ~3


def nested(kind: int, value: bytes) -> bytes:
    """An attribute that contains attributes."""
    return attribute(kind | _NESTED, value)


def by_type(data: bytes) -> dict[int, bytes]:
    """The attributes by their types; one that is cut off, and those behind it, are left out."""
    found: dict[int, bytes] = {}
    with suppress(ValueError):
        found.update(attributes(data))
    return found


def _raise(content: bytes) -> None:
    """Raise the error that a message carries, if it is one: an acknowledgement and an end of a listing carry 0, or none."""
    if len(content) >= 4 and (code := -int.from_bytes(content[:4], sys.byteorder, signed=True)):
        raise OSError(code, os.strerror(code))
