"""Numbered datagrams, and the element and the receiver that tell which of them were judged and which arrived."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from namespace import Namespace
from traffic import PYTHON

# Accepts every datagram, and writes down its number: beyond the death of its process, without a file of its own for each.
ELEMENT: Final = """
import os
from nfq_agent import ACCEPT, PacketElement
class Book(PacketElement):
    def __init__(self, name, options, emit):
        super().__init__(name, options, emit)
        self.book = os.open("/run/judged", os.O_WRONLY | os.O_APPEND)
    def decide(self, packet, flow):
        os.write(self.book, bytes(packet.payload[28:36]))
        return ACCEPT
"""
CONFIG: Final = """
[agent]
backend = "{backend}"
[queue.main]
num = 100
max_len = 16384
elements = ["book:Book"]
[rules.app]
queue = "main"
hooks = ["output"]
family = "inet"
udp_ports = [11000]
"""
# Sends numbers, RATE a second, to a receiver of its own, until its standard input ends, 120 s at most. Prints how many it sent,
# how many came, and the longest time on the way and its 99th percentile, in milliseconds. argv: rate.
_SENDER: Final = """
import select, socket, struct, sys, threading, time
rate = float(sys.argv[1])
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
receiver.bind(("127.0.0.1", 11000))
receiver.settimeout(3)
waits, got = [], set()
def receive():
    while True:
        try:
            data = receiver.recv(64)
        except TimeoutError:
            return
        number, sent = struct.unpack("!Qd", data)
        waits.append(time.monotonic() - sent)
        got.add(number)
thread = threading.Thread(target=receive)
thread.start()
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.connect(("127.0.0.1", 11000))
print("sending", flush=True)
began = time.monotonic()
number = 0
while time.monotonic() - began < 120 and not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(16):
        end.send(struct.pack("!Qd", number, time.monotonic()))
        number += 1
    ahead = number / rate - (time.monotonic() - began)
    if ahead > 0:
        time.sleep(ahead)
thread.join()
waits.sort()
print(number, len(got), waits[-1] * 1000, waits[len(waits) * 99 // 100] * 1000)
"""


class Flow(NamedTuple):
    """sent, arrived: datagrams. worst, most: the longest time on the way and its 99th percentile, in milliseconds."""

    sent: int
    arrived: int
    worst: float
    most: float


class Numbered:
    """A flow of numbered datagrams to port 11000, and what became of it."""

    def __init__(self, namespace: Namespace, rate: int) -> None:
        self._process = namespace.start(
            PYTHON, "-c", _SENDER, str(rate), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "sending\n"

    def end(self) -> Flow:
        """Send no more, and wait for what is on its way."""
        output, _ = self._process.communicate(timeout=60)
        sent, arrived, worst, most = output.split()
        return Flow(int(sent), int(arrived), float(worst), float(most))


def write_down(namespace: Namespace, folder: Path) -> None:
    """Put the element into a configuration's folder, and make the file in which it writes."""
    elements = folder / "elements"
    elements.mkdir(mode=0o755, exist_ok=True)
    (elements / "book.py").write_text(ELEMENT)
    namespace.shell("touch /run/judged; chmod 666 /run/judged")


def judged(namespace: Namespace) -> list[int]:
    """The numbers that were judged."""
    data = bytes(namespace.run("cat", "/run/judged", text=False).stdout)  # type: ignore[arg-type]  # text=False
    return [int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data), 8)]
