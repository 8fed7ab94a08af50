"""A sender that changes a page after it was sent, while the packet waits in the queue; and a server that says what it read."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from agent import Agent, suspend, until
from namespace import PATIENCE, Namespace
from openings import dns_query

from nfq_agent.checksum import internet_checksum
from nfq_agent.host.nfqueue.statistics import statistics

NUMBER: Final = 110
HTTP: Final = 4440
DNS: Final = 53
# Ways to send bytes that stay the sender's. With the last two it is the sender who adds up the checksum of a datagram, or none.
WAYS: Final = ("sendfile", "splice", "vmsplice", "MSG_ZEROCOPY")
OWN_CHECKSUM: Final = ("UDP_CORK", "SO_NO_CHECK")
REQUEST: Final = b"GET / HTTP/1.1\r\nHost: www.good.test\r\n\r\n"
# include/uapi/linux/udp.h, linux/socket.h, asm-generic/socket.h
_UDP_CORK: Final = 1
_MSG_ZEROCOPY: Final = 0x4000000
_SO_NO_CHECK: Final = 11
_SO_ZEROCOPY: Final = 60
_libc: Final = ctypes.CDLL(None, use_errno=True)
_SERVER: Final = f"""
import socket, sys
address = sys.argv[1]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
server = socket.create_server((address, {HTTP}), family=family)
datagrams = socket.socket(family, socket.SOCK_DGRAM)
datagrams.bind((address, {DNS}))
print("ready", flush=True)
for line in sys.stdin:
    if line == "udp\\n":
        data = datagrams.recv(65536)
    else:
        connection, _ = server.accept()
        data = connection.recv(65536)
        connection.close()
    print(data.hex(), flush=True)
"""


class Server:
    """Reads one request of HTTP or one query of DNS each time that it is told to. It says nothing back."""

    def __init__(self, namespace: Namespace, address: str) -> None:
        self.address = address
        self._process: subprocess.Popen[bytes] = namespace.start(
            sys.executable, "-c", _SERVER, address, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._line() == b"ready\n"

    def read(self, kind: str) -> bytes:
        """kind: "tcp" or "udp". What came."""
        assert self._process.stdin is not None
        self._process.stdin.write(kind.encode() + b"\n")
        self._process.stdin.flush()
        return bytes.fromhex(self._line().decode())

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def understood(
    sender: Namespace, target: Namespace, agent: Agent, addresses: Iterable[str], ways: Mapping[str, Iterable[str]]
) -> set[str]:
    """Which names a server at these addresses reads: "good", which the packet has when it is queued, "evil", or both.

    sender, target: where both are. ways: to send, by kind, which is "tcp" or "udp".
    """
    (worker,) = agent.workers()
    names = set()
    for server in [Server(target, address) for address in addresses]:
        for kind, way in [(kind, way) for kind, some in ways.items() for way in some]:
            sender.call(send_and_change, agent.namespace.pid, worker, server.address, kind, way)
            data = server.read(kind)
            names |= {name for name in ("good", "evil") if name.encode() in data}
    return names


def send_and_change(holder: int, worker: int, address: str, kind: str, way: str) -> None:
    """Send a page that has the allowed name, and write the denied name there before the packet gets its verdict.

    holder: a process in the network namespace of the queue. worker: the process that judges.
    """
    before, after = (REQUEST, REQUEST.replace(b"good", b"evil")) if kind == "tcp" else queries()
    with tempfile.TemporaryFile() as file:
        file.write(before.ljust(mmap.PAGESIZE, b"\0"))
        file.flush()
        page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sender = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        sender.settimeout(PATIENCE)
        sender.connect((address, HTTP if kind == "tcp" else DNS))
        # The packets of the connection itself.
        until(lambda: not statistics(holder)[NUMBER].waiting, "the queue is empty")
        suspend(worker)
        try:
            send(way, sender, file.fileno(), page, len(before))
            until(lambda: statistics(holder)[NUMBER].waiting, "the packet waits")
            page[: len(after)] = after
        finally:
            os.kill(worker, signal.SIGCONT)
        until(lambda: not statistics(holder)[NUMBER].waiting, "the packet has its verdict")


def send(way: str, sender: socket.socket, file: int, page: mmap.mmap, size: int) -> None:
    """Send the first bytes of a file that has the page, so that the kernel keeps a reference to the page."""
    if way == "sendfile":
        assert os.sendfile(sender.fileno(), file, 0, size) == size
    elif way == "MSG_ZEROCOPY":
        sender.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
        assert sender.send(memoryview(page)[:size], _MSG_ZEROCOPY) == size
    elif way == "vmsplice":
        splice(sender, size, lambda pipe: _from_memory(pipe, page, size))
    else:
        if way == "SO_NO_CHECK":
            sender.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        if way == "UDP_CORK":
            sender.setsockopt(socket.IPPROTO_UDP, _UDP_CORK, 1)
        splice(sender, size, lambda pipe: os.splice(file, pipe, size, offset_src=0))
        if way == "UDP_CORK":
            sender.setsockopt(socket.IPPROTO_UDP, _UDP_CORK, 0)


def splice(sender: socket.socket, size: int, fill: Callable[[int], int]) -> None:
    """Send what `fill` puts into a pipe."""
    out, into = os.pipe()
    try:
        assert fill(into) == size
        assert os.splice(out, sender.fileno(), size) == size
    finally:
        os.close(out)
        os.close(into)


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _from_memory(pipe: int, page: mmap.mmap, size: int) -> int:
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(_libc.vmsplice(pipe, ctypes.byref(_Vector(start, size)), 1, 0))


def queries() -> tuple[bytes, bytes]:
    """Two queries of one length and one checksum: the denied one has another number."""
    allowed = dns_query("www.good.test")
    denied = allowed.replace(b"good", b"evil")
    # A checksum is the complement of a sum (RFC 1071).
    number = (int.from_bytes(denied[:2], "big") + internet_checksum(denied) - internet_checksum(allowed)) % 0xFFFF
    denied = number.to_bytes(2, "big") + denied[2:]
    assert internet_checksum(allowed) == internet_checksum(denied)
    return allowed, denied
