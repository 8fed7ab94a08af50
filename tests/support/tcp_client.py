"""TCP clients and servers for the inside of a namespace, and how to run one beside the test."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from namespace import PATIENCE, Namespace

# What an exchange sends and expects back.
_BLOCK = b"x" * 1000
SERVER = Path(__file__).parent / "tcp_server.py"


def server(netns: Namespace, mode: str, host: str = "0.0.0.0", port: int = 8080, *more: str) -> subprocess.Popen[bytes]:
    """Start tcp_server.py in a mode and wait until it listens."""
    process = netns.start(sys.executable, str(SERVER), mode, host, str(port), *more, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def ask(host: str, port: int, data: bytes = b"hello", end: bool = True) -> bytes:
    """Connect, send, end, and read to the end."""
    with socket.create_connection((host, port), timeout=PATIENCE) as connection:
        if data:
            connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
        return answer


def receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes, or fewer if it ends. MSG_WAITALL does nothing on a socket with a time-out."""
    data = b""
    while len(data) < length and (piece := connection.recv(length - len(data))):
        data += piece
    return data


def how_it_ends(host: str, port: int, data: bytes = b"") -> str:
    """`end`, or the name of the error."""
    try:
        ask(host, port, data, end=False)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "end"


class Meanwhile:
    """A function that runs inside a namespace beside the test; `result()` waits for what it returned or raised."""

    def __init__(self, netns: Namespace, function: Callable[..., Any], *args: Any) -> None:
        self._reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                os.close(self._reader)
                try:
                    answer = (True, netns.call(function, *args, timeout=280))
                except BaseException as error:
                    answer = (False, f"{error}\n" + "\n".join(getattr(error, "__notes__", ())))
                os.write(writer, pickle.dumps(answer))
            os._exit(0)
        os.close(writer)

    def result(self) -> Any:
        with os.fdopen(self._reader, "rb") as pipe:
            good, value = pickle.loads(pipe.read())
        os.waitpid(self._pid, 0)
        assert good, value
        return value


class Load(Meanwhile):
    """Short exchanges with an echo on port 8080 beside the test, one after the other, until `end`."""

    def __init__(self, netns: Namespace) -> None:
        # Seen by both processes: whether it is to end, and the good exchanges.
        self._shared = memoryview(mmap.mmap(-1, 16)).cast("Q")
        super().__init__(netns, self._run)

    @property
    def good(self) -> int:
        """How many exchanges were good so far."""
        return self._shared[1]

    def end(self) -> list[str]:
        """End it; what happened to the exchanges that were not good."""
        self._shared[0] = 1
        bad: list[str] = self.result()
        return bad

    def _run(self) -> list[str]:
        bad: list[str] = []
        # Bounded, in case the test has failed meanwhile.
        while not self._shared[0] and len(bad) < 100:
            self._exchange(bad)
        return bad

    def _exchange(self, bad: list[str]) -> None:
        try:
            self._shared[1] += ask("127.0.0.1", 8080, _BLOCK) == _BLOCK
        except OSError as error:
            bad.append(f"{time.strftime('%H:%M:%S')} {error!r}")


class Talk(Load):
    """The same on one connection that stays open."""

    def _run(self) -> list[str]:
        with socket.create_connection(("127.0.0.1", 8080), timeout=PATIENCE) as connection:
            while not self._shared[0]:
                connection.sendall(_BLOCK)
                if receive(connection, len(_BLOCK)) != _BLOCK:
                    return ["cut"]
                self._shared[1] += 1
                time.sleep(0.01)
        return []
