"""Traffic for tests, as scripts that run in a namespace: bounded in count and in time."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Final

from namespace import PATIENCE, Namespace

PYTHON: Final = sys.executable

# Sends back what it gets, on one connection; ends with it. argv: address, port.
ECHO: Final = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
print("listening", flush=True)
connection, _ = listener.accept()
connection.settimeout(60)
while data := connection.recv(1 << 20):
    connection.sendall(data)
"""

# Sends SIZE bytes and reads as many back at the same time; prints both digests. argv: address, port, size.
CLIENT: Final = """
import hashlib, random, socket, sys, threading
size = int(sys.argv[3])
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)
block = random.Random(1).randbytes(1 << 20)
sent, got = hashlib.sha256(), hashlib.sha256()
def send():
    left = size
    while left:
        part = block[:left]
        connection.sendall(part)
        sent.update(part)
        left -= len(part)
    connection.shutdown(socket.SHUT_WR)
sender = threading.Thread(target=send)
sender.start()
count = 0
while data := connection.recv(1 << 20):
    got.update(data)
    count += len(data)
sender.join()
print(count, sent.hexdigest(), got.hexdigest())
"""

# Sends COUNT datagrams of 64 bytes without a receiver, at most RATE a second; prints how many the kernel took. argv: address,
# port,
# count, rate.
FLOOD: Final = """
import socket, sys, time
address, port, count, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
end = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
receiver = socket.socket(end.family, socket.SOCK_DGRAM)
receiver.bind((address, port))
end.connect((address, port))
payload = b"x" * 64
began = time.monotonic()
taken = 0
for number in range(count):
    try:
        end.send(payload)
        taken += 1
    except OSError:
        pass
    if number % 100 == 0:
        ahead = number / rate - (time.monotonic() - began)
        if ahead > 0:
            time.sleep(ahead)
print(taken)
"""

# The same without a count: until its standard input ends, 120 s at most. argv: address, port, rate.
_ENDLESS: Final = """
import select, socket, sys, time
address, port, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
receiver = socket.socket(end.family, socket.SOCK_DGRAM)
receiver.bind((address, port))
end.connect((address, port))
payload = b"x" * 64
began = time.monotonic()
taken = number = 0
while True:
    for number in range(number + 1, number + 101):
        try:
            end.send(payload)
            taken += 1
        except OSError:
            pass
    ahead = max(0.0, number / rate - (time.monotonic() - began))
    if select.select([sys.stdin], [], [], ahead)[0] or time.monotonic() - began > 120:
        break
print(taken)
"""


class Flood:
    """Datagrams to port 11000 of the loopback until `end`, so that nothing under test can be slower than it."""

    def __init__(self, namespace: Namespace, rate: int = 100_000, address: str = "127.0.0.1") -> None:
        """rate: datagrams a second at most."""
        argv = (PYTHON, "-c", _ENDLESS, address, "11000", str(rate))
        self._process = namespace.start(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def end(self) -> int:
        """End it; how many datagrams the kernel took. Fails if it has ended before."""
        assert self._process.poll() is None, "the flood was over before it was ended"
        text, _ = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0
        return int(text)


def send(port: int, count: int) -> None:
    """Send datagrams of one byte to a port of the loopback, as fast as they go."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))


def echo(namespace: Namespace, address: str = "127.0.0.1", port: int = 8080) -> subprocess.Popen[bytes]:
    """A server that listens: it sends back what it gets on one connection, and ends with it."""
    server = namespace.start(PYTHON, "-c", ECHO, address, str(port), stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    return server


class Lines:
    """A connection from the loopback to an echo server there, which carries one line after the other."""

    def __init__(self, namespace: Namespace, port: int = 8080) -> None:
        self.server = echo(namespace, port=port)
        self._client = namespace.start("nc", "-N", "127.0.0.1", str(port), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def carry(self, line: bytes) -> None:
        """Send a line, and read it as it comes back."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(line + b"\n")
        self._client.stdin.flush()
        assert self._client.stdout.readline() == line + b"\n"

    def end(self) -> None:
        """Half-close, and wait for the orderly end."""
        assert self._client.stdin is not None
        self._client.stdin.close()
        assert self._client.wait(timeout=PATIENCE) == 0


def lost_segments(*hosts: Namespace) -> int:
    """TCP segments that these hosts have sent to each other or themselves, and that no host received (snmp of proc_net(5))."""
    lost = 0
    for host in hosts:
        names, values = (line.split()[1:] for line in host.shell("grep ^Tcp: /proc/net/snmp").splitlines())
        counts = dict(zip(names, map(int, values), strict=True))
        # Linux counts what is sent again apart.
        lost += counts["OutSegs"] + counts["RetransSegs"] - counts["InSegs"]
    return lost
