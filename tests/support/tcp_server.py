"""A TCP server for tests of the proxy: `tcp_server.py MODE HOST PORT`. It prints `ready` when it listens.

echo: what comes goes back, until the client's end, then its own. whole: reads to the end, then says how much that was.
exact: checks the stream and sends the same one, BYTES each way. source: sends without end. sink: takes, and says nothing.
reset: answers the first bytes with RST. who: the peer's address, then the end.
"""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import struct
import sys
import threading

# Of a length that no buffer has, so that bytes lost or doubled show.
BLOCK = random.Random(7).randbytes(1_000_003)


def send_exact(connection: socket.socket, total: int) -> None:
    """Send so many bytes of the stream."""
    view = memoryview(BLOCK)
    sent = 0
    while sent < total:
        at = sent % len(BLOCK)
        sent += connection.send(view[at : at + min(len(BLOCK), total - sent)])


def send_all(connection: socket.socket, total: int) -> None:
    """Send so many bytes of the stream, then end this direction."""
    send_exact(connection, total)
    connection.shutdown(socket.SHUT_WR)


def receive_exact(connection: socket.socket, total: int) -> int:
    """Read to the end, or to `total`; the number of bytes. Raises AssertionError at the first one that is not the stream's."""
    buffer = memoryview(bytearray(1 << 18))
    view = memoryview(BLOCK)
    got = 0
    while got < total and (count := connection.recv_into(buffer)):
        done = 0
        while done < count:
            at = (got + done) % len(BLOCK)
            piece = min(count - done, len(BLOCK) - at)
            assert buffer[done : done + piece] == view[at : at + piece], f"the stream differs near byte {got + done}"
            done += piece
        got += count
    return got


def exchange(connection: socket.socket, total: int) -> int:
    """Send and receive the stream at once; the bytes received before the other side's end."""
    sender = threading.Thread(target=send_all, args=(connection, total))
    sender.start()
    got = receive_exact(connection, total + 1)
    sender.join()
    return got


def _serve(mode: str, connection: socket.socket, peer: tuple[str, int], total: int) -> None:
    with connection, contextlib.suppress(OSError):
        if mode == "echo":
            while data := connection.recv(1 << 16):
                connection.sendall(data)
        elif mode == "whole":
            got = 0
            while data := connection.recv(1 << 16):
                got += len(data)
            connection.sendall(f"{got} bytes\n".encode())
        elif mode == "exact":
            assert exchange(connection, total) == total
        elif mode == "source":
            send_exact(connection, 1 << 60)
        elif mode == "sink":
            while connection.recv(1 << 16):
                pass
        elif mode == "reset":
            connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif mode == "who":
            connection.sendall(f"{peer[0]} {peer[1]}\n".encode())


def main() -> None:
    mode, host, port = sys.argv[1:4]
    total = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    # systemd gives a soft limit of 1,024 descriptors; each connection takes one.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, int(port)))
    listener.listen(4096)
    print("ready", flush=True)
    while True:
        connection, peer = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(mode, connection, peer, total), daemon=True).start()


if __name__ == "__main__":
    main()
