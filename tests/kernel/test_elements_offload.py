"""Offload: the marks, the rules, and flows that leave the queue and are taken back, in a kernel with a real agent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import PATIENCE, Namespace
from offloading import CONFIG

from nfq_agent.mark import Mark, kept

A, B = "192.0.2.1:40000", "198.51.100.7:443"


# In a kernel.

HOSTS = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


def connections(netns: Namespace, host: str, port: int) -> list[int]:
    """The connection marks of the established connections to a port."""
    family = "ipv6" if ":" in host else "ipv4"
    listing = netns.run("conntrack", "-L", "-f", family, "-p", "tcp", "--dport", str(port), check=False).stdout
    return [int(mark) for mark in re.findall(r"ESTABLISHED.* mark=(\d+)", listing)]


class Client:
    """A connection to an echo server, both in the namespace, driven line by line."""

    CODE = (
        "import socket, sys\n"
        "connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)\n"
        "print('connected', flush=True)\n"
        "for line in sys.stdin:\n"
        "    size, seconds = line.split()\n"
        "    connection.settimeout(float(seconds))\n"
        "    data = b'x' * int(size)\n"
        "    try:\n"
        "        connection.sendall(data)\n"
        "        got = 0\n"
        "        while got < len(data): got += len(connection.recv(1 << 20))\n"
        "        print('echoed', flush=True)\n"
        "    except TimeoutError:\n"
        "        print('silence', flush=True)\n"
        "        connection.settimeout(20)\n"
    )

    def __init__(self, netns: Namespace, host: str, port: int) -> None:
        pipe = subprocess.PIPE
        self.process = netns.start(sys.executable, "-c", self.CODE, host, str(port), stdin=pipe, stdout=pipe)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"connected\n"

    def echo(self, size: int, seconds: float = 60) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"%d %f\n" % (size, seconds))
        self.process.stdin.flush()
        return bool(self.process.stdout.readline() == b"echoed\n")


SERVER = Path(__file__).parent.parent / "support" / "tcp_server.py"


def serve(netns: Namespace, host: str, port: int) -> None:
    server = netns.start(sys.executable, str(SERVER), "echo", host, str(port), stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline()


@pytest.mark.kernel
@HOSTS
def test_a_flow_leaves_the_queue_and_marks_of_others_stay(netns: Namespace, tmp_path: Path, host: str) -> None:
    tables = "ip6tables-legacy" if ":" in host else "iptables-legacy"
    netns.shell(
        f"{tables} -t mangle -A PREROUTING -j CONNMARK --set-xmark 0x5/0xff\n"
        f"{tables} -t mangle -A OUTPUT -p tcp --dport 8080 -j MARK --set-xmark 0x700/0xff00\n"
        f"{tables} -t mangle -A POSTROUTING -p tcp --dport 8080 -m mark --mark 0x700/0xff00\n"
        f"{tables} -t mangle -A POSTROUTING -p tcp --dport 8080 -m mark ! --mark 0x700/0xff00"
    )
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="9", queue="", rule="")).ready()
    client = Client(netns, host, 8080)
    assert client.echo(5_000_000)
    (mark,) = connections(netns, host, 8080)
    assert mark == 0x4E000005
    seen = agent.totals("q")
    # The SYN alone: it decides for both directions.
    assert seen["received"] == seen["accepted"] == 1
    assert seen["marked"] == 1
    offloaded = agent.status()["offloaded"]
    # On loopback the SYN comes in with the mark that it went out with.
    assert offloaded["decided"] == 2
    assert offloaded["accepted"] > 10
    assert offloaded["denied"] == 0
    assert "2 packets with a verdict for their flow" in agent.verb("status").stdout
    listing = netns.run(tables, "-t", "mangle", "-nvxL", "POSTROUTING").stdout.splitlines()[2:]
    marked, unmarked = (int(line.split()[0]) for line in listing)
    assert marked > 10
    assert unmarked == 0
    assert agent.stop() == 0
    assert client.echo(1000)


@pytest.mark.kernel
@HOSTS
@pytest.mark.parametrize("hook", ["prerouting", "input"])
def test_a_flow_from_elsewhere(pair: tuple[Namespace, Namespace], tmp_path: Path, host: str, hook: str) -> None:
    server, client = pair
    there = "fd00:203::1" if ":" in host else "10.203.0.1"
    serve(server, there, 8080)
    serve(server, there, 8081)
    agent = Agent(server, tmp_path, CONFIG.format(denied="8081", queue="", rule=f'hooks = ["{hook}"]\nrole = "server"')).ready()
    assert Client(client, there, 8080).echo(2_000_000)
    assert connections(server, there, 8080) == [0x4E000000]
    assert agent.totals("q")["received"] == 1
    assert client.run("nc", "-z", "-w", "1", there, "8081", check=False).returncode != 0
    assert agent.status()["offloaded"]["denied"] >= 1
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_a_policy_that_turns_takes_its_flows_back(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="9", queue="", rule="")).ready()
    client = Client(netns, host, 8080)
    assert client.echo(1000)
    agent.configure(CONFIG.format(denied="8080", queue="", rule=""))
    agent.verb("reload")
    assert not client.echo(1000, 1.5)
    assert connections(netns, host, 8080) == [kept(Mark(0x4E000000, 0xFF000000), 1).deny.value]
    assert agent.status()["offloaded"]["denied"] >= 1
    # Denied in the kernel: what is sent again does not come to the queue.
    assert agent.totals("q")["received"] - agent.totals("q")["dropped"] <= 1
    agent.configure(CONFIG.format(denied="9", queue="", rule=""))
    agent.verb("reload")
    # Packets that were held up are sent again by TCP: the later, the longer nothing came through.
    assert client.echo(1000, PATIENCE)
    assert connections(netns, host, 8080) == [kept(Mark(0x4E000000, 0xFF000000), 2).accept.value]
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_denied_from_the_first_packet(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8081)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="8081", queue="", rule="")).ready()
    refused = netns.run("nc", "-z", "-w", "2", host, "8081", check=False)
    assert refused.returncode != 0
    seen = agent.totals("q")
    assert seen["dropped"] == seen["received"] >= 1
    assert connections(netns, host, 8081) == []
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_monitor_mode_denies_nothing(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="8080", queue='mode = "monitor"', rule="")).ready()
    client = Client(netns, host, 8080)
    assert client.echo(1000)
    until(lambda: "would drop" in agent.log, "a would-be drop is said")
    # Replies go to the client's port, which the rule does not name: accepted, and still every packet to 8080 is counted.
    before = agent.totals("q")["would_drop"]
    assert before >= 4
    for _ in range(5):
        assert client.echo(1000)
    assert agent.totals("q")["would_drop"] >= before + 10
    assert agent.status()["offloaded"]["decided"] == 0
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_packets_without_a_connection_are_judged_one_by_one(netns: Namespace, tmp_path: Path, host: str) -> None:
    tables = "ip6tables-legacy" if ":" in host else "iptables-legacy"
    for hook in ("PREROUTING", "OUTPUT"):
        netns.run(tables, "-t", "raw", "-A", hook, "-p", "tcp", "-j", "CT", "--notrack")
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="8081", queue="", rule="")).ready()
    assert Client(netns, host, 8080).echo(1000)
    until(lambda: "belongs to no tracked connection" in agent.log, "it says so")
    assert agent.totals("q")["received"] > 6
    assert netns.run("nc", "-z", "-w", "1", host, "8081", check=False).returncode != 0
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_a_foreign_rule_that_clears_our_mark_makes_no_packet_loop(netns: Namespace, tmp_path: Path, host: str) -> None:
    tables = "ip6tables-legacy" if ":" in host else "iptables-legacy"
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="9", queue="", rule="")).ready()
    # As VPN tools have it: the connection's mark, which is still 0, takes the place of the packet's.
    for hook in ("PREROUTING", "OUTPUT"):
        netns.run(tables, "-w", "-t", "mangle", "-I", hook, "-j", "CONNMARK", "--restore-mark")
    client = Client(netns, host, 8080)
    assert client.echo(1000)
    assert agent.totals("q")["repeated"] == 0
    assert agent.totals("q")["received"] < 2000
    doctor = agent.verb("doctor", check=False).stdout
    assert f"{tables} -t mangle -A OUTPUT -j CONNMARK --restore-mark" in " ".join(doctor.split())
    until(lambda: "rewrites the bits 0xff000000" in agent.log, "the log names the rule")
    assert f"this rule stands before ours: {tables} -t mangle -A OUTPUT -j CONNMARK --restore-mark" in agent.log
    assert agent.log.count("restore-mark") == 1
    assert agent.totals("q")["unmarked"] > 0
    assert agent.stop() == 0


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_the_log_names_the_rule_that_clears_our_mark(netns: Namespace, tmp_path: Path, backend: str) -> None:
    serve(netns, "127.0.0.1", 8080)
    config = CONFIG.format(denied="9", queue="", rule='hooks = ["prerouting"]') + f'[agent]\nbackend = "{backend}"\n'
    agent = Agent(netns, tmp_path, config).ready()
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-I", "PREROUTING", "-j", "CONNMARK", "--restore-mark")
    client = Client(netns, "127.0.0.1", 8080)
    assert client.echo(1000)
    if backend == "legacy":
        until(lambda: "-t mangle -A PREROUTING -j CONNMARK --restore-mark" in agent.log, "the log names the rule")
        assert client.echo(1000)
        assert agent.log.count("came back") == 1
    else:
        # REPEAT asks our table again, and no other one.
        assert agent.totals("q")["unmarked"] == 0
        assert agent.status()["offloaded"]["decided"] > 0
    assert agent.stop() == 0


LOOPER = """
from itertools import count

from nfq_agent import REPEAT, Action, Needs, PacketElement, Verdict

NUMBERS = count(1)


def numbered(payload):
    return payload[:4] + (next(NUMBERS) & 0xFFFF).to_bytes(2, "big") + payload[6:]


class Looper(PacketElement):
    needs = Needs.{needs}
    rewrites = {rewrites}
    pure = {pure}

    def decide(self, packet, flow):
        return {answer}
"""
# The last one changes the number of the packet each time (RFC 791 3.1), so that it never comes back with the same bytes.
LOOPERS = {
    "repeat": {"answer": "REPEAT"},
    "repeat-pure": {"answer": "REPEAT", "pure": "True"},
    "queue": {"answer": "Verdict(Action.QUEUE, queue=9)"},
    "queue-pure": {"answer": "Verdict(Action.QUEUE, queue=9)", "pure": "True"},
    "rewritten": {
        "needs": "PAYLOAD",
        "rewrites": "True",
        "answer": "Verdict(Action.REPEAT, payload=numbered(packet.payload))",
    },
}


@pytest.mark.kernel
@pytest.mark.parametrize("kind", LOOPERS)
def test_an_element_that_always_answers_repeat_gets_on_error(netns: Namespace, tmp_path: Path, kind: str) -> None:
    elements = tmp_path / "elements"
    elements.mkdir()
    values = {"needs": "HEADERS", "rewrites": "False", "pure": "False", **LOOPERS[kind]}
    (elements / "looper.py").write_text(LOOPER.format(**values))
    serve(netns, "127.0.0.1", 8080)
    config = '[queue.q]\nnum = 9\nelements = ["looper:Looper"]\n[rules.r]\nqueue = "q"\ntcp_ports = [8080]\n'
    agent = Agent(netns, tmp_path, config).ready()
    assert Client(netns, "127.0.0.1", 8080).echo(1000)
    until(lambda: "gets the verdict ACCEPT instead" in agent.log, "the log says what it gets")
    assert agent.stop() == 0


NAMED = """
[queue.q]
num = 110
elements = ["dpi", "allow", "offload"]
[element.allow]
type = "policy"
default = "drop"
rule = [{ action = "accept", http_host = ["*.good.test"] }]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.r]
queue = "q"
tcp_ports = [8080]
"""
# Requests from one source port, each on a connection of its own that is ended by a reset; what comes back of each.
ONE_PORT = """
import socket, struct, sys
for host in sys.argv[2:]:
    connection = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.bind((sys.argv[1], 40000))
    connection.connect((sys.argv[1], 8080))
    connection.settimeout(60)
    connection.sendall(b"GET / HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n" % host.encode())
    print(len(connection.recv(1 << 16)), flush=True)
    connection.close()
"""


@pytest.mark.kernel
@HOSTS
def test_a_new_connection_on_the_ends_of_an_accepted_one_is_judged(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, NAMED).ready()
    client = netns.start(
        sys.executable, "-c", ONE_PORT, host, "www.good.test", "a.good.test", "www.bad.test", stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert [int(client.stdout.readline()) > 0 for _ in range(2)] == [True, True]
    until(lambda: agent.status()["offloaded"]["denied"] >= 1, "the third is denied")
    assert agent.totals("q")["marked"] >= 3
    client.kill()
    # Nothing came back of the third.
    assert client.stdout.read() == b""
    assert agent.stop() == 0
