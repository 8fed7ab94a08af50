"""Established connections under a name policy: nothing that happens to the agent cuts them, or lets a denied one pass."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from agent import Agent, until
from clock import moved_clock
from namespace import Namespace
from openings import client_hello

pytestmark = pytest.mark.kernel

CONFIG = """
{log}
[queue.egress]
num = 110
elements = [{elements}]
{queue}

[element.allow]
type = "policy"
default = "drop"
undecided = "accept"
rule = [ {{ action = "accept", tls_sni = [{names}] }}, {{ action = "accept", http_host = ["*.good.test"] }} ]

[element.offload]
mark = "0x4e000000/0xff000000"

[rules.egress]
queue = "egress"
hooks = {hooks}
tcp_ports = [4440]
role = "{role}"
"""
PORT = 4440
# A TLS record of application data: nothing of it says a name.
DATA = b"\x17\x03\x03\x00\x20" + bytes(range(32))
ADDRESSES = {4: "127.0.0.1", 6: "::1"}
OUTWARD = {"hooks": '["output"]', "role": "client"}
BOTH = {"hooks": '["input", "output"]', "role": "both"}

# An echo that says how many bytes it has got of each connection.
ECHO = Path(__file__).parent.parent / "support" / "tcp_server.py"
CLIENT = """
import socket, sys
host, port = sys.argv[1:]
connection = socket.create_connection((host, int(port)), timeout=60)
print("connected", flush=True)
for line in sys.stdin:
    data, seconds = line.split()
    data = bytes.fromhex(data)
    connection.settimeout(float(seconds))
    try:
        connection.sendall(data)
        got = b""
        while len(got) < len(data):
            more = connection.recv(65536)
            if not more:
                break
            got += more
        print("echoed" if got == data else "closed", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def config(**values: str) -> str:
    """The configuration, with what a test changes."""
    defaults = {"log": "", "elements": '"dpi", "allow"', "queue": "", "names": '"*.good.test"', **OUTWARD}
    return CONFIG.format(**{**defaults, **values})


class Client:
    """A connection to the echo, which says one thing at a time."""

    def __init__(self, netns: Namespace, address: str) -> None:
        pipe = subprocess.PIPE
        self.process = netns.start(sys.executable, "-c", CLIENT, address, str(PORT), stdin=pipe, stdout=pipe)
        assert self.line() == "connected"

    def line(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline().decode().strip())

    def say(self, data: bytes, seconds: float = 60) -> str:
        """ "echoed", or how it failed. seconds: for each answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{data.hex()} {seconds}\n".encode())
        self.process.stdin.flush()
        return self.line()


def serve(netns: Namespace, *addresses: str) -> None:
    """The echo."""
    for address in addresses or ADDRESSES.values():
        server = netns.start(sys.executable, str(ECHO), "echo", address, str(PORT), stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline()


def opened(netns: Namespace, address: str, name: str = "www.good.test", agent: Agent | None = None) -> Client:
    """An allowed connection whose name was judged."""
    client = Client(netns, address)
    assert client.say(client_hello(name)) == "echoed", agent and agent.log
    assert client.say(DATA) == "echoed"
    return client


def settle(agent: Agent) -> None:
    """Wait until nothing more comes, as delayed acknowledgements do."""
    counts = [-1]

    def still() -> bool:
        time.sleep(0.2)
        counts.append(agent.totals("egress")["received"])
        return counts[-1] == counts[-2]

    until(still, "nothing more comes")


def kill_the_worker(agent: Agent) -> None:
    (pid,) = agent.workers()
    os.kill(pid, signal.SIGKILL)
    until(lambda: "serves again" in agent.log, "another worker serves")


def reload(agent: Agent, values: dict[str, str], **changed: str) -> None:
    agent.configure(config(**{**values, **changed}))
    agent.verb("reload")


def restart(agent: Agent) -> None:
    assert agent.stop() == 0
    agent.start()
    agent.ready()


def crash(agent: Agent) -> None:
    agent.kill()
    agent.start()
    agent.ready()


DROP = 'midstream = "drop"'
Event = Callable[[Agent, dict[str, str]], None]
EVENTS: dict[str, Event] = {
    "worker-killed": lambda agent, _: kill_the_worker(agent),
    "max-len": lambda agent, values: reload(agent, values, queue=f"max_len = 5000\n{DROP}"),
    "log-level": lambda agent, values: reload(agent, values, log='[log]\nlevel = "debug"'),
    "element-added": lambda agent, values: reload(agent, values, elements=values["elements"] + ', "log"'),
    "name-added": lambda agent, values: reload(agent, values, names='"*.good.test", "one.more.test"'),
    "restart": lambda agent, _: restart(agent),
    "crash": lambda agent, _: crash(agent),
}
CHAINS = {"dpi": '"dpi", "allow"', "offload": '"dpi", "allow", "offload"'}


@pytest.mark.parametrize(
    ("chain", "family", "where"), [("dpi", 4, OUTWARD), ("offload", 6, BOTH)], ids=["dpi-4-out", "offload-6-both"]
)
@pytest.mark.parametrize("event", EVENTS)
def test_an_allowed_connection_continues(
    netns: Namespace, tmp_path: Path, event: str, chain: str, family: int, where: dict[str, str]
) -> None:
    # With midstream = "drop" nothing passes but what is known.
    serve(netns, ADDRESSES[family])
    values = {"elements": CHAINS[chain], "queue": DROP, **where}
    agent = Agent(netns, tmp_path, config(**values)).ready()
    client = opened(netns, ADDRESSES[family], agent=agent)
    EVENTS[event](agent, values)
    assert client.say(DATA) == "echoed", agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize("event", ["worker-killed", "log-level", "name-added"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_denied_connection_stays_denied(netns: Namespace, tmp_path: Path, family: int, event: str) -> None:
    """The part of a split hello that showed the name is sent again by TCP: it has no beginning that could be read."""
    serve(netns, ADDRESSES[family])
    values: dict[str, str] = {}
    agent = Agent(netns, tmp_path, config(**values)).ready()
    hello = client_hello("www.evil.test")
    client = Client(netns, ADDRESSES[family])
    assert client.say(hello[:60]) == "echoed"
    assert client.say(hello[60:], 0.3) == "TimeoutError", agent.log
    EVENTS[event](agent, values)
    assert client.say(DATA, 1) == "TimeoutError", agent.log
    assert agent.stop() == 0


def test_a_name_that_is_taken_off_the_list_ends_its_connection(netns: Namespace, tmp_path: Path) -> None:
    serve(netns, ADDRESSES[4])
    agent = Agent(netns, tmp_path, config()).ready()
    client = opened(netns, ADDRESSES[4], agent=agent)
    reload(agent, {}, names='"*.other.test"')
    assert client.say(DATA, 1) == "TimeoutError", agent.log
    reload(agent, {})
    # TCP sends it again.
    assert client.say(DATA) in ("echoed", "closed"), agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize("chain", CHAINS)
def test_a_connection_is_silent_for_310_seconds(netns: Namespace, tmp_path: Path, chain: str) -> None:
    serve(netns, ADDRESSES[4])
    environment, offset = moved_clock(tmp_path)
    agent = Agent(netns, tmp_path, config(queue=DROP, elements=CHAINS[chain]), **environment).ready()
    client = opened(netns, ADDRESSES[4], agent=agent)
    settle(agent)
    moved = count(1)

    def forgotten() -> bool:
        # A busy worker may see the last packet of the connection after the clock was moved.
        with offset.open("r+b") as file:
            file.write(struct.pack("d", 310.0 * next(moved)))
        # A new flow makes room; a worker that waits for packets looks at the clock at its next turn.
        opened(netns, ADDRESSES[4], agent=agent)
        return chain != "dpi" or agent.totals("egress")["flows_evicted"] >= 1

    until(forgotten, "the silent connection is forgotten")
    assert client.say(DATA) == "echoed", agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize(("family", "where"), [(4, OUTWARD), (6, BOTH)], ids=["4-out", "6-both"])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_connection_that_says_nothing_for_310_seconds_is_judged(
    netns: Namespace, tmp_path: Path, chain: str, family: int, where: dict[str, str]
) -> None:
    """It is not taken for one that began before the agent, which may say what it likes."""
    serve(netns, ADDRESSES[family])
    environment, offset = moved_clock(tmp_path)
    agent = Agent(netns, tmp_path, config(elements=CHAINS[chain], **where), **environment).ready()
    clients = [Client(netns, ADDRESSES[family]) for _ in range(3)]
    moved = count(1)

    def forgotten() -> bool:
        # A busy worker may see the last packet of a connection after the clock was moved.
        with offset.open("r+b") as file:
            file.write(struct.pack("d", 310.0 * next(moved)))
        # Each new flow makes room of two, the oldest.
        opened(netns, ADDRESSES[family], agent=agent)
        return bool(agent.totals("egress")["flows_evicted"] >= len(clients))

    until(forgotten, "the silent connections are forgotten")
    for client, data in zip(clients, (DATA, ODD), strict=False):
        assert client.say(data, 1) == "TimeoutError", agent.log
    assert clients[2].say(GOOD) == "echoed", agent.log
    assert agent.stop() == 0


def spoof(count: int, done: str) -> int:
    """SYNs from as many addresses until there is a file; how many were sent."""
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    tcp = struct.pack("!HHIIBBHHH", 1, PORT, 1, 0, 5 << 4, 2, 512, 0, 0)
    for number in range(count):
        source = struct.pack("!I", 0x0A000001 + number)
        raw.sendto(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, b"\x7f\0\0\1") + tcp, ("127.0.0.1", 0))
        if number % 512 == 0:
            # Slower than the worker, so that it sees them all.
            time.sleep(0.01)
            if os.path.exists(done):
                return number
    return count


def test_110_000_spoofed_syns(netns: Namespace, tmp_path: Path) -> None:
    serve(netns, ADDRESSES[4])
    agent = Agent(netns, tmp_path, config(queue=DROP)).ready()
    client = opened(netns, ADDRESSES[4], agent=agent)
    done = tmp_path / "done"
    flood = threading.Thread(target=lambda: netns.call(spoof, 110_000, str(done)))
    flood.start()
    try:
        # Each look is a process that takes its time from the worker.
        while flood.is_alive() and agent.totals("egress")["flows_evicted"] == 0:
            flood.join(1)
    finally:
        done.touch()
        flood.join()
    until(lambda: agent.totals("egress")["flows_evicted"] > 0, "the table was full")
    assert client.say(DATA) == "echoed", agent.log
    assert agent.stop() == 0


GOOD = b"GET /nothing HTTP/1.1\r\nHost: www.good.test\r\n\r\n"
EVIL = GOOD.replace(b"good", b"evil")
# As only some servers read it.
ODD = EVIL.replace(b"HTTP/1.1", b"HTTP/1.2")
JUDGED = {
    # For bytes that say nothing, for an allowed request, for a denied one.
    "accept": (True, True, False), "drop": (False, False, False), "judge": (False, True, False),
}  # fmt: skip


@pytest.mark.parametrize(("family", "where"), [(4, OUTWARD), (6, BOTH)], ids=["4-out", "6-both"])
@pytest.mark.parametrize("mode", JUDGED)
def test_a_connection_that_began_before_the_agent(
    netns: Namespace, tmp_path: Path, mode: str, family: int, where: dict[str, str]
) -> None:
    serve(netns, ADDRESSES[family])
    clients = [Client(netns, ADDRESSES[family]) for _ in JUDGED[mode]]
    agent = Agent(netns, tmp_path, config(queue=f'midstream = "{mode}"', **where)).ready()
    for client, data, passes in zip(clients, (DATA, GOOD, EVIL), JUDGED[mode], strict=True):
        assert (client.say(data, 60 if passes else 1) == "echoed") is passes, agent.log
    assert agent.stop() == 0
