"""TCP clients and servers for the inside of a namespace, and how to run one beside the test."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from namespace import Namespace

SERVER = Path(__file__).parent / "tcp_server.py"


def server(netns: Namespace, mode: str, host: str = "0.0.0.0", port: int = 8080, *more: str) -> subprocess.Popen[bytes]:
    """Start tcp_server.py in a mode and wait until it listens."""
    process = netns.start(sys.executable, str(SERVER), mode, host, str(port), *more, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def ask(host: str, port: int, data: bytes = b"hello", end: bool = True) -> bytes:
    """Connect, send, end, and read to the end."""
    with socket.create_connection((host, port), timeout=10) as connection:
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


def load(seconds: float) -> tuple[int, list[str]]:
    """Short exchanges one after the other: how many were good, and what became of the others."""
    good = 0
    bad = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            good += ask("127.0.0.1", 8080, b"x" * 1000) == b"x" * 1000
        except OSError as error:
            bad.append(f"{time.strftime('%H:%M:%S')} {error!r}")
    return good, bad


class Meanwhile:
    """A function that runs inside a namespace beside the test; `result()` waits for what it returned or raised."""

    def __init__(self, netns: Namespace, function: Callable[..., Any], *args: Any) -> None:
        self._reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                os.close(self._reader)
                try:
                    answer = (True, netns.call(function, *args))
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
