"""A process that lives in a namespace and makes calls there for a test: what holds something open has to stay alive."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any, TypeVar

from namespace import Namespace

T = TypeVar("T")
_SIZE = struct.Struct("=I")


class Resident:
    """One process inside. `call` runs a function there; objects that it keeps are reached through `state`."""

    def __init__(self, namespace: Namespace) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                self._ours.close()
                namespace.enter()
                _serve(theirs)
            os._exit(0)
        theirs.close()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function(state, *args)` returns or raises inside; `state` is a dict that lives as long as the process."""
        _send(self._ours, (function, args))
        good, value = _receive(self._ours)
        if good:
            return value  # type: ignore[no-any-return]  # what the function returned, by way of pickle
        raise value

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
            self._ours.close()


def _serve(end: socket.socket) -> None:
    state: dict[str, Any] = {}
    while True:
        function, args = _receive(end)
        try:
            answer: tuple[bool, Any] = (True, function(state, *args))
        except Exception as error:
            answer = (False, error)
        _send(end, answer)


def _send(end: socket.socket, value: object) -> None:
    data = pickle.dumps(value)
    end.sendall(_SIZE.pack(len(data)) + data)


def _receive(end: socket.socket) -> Any:
    (size,) = _SIZE.unpack(_exactly(end, _SIZE.size))
    return pickle.loads(_exactly(end, size))


def _exactly(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = end.recv(size - len(data))
        if not chunk:
            raise EOFError("the process inside has ended")
        data += chunk
    return data
