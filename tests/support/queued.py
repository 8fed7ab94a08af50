"""What the tests of the queue share: datagrams on loopback that a rule of the namespace sends to a queue, and counts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable

from namespace import PATIENCE, Namespace

from nfq_agent.host.nfqueue.statistics import statistics

NUMBER = 7
PORT = 9999
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
# Sends as many datagrams as each line of its input says, until one says `end`. argv: port.
_SENDER = """
import socket, sys
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.setsockopt(socket.SOL_SOCKET, 32, 32 << 20)
for line in sys.stdin:
    if line == "end\\n":
        break
    size, count = map(int, line.split())
    for _ in range(count):
        end.sendto(b"x" * size, ("127.0.0.1", int(sys.argv[1])))
"""


def queue_rule(netns: Namespace, options: str = f"--queue-num {NUMBER}", match: str = "") -> None:
    """Queue datagrams to PORT on their way out; count them on their way in, where only those arrive that passed."""
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        netns.shell(
            f"{tool} -w -t mangle -A OUTPUT -p udp --dport {PORT} {match} -j NFQUEUE {options}\n"
            f"{tool} -w -t mangle -A INPUT -p udp --dport {PORT}"
        )


def passed() -> int:
    """How many came in, by that rule's counter (IPv4). Runs inside."""
    listing = subprocess.run(
        ["iptables-legacy", "-w", "-t", "mangle", "-nvxL", "INPUT"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return int(listing[2].split()[0])


def in_turns(look: Callable[[int], int], budget: int, wanted: int | None = None) -> int:
    """How many packets are answered by turns of `look`, which takes a budget, until there are `wanted` (None: all of it).

    A turn that answers packets as they come ends after 50 milliseconds, which pass between two packets if other work has the
    processor.
    """
    count = 0
    end = time.monotonic() + PATIENCE
    while count < (budget if wanted is None else wanted) and time.monotonic() < end:
        count += look(budget - count)
    return count


class Wire:
    """A sender and a receiver on loopback."""

    def __init__(self, family: int = socket.AF_INET) -> None:
        self.address = ("127.0.0.1", PORT) if family == socket.AF_INET else ("::1", PORT)
        self.receiver = socket.socket(family, socket.SOCK_DGRAM)
        self.receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
        self.receiver.bind(self.address)
        self.receiver.settimeout(PATIENCE)
        self.sender = socket.socket(family, socket.SOCK_DGRAM)
        # What waits in a queue is charged to its sender.
        self.sender.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 32 << 20)

    def send(self, *messages: bytes) -> None:
        """Send each as one datagram."""
        for message in messages:
            self.sender.sendto(message, self.address)

    def arrived(self, count: int) -> list[bytes]:
        """The next `count` datagrams; fails if they do not come."""
        return [self.receiver.recv(65535) for _ in range(count)]

    def nothing_more(self) -> bool:
        """True if nothing is there that was not asked for. Nothing on loopback is still on its way when a verdict was sent."""
        self.receiver.setblocking(False)
        try:
            self.receiver.recv(65535)
        except BlockingIOError:
            return True
        finally:
            self.receiver.settimeout(PATIENCE)
        return False

    def waiting(self) -> int:
        """Packets that wait in the queue, by the kernel's figures."""
        return statistics()[NUMBER].waiting


class Sender:
    """Sends datagrams to PORT from a process of its own, beside the test, as many as it is told. Runs inside.

    So a flood ends when the test has done what it does meanwhile, and no sooner.
    """

    def __init__(self) -> None:
        argv = [sys.executable, "-c", _SENDER, str(PORT)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, text=True)
        self.sent = 0
        """How many it was told to send."""

    def send(self, count: int, size: int = 36) -> None:
        """Let it send `count` more, of `size` bytes. Returns at once."""
        assert self._process.stdin is not None
        self.sent += count
        self._process.stdin.write(f"{size} {count}\n")
        self._process.stdin.flush()

    def end(self) -> int:
        """Wait until all are sent; how many that was."""
        assert self._process.stdin is not None
        # Not by closing its input: a process that the test has forked meanwhile has it too.
        self._process.stdin.write("end\n")
        self._process.stdin.close()
        assert self._process.wait(PATIENCE) == 0
        return self.sent


def until(condition: Callable[[], object], within: float = PATIENCE) -> None:
    """Wait for a condition; fails if it does not come true."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
