"""Numbered datagrams, and the element and the receiver that tell which of them were judged and which arrived."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from namespace import PATIENCE, Namespace
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
# Sends numbers, RATE a second, to a receiver of its own, until its standard input ends, SECONDS at most. Prints how many it sent,
# how many came, how many found no room in the receiver's buffer (SO_MEMINFO), the longest time on the way and its 99th
# percentile in milliseconds, and the longest of what was sent between one line of the standard input and the next. The time on
# the way ends when the kernel has the datagram for the receiver (SO_TIMESTAMPNS): how long the receiver waits for a processor
# does not count, nor does the sender wait for one, if it may say so. argv: rate, seconds.
_SENDER: Final = """
import array, os, select, socket, struct, sys, time
SO_RCVBUFFORCE, SO_TIMESTAMPNS, SO_MEMINFO = 33, 35, 55
rate, most = float(sys.argv[1]), float(sys.argv[2])
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
receiver.bind(("127.0.0.1", 11000))
receiver.settimeout(3)
told, tell = os.pipe()
def receive():
    waits, got, parts = array.array("d"), bytearray(int(most * rate) + 1000), {}
    while True:
        try:
            data, control, _, _ = receiver.recvmsg(64, 64)
        except TimeoutError:
            # While numbers are sent, they may wait in the queue for longer than that.
            if select.select([told], [], [], 0)[0]:
                break
            continue
        number, sent, of = struct.unpack("!QdI", data)
        seconds, nanoseconds = struct.unpack("qq", control[0][2])
        wait = seconds + nanoseconds / 1e9 - sent
        waits.append(wait)
        got[number] = 1
        if wait > parts.get(of, 0):
            parts[of] = wait
    waits = sorted(waits)
    times = waits[-1], waits[len(waits) * 99 // 100], *(parts[of] for of in sorted(parts))
    # SK_MEMINFO_DROPS (linux/sock_diag.h)
    full = struct.unpack("9I", receiver.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[8]
    print(os.read(told, 64).decode(), sum(got), full, *(seconds * 1000 for seconds in times))
child = os.fork()
if child == 0:
    os.close(tell)
    receive()
    sys.exit()
try:
    os.nice(-20)
except OSError:
    pass
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.connect(("127.0.0.1", 11000))
print("sending", flush=True)
began = time.monotonic()
number = part = 0
# On a quick machine the end may be asked for at once.
ends = False
while time.monotonic() - began < most and not (ends and number >= 160):
    if not ends and select.select([0], [], [], 0)[0]:
        lines = os.read(0, 1024)
        ends = not lines
        part += lines.count(b"\\n")
    for _ in range(16):
        end.send(struct.pack("!QdI", number, time.time(), part))
        number += 1
    ahead = number / rate - (time.monotonic() - began)
    if ahead > 0:
        time.sleep(ahead)
os.write(tell, str(number).encode())
os.close(tell)
os.waitpid(child, 0)
"""


class Host(Protocol):
    """Where processes are started: a namespace, or a booted host."""

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command."""


class Flow(NamedTuple):
    """sent, arrived: datagrams. full: those that found no room in the receiver's buffer. worst, most: the longest time on the way
    and its 99th percentile, in milliseconds. divided: the longest of each part."""

    sent: int
    arrived: int
    full: int
    worst: float
    most: float
    divided: tuple[float, ...] = ()

    @property
    def lost(self) -> int:
        """Those that did not come as far as the receiver."""
        return self.sent - self.arrived - self.full


class Numbered:
    """A flow of numbered datagrams to port 11000, and what happened to it."""

    def __init__(self, host: Host, rate: int, python: str = PYTHON, seconds: float = 120) -> None:
        """seconds: after which it ends by itself."""
        words = (python, "-c", _SENDER, str(rate), str(seconds))
        self._process = host.start(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "sending\n"

    def divide(self) -> None:
        """What is sent from now on is another part."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> Flow:
        """Send no more, and wait for what is on its way."""
        output, _ = self._process.communicate(timeout=PATIENCE)
        sent, arrived, full, worst, most, *divided = output.split()
        return Flow(int(sent), int(arrived), int(full), float(worst), float(most), tuple(map(float, divided)))


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


# Sends back what it gets, on any number of connections, until its standard input ends. argv: port.
_ECHO: Final = """
import asyncio, sys
async def echo(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()
async def main():
    server = await asyncio.start_server(echo, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    print("listening", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()
asyncio.run(main())
"""
# Keeps COUNT connections that exchange a line each PAUSE seconds, opens a new one each 5 ms that exchanges one line, until its
# standard input ends, SECONDS at most. Prints how many of the first are unbroken, how many of the second there were, how many
# failed, and the longest exchange in milliseconds. argv: port, count, pause, seconds.
_CLIENTS: Final = """
import asyncio, sys, time
port, count, pause, most = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
over = False
longest = 0.0
async def exchange(reader, writer):
    global longest
    began = time.monotonic()
    line = b"%r\\n" % began
    writer.write(line)
    if await asyncio.wait_for(reader.readline(), 60) != line:
        raise ConnectionError("another answer")
    longest = max(longest, time.monotonic() - began)
async def lasting():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not over:
        await exchange(reader, writer)
        await asyncio.sleep(pause)
    writer.close()
async def short():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await exchange(reader, writer)
    writer.close()
async def main():
    global over
    first = [asyncio.create_task(lasting()) for _ in range(count)]
    second = []
    print("talking", flush=True)
    end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    began = time.monotonic()
    while not end.done() and time.monotonic() - began < most:
        second.append(asyncio.create_task(short()))
        await asyncio.sleep(0.005)
    over = True
    results = await asyncio.gather(*first, return_exceptions=True)
    others = await asyncio.gather(*second, return_exceptions=True)
    for each in [each for each in results + others if each is not None][:5]:
        print(repr(each), file=sys.stderr)
    print(sum(each is None for each in results), len(others), sum(each is not None for each in others), longest * 1000)
asyncio.run(main())
"""


class Talk(NamedTuple):
    """unbroken: connections that lasted. others: short connections, failed: of these. longest: exchange, in milliseconds."""

    unbroken: int
    others: int
    failed: int
    longest: float


class Connections:
    """Connections that last, and short ones, to an echoing server in the namespace."""

    def __init__(
        self, host: Host, port: int, count: int, python: str = PYTHON, pause: float = 0.02, seconds: float = 120
    ) -> None:
        """pause: between two exchanges of one that lasts. seconds: after which no new ones are opened, and all end."""
        self._server = host.start(python, "-c", _ECHO, str(port), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "listening\n"
        words = (python, "-c", _CLIENTS, str(port), str(count), str(pause), str(seconds))
        self._process = host.start(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "talking\n"

    def end(self) -> Talk:
        """Open no more, and close those that last."""
        output, _ = self._process.communicate(timeout=PATIENCE)
        self._server.communicate(timeout=PATIENCE)
        unbroken, others, failed, longest = output.split()
        return Talk(int(unbroken), int(others), int(failed), float(longest))
