"""Where an exporter writes to: a file, the standard output, or a collector over UDP or TCP, which may be slow or away."""

from __future__ import annotations

import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Final, Protocol

from nfq_agent.flow_report import FlowReport
from nfq_agent.ipfix import DATAGRAM
from nfq_agent.values import Endpoint

# Seconds that a collector may take to accept a connection or bytes. Both together are shorter than the time for which the agent
# keeps reporting after a question.
_SLOW: Final = 1.5
# Seconds after a failure until the next attempt, and after which datagrams bring the templates again.
_AGAIN: Final = 5.0
_REFRESH: Final = 60.0
# A file, a pipe or a stream of bytes has no packets: a long message saves work.
_STREAM: Final = 16384
TARGETS: Final = "allowed: udp://HOST:PORT, tcp://HOST:PORT, a file, or - for the standard output"


class Encoding(Protocol):
    """How flows are written: IpfixSession or FlowLines."""

    def begin(self, now: float) -> bytes: ...
    def again(self, now: float) -> bytes: ...
    def blocks(self, reports: Iterable[FlowReport], now: float, most: int) -> Iterable[tuple[bytes, int]]: ...
    def statistics(self, process: int, exported: int, missed: int, now: float) -> bytes: ...


class ReaderGone(Exception):
    """No process reads the standard output any more."""


class FlowOutput(ABC):
    """exported, lost: records that were written, and that could not be written. problem: why the latest could not be; empty if it
    was.
    """

    most = _STREAM

    def __init__(self, name: str, encoding: Encoding) -> None:
        self.name = name
        self._encoding = encoding
        self.exported = 0
        self.lost = 0
        self.problem = ""

    def write(self, reports: list[FlowReport], now: float) -> None:
        """Write the reports. now: seconds since the epoch. Raises ReaderGone."""
        if reports and not self._ready(now):
            self.lost += len(reports)
            return
        for block, records in self._encoding.blocks(reports, now, self.most):
            if self._wrote(block):
                self.exported += records
            else:
                self.lost += records

    def statistics(self, process: int, missed: int, now: float) -> None:
        """Write the exporter's own figures. missed: all that it missed, besides what this output lost. Raises ReaderGone."""
        if self._ready(now):
            self._wrote(self._encoding.statistics(process, self.exported, missed + self.lost, now))

    def _wrote(self, block: bytes) -> bool:
        try:
            self._put(block)
        except OSError as error:
            self.problem = f"{self.name}: {error.strerror or error}"
            return False
        self.problem = ""
        return True

    def close(self) -> None:  # noqa: B027  # most outputs have nothing open between two writes
        """Close what is open between two writes."""

    @abstractmethod
    def _ready(self, now: float) -> bool:
        """Whether it can be written to; what a reader needs first is written."""

    @abstractmethod
    def _put(self, block: bytes) -> None:
        """Write all of it. Raises OSError, ReaderGone."""


class StandardOutput(FlowOutput):
    """For a pipe to another program."""

    _begun = False

    def _ready(self, now: float) -> bool:
        if not self._begun:
            self._begun = True
            self._put(self._encoding.begin(now))
        return True

    def _put(self, block: bytes) -> None:
        try:
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
        except BrokenPipeError as error:
            # The interpreter would write it again at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise ReaderGone from error


class File(FlowOutput):
    """Appended to, and opened each time: a file that was moved away is made again."""

    def __init__(self, name: str, encoding: Encoding) -> None:
        super().__init__(name, encoding)
        self._begun = False

    def _ready(self, now: float) -> bool:
        try:
            empty = not Path(self.name).stat().st_size
        except OSError:
            # It does not exist, or the attempt to write shows why it cannot be read.
            empty = True
        if empty or not self._begun:
            self._begun = self._wrote(self._encoding.begin(now))
        return self._begun

    def _put(self, block: bytes) -> None:
        with Path(self.name).open("ab") as file:
            file.write(block)


class _Collector(FlowOutput):
    """A socket that is connected to a collector, and made again some seconds after a failure; what comes meanwhile is lost."""

    kind: ClassVar[socket.SocketKind]

    def __init__(self, name: str, encoding: Encoding, endpoint: Endpoint) -> None:
        super().__init__(name, encoding)
        self._endpoint = endpoint
        self._socket: socket.socket | None = None
        self._again = float("-inf")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ready(self, now: float) -> bool:
        if self._socket is None and now >= self._again:
            self._again = now + _AGAIN
            try:
                self._socket = _connected(self._endpoint, self.kind)
            except OSError as error:
                self.problem = f"{self.name}: {error.strerror or error}"
                return False
            return self._begin(now)
        return self._socket is not None

    def _begin(self, now: float) -> bool:
        """Write what a reader needs first. Returns whether it could be."""
        return self._wrote(self._encoding.begin(now))


class Udp(_Collector):
    """A record that is sent may be lost on its way: the collector sees that in the sequence numbers of IPFIX."""

    kind = socket.SOCK_DGRAM
    most = DATAGRAM
    _told = float("-inf")

    def _ready(self, now: float) -> bool:
        if not super()._ready(now):
            return False
        if now - self._told >= _REFRESH:
            self._told = now
            self._wrote(self._encoding.again(now))
        return True

    def _begin(self, now: float) -> bool:
        self._told = now
        return super()._begin(now)

    def _put(self, block: bytes) -> None:
        if block and self._socket is not None:
            self._socket.send(block)


class Tcp(_Collector):
    """A connection that fails is made again; what could not be sent meanwhile is lost, and counted."""

    kind = socket.SOCK_STREAM

    def _put(self, block: bytes) -> None:
        if self._socket is None:
            raise ConnectionError("not connected")
        try:
            self._socket.sendall(block)
        except OSError:
            self.close()
            raise


def _connected(endpoint: Endpoint, kind: socket.SocketKind) -> socket.socket:
    """A connected socket; the first address that answers. Raises OSError."""
    problem: OSError = ConnectionError(f"{endpoint.host} has no address")
    for family, _, _, _, address in socket.getaddrinfo(endpoint.host, endpoint.port, type=kind):
        made = socket.socket(family, kind | socket.SOCK_CLOEXEC)
        try:
            made.settimeout(_SLOW)
            made.connect(address)
        except OSError as error:
            made.close()
            problem = error
        else:
            return made
    raise problem


def output(target: str, encoding: Encoding) -> FlowOutput:
    """From `udp://HOST:PORT`, `tcp://HOST:PORT`, `-`, or a file's name. Raises ValueError."""
    if target == "-":
        return StandardOutput("the standard output", encoding)
    scheme, found, rest = target.partition("://")
    if not found:
        if not target:
            raise ValueError(f"the target is empty; {TARGETS}")
        return File(target, encoding)
    kinds = {"udp": Udp, "tcp": Tcp}
    if scheme not in kinds:
        raise ValueError(f"{target!r} is not a valid target; {TARGETS}")
    return kinds[scheme](target, encoding, Endpoint.parse(rest))
