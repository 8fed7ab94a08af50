"""nf_tables messages: their members, one batch for one transaction, and dumps.

Formats: struct nlmsghdr (netlink(7)), struct nfgenmsg (linux/netfilter/nfnetlink.h), attributes of linux/netfilter/nf_tables.h.
It knows nothing of rules.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from types import TracebackType
from typing import Final, NamedTuple, Self

from nfq_agent.host.attributes import attribute, attributes

_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_RECEIVE_BUFFER: Final = 4 << 20
_RECEIVE: Final = 1 << 18
_SUBSYSTEM: Final = 10 << 8
_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_DUMP_INTERRUPTED: Final = 0x10
# How long the kernel may take to answer. Loading a module in the middle of a batch takes a part of a second.
_TIMEOUT: Final = 10.0

_HEADER: Final = Struct("=IHHII")
_FAMILY_HEADER: Final = Struct("=BBH")
_ERROR_BODY: Final = Struct("=i")

NEW_TABLE, GET_TABLE, DEL_TABLE = 0, 1, 2
NEW_CHAIN, GET_CHAIN, DEL_CHAIN = 3, 4, 5
NEW_RULE, GET_RULE, DEL_RULE = 6, 7, 8
NEW_SET, GET_SET, DEL_SET = 9, 10, 11
NEW_ELEMENTS, GET_ELEMENTS, DEL_ELEMENTS = 12, 13, 14
GET_GENERATION: Final = 16
CREATE, EXCLUSIVE, APPEND = 0x400, 0x200, 0x800

# NFPROTO_*
FAMILY_NUMBERS: Final = {"inet": 2, "inet6": 10}


def nested(kind: int, *members: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind, b"".join(members))


def text(kind: int, value: str) -> bytes:
    """A string with its NUL."""
    return attribute(kind, os.fsencode(value) + b"\0")


def u32(kind: int, value: int) -> bytes:
    """A number of 32 bits in network byte order, as all of nf_tables has them."""
    return attribute(kind, value.to_bytes(4, "big"))


def u64(kind: int, value: int) -> bytes:
    """A number of 64 bits in network byte order."""
    return attribute(kind, value.to_bytes(8, "big"))


def string(value: bytes) -> str:
    """The text of a string attribute."""
    return os.fsdecode(value.rstrip(b"\0"))


@dataclass(frozen=True, slots=True)
class Message:
    """One request. kind: NEW_TABLE and so on. family: NFPROTO_*. what: its description in an error message."""

    kind: int
    family: int
    body: bytes
    flags: int = 0
    what: str = ""


class NftError(OSError):
    """The kernel refused a message of a batch; nothing of the batch is in force. `message` is None if it was the whole batch."""

    def __init__(self, number: int, message: Message | None) -> None:
        self.message = message
        super().__init__(number, os.strerror(number), message.what if message else "the batch")


class NftSocket:
    """A netlink socket to nf_tables. Tables that it makes with an owner belong to it: they go when its last descriptor closes."""

    def __init__(self, inherited: int | None = None) -> None:
        """inherited: the descriptor of such a socket, which this object takes over. Raises OSError."""
        if inherited is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
            self._socket.bind((0, 0))
        else:
            self._socket = socket.socket(fileno=inherited)
        # An error then carries the header of what it is about, and not the message.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.settimeout(_TIMEOUT)
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        # The socket may hold answers to an earlier process.
        self._sequence = 0 if inherited is None else time.monotonic_ns() & 0x3FFFFFFF

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor: a successor needs it to take over the tables."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """The port id, by which the kernel names the owner of a table."""
        name: tuple[int, int] = self._socket.getsockname()
        return name[0]

    def close(self) -> None:
        """Close this descriptor."""
        self._socket.close()

    def commit(self, messages: Sequence[Message]) -> None:
        """Carry out all messages in one transaction, or none. Raises NftError, or OSError if the kernel does not answer."""
        first = self._next()
        parts = [_packed(_BATCH_BEGIN, _REQUEST, first, 0, 10, b"")]
        sent: dict[int, Message] = {}
        for message in messages:
            number = self._next()
            sent[number] = message
            # One answer is enough: a message that fails is always answered.
            ack = _ACK if len(sent) == len(messages) else 0
            flags = _REQUEST | message.flags | ack
            parts.append(_packed(_SUBSYSTEM | message.kind, flags, number, message.family, 0, message.body))
        parts.append(_packed(_BATCH_END, _REQUEST, self._next(), 0, 10, b""))
        data = b"".join(parts)
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, len(data) * 2 + 65536)
        self._socket.send(data)
        self._await_end(first, self._sequence - 1, sent)

    def _await_end(self, first: int, last: int, sent: dict[int, Message]) -> None:
        failed: NftError | None = None
        while True:
            for answer in _split(self._socket.recv(_RECEIVE)):
                number = answer.sequence
                if answer.kind != _ERROR or not first <= number <= last:
                    continue
                if answer.error and failed is None:
                    failed = NftError(answer.error, sent.get(number))
                if number == last or (number == first and answer.error):
                    if failed is not None:
                        raise failed
                    return

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[bytes]:
        """The attributes of each object of a kind. Raises OSError; an object that is not there gives an empty list."""
        for _ in range(20):
            try:
                return self._dumped(kind, family, body)
            except InterruptedError:
                # The ruleset changed during the dump, and a part may be missing (NLM_F_DUMP_INTR).
                continue
        raise OSError(errno.EBUSY, "the ruleset keeps changing")

    def _dumped(self, kind: int, family: int, body: bytes) -> list[bytes]:
        number = self._next()
        self._socket.send(_packed(_SUBSYSTEM | kind, _REQUEST | _DUMP, number, family, 0, body))
        found: list[bytes] = []
        interrupted = False
        while True:
            for answer in _split(self._socket.recv(_RECEIVE)):
                if answer.sequence != number:
                    continue
                interrupted |= bool(answer.flags & _DUMP_INTERRUPTED)
                if answer.kind in (_ERROR, _DONE):
                    code = answer.error
                    if code == errno.ENOENT:
                        return []
                    if code:
                        raise OSError(code, os.strerror(code))
                    if interrupted:
                        raise InterruptedError
                    return found
                found.append(answer.body[4:])

    def generation(self) -> int:
        """The number of the ruleset, which changes with every transaction on this host. Raises OSError."""
        # NFTA_GEN_ID
        return int.from_bytes(self.ask(_SUBSYSTEM | GET_GENERATION)[1], "big")

    def ask(self, kind: int, body: bytes = b"") -> dict[int, bytes]:
        """The attributes of the answer to one question. kind: with the subsystem of netfilter that it is for. Raises OSError."""
        number = self._next()
        self._socket.send(_packed(kind, _REQUEST, number, 0, 0, body))
        while True:
            for answer in _split(self._socket.recv(_RECEIVE)):
                if answer.sequence != number:
                    continue
                if answer.kind == _ERROR:
                    raise OSError(answer.error, os.strerror(answer.error))
                return dict(attributes(answer.body[4:]))

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


class _Answer(NamedTuple):
    kind: int
    flags: int
    sequence: int
    body: bytes

    @property
    def error(self) -> int:
        """The errno of an error or of the end of a dump; 0 if there is no error."""
        return -int(_ERROR_BODY.unpack_from(self.body)[0]) if len(self.body) >= _ERROR_BODY.size else 0


def _packed(kind: int, flags: int, number: int, family: int, resource: int, body: bytes) -> bytes:
    # res_id is in network byte order; it names the subsystem of a batch.
    return _HEADER.pack(20 + len(body), kind, flags, number, 0) + _FAMILY_HEADER.pack(family, 0, socket.htons(resource)) + body


def _split(data: bytes) -> Iterator[_Answer]:
    """Every message that was received at once."""
    place = 0
    while place + _HEADER.size <= len(data):
        size, kind, flags, number, _ = _HEADER.unpack_from(data, place)
        yield _Answer(kind, flags, number, data[place + _HEADER.size : place + size])
        place += size + 3 & ~3


def readable() -> bool:
    """Whether this kernel has nf_tables, and this process may read them."""
    try:
        with NftSocket() as connection:
            connection.generation()
    except OSError:
        return False
    return True
