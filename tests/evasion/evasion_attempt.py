"""One try of an evasion, as the attacker makes it: the names, the address, connections, and notes of what it saw."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evasion_config import GIVEN

# In the attacker's private /run.
NOTES = Path("/run/notes")


def happened(event: str) -> Path:
    """The file that says that something has happened to the agent."""
    return Path(f"/run/happened-{event}")


@dataclass(frozen=True)
class Attempt:
    """One try.

    name: unlike that of any other try. family: 4 or 6. good, bad: the domains of the allowed and of the denied name.
    """

    name: str
    family: int
    good: str = "allowed.test"
    bad: str = "refused.test"

    @property
    def address(self) -> str:
        """The servers'."""
        return GIVEN[self.family]

    @property
    def allowed(self) -> str:
        """A name that the policy lets pass."""
        return f"{self.name}.{self.good}"

    @property
    def denied(self) -> str:
        """A name that it does not."""
        return f"{self.name}.{self.bad}"

    def tcp(self, port: int, address: str = "") -> socket.socket:
        """A connection that sends each write as a segment of its own. address: the servers' usual one if left out."""
        connection = socket.create_connection((address or self.address, port), timeout=30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def udp(self, port: int) -> socket.socket:
        """A connected datagram socket."""
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        client = socket.socket(kind, socket.SOCK_DGRAM)
        client.connect((self.address, port))
        client.settimeout(1)
        return client

    def say(self, port: int, *segments: bytes, pause: float = 0.05, linger: float = 0.5) -> None:
        """One connection: segments with a pause after each; what comes back is read and thrown away."""
        with self.tcp(port) as connection:
            for segment in segments:
                connection.sendall(segment)
                time.sleep(pause)
            self.drain(connection, linger)

    @staticmethod
    def drain(connection: socket.socket, seconds: float = 0.5) -> bytes:
        """What comes within a time."""
        connection.settimeout(seconds)
        got = b""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and (data := connection.recv(65536)):
                got += data
                connection.settimeout(max(0.01, end - time.monotonic()))
        except OSError:
            pass
        return got

    def note(self, text: str) -> None:
        """Leave a line for the test. One write for each."""
        descriptor = os.open(NOTES, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{self.name} {text}\n".encode())
        os.close(descriptor)

    def wait_for(self, event: str, seconds: float = 60) -> None:
        """Say that all is ready, and wait until something has happened to the agent."""
        self.note(f"ready {event}")
        deadline = time.monotonic() + seconds
        while not happened(event).exists() and time.monotonic() < deadline:
            time.sleep(0.02)


# The name that must not arrive is given apart from the attempt, so that an honest twin can be given the allowed one.
How = Callable[[Attempt, str], None]
Try = tuple[Attempt, How, str]
