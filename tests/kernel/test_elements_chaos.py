"""Chaos: its odds, and what real programs get to see of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agent import Agent
from namespace import Namespace
from pydantic import ValidationError

from nfq_agent.checksum import mend
from nfq_agent.element import Needs
from nfq_agent.elements.chaos import Chaos, ChaosOptions
from nfq_agent.testing import Bench, icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

SERVER = Path(__file__).parent.parent / "support" / "tcp_server.py"
HERE, THERE = "192.0.2.1:40000", "192.0.2.2:80"


def verdicts(count: int = 2000, **options: Any) -> list[Verdict]:
    bench = Bench("chaos", **{"seed": 1, **options})
    made = []
    for number in range(count):
        bench.now += 0.001
        made.append(bench.decide(udp(HERE, THERE, number.to_bytes(4, "big"))))
    return made


def test_the_odds_are_kept_and_a_seed_repeats_them() -> None:
    first = verdicts(drop=0.1)
    assert 150 < first.count(DROP) < 250
    assert first.count(ACCEPT) == 2000 - first.count(DROP)
    assert verdicts(drop=0.1) == first
    assert verdicts(drop=0.1, seed=2) != first
    assert set(verdicts()) == {ACCEPT}
    assert set(verdicts(drop=1.0)) == {DROP}


@pytest.mark.parametrize("checksum", ["keep", "mend"])
def test_one_bit_of_the_data_is_turned(checksum: str) -> None:
    bench = Bench("chaos", corrupt=1.0, checksum=checksum, seed=3)
    for packet in (tcp(HERE, THERE, b"data" * 9), udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"data")):
        verdict = bench.decide(packet)
        payload = verdict.payload
        assert payload is not None
        assert verdict.exact == (checksum == "keep")
        assert packet.headers.data is not None
        head, tail = packet.payload[: packet.headers.data], packet.payload[packet.headers.data :]
        assert payload[: len(head)] == head
        turned = int.from_bytes(payload[len(head) :], "big") ^ int.from_bytes(tail, "big")
        assert turned.bit_count() == 1
        assert mend(payload) != payload


def test_what_carries_no_data_is_not_corrupted() -> None:
    bench = Bench("chaos", corrupt=1.0)
    assert bench.decide(tcp(HERE, THERE)) is ACCEPT
    assert bench.decide(icmp("192.0.2.1", "192.0.2.2", b"ping")) is ACCEPT


def test_a_copy_is_not_copied_again() -> None:
    bench = Bench("chaos", duplicate=1.0)
    packet = udp(HERE, THERE, b"one")
    assert bench.decide(packet).inject == (packet.payload,)
    # The kernel gives an IPv4 packet from a raw socket another identification.
    seen = bytearray(packet.payload)
    seen[4:6] = b"\x12\x34"
    assert bench.decide(type(packet)(mend(bytes(seen)))) is ACCEPT
    assert bench.decide(udp(HERE, THERE, b"two")).inject


def test_delays_lie_about_the_middle_and_so_many_wait_at_most() -> None:
    made = verdicts(delay=1.0, delay_for="100ms", jitter="20ms", waiting=50)
    delays = [verdict.delay for verdict in made if verdict.delay]
    assert 0.08 <= min(delays) < 0.085
    assert 0.115 < max(delays) <= 0.12
    assert all(verdict.action is Action.ACCEPT for verdict in made)
    # 50 places, each taken for 0.1 s: half of the 1,000 packets a second.
    assert 900 < len(delays) < 1100
    assert len([v for v in verdicts(delay=1.0, delay_for="100ms", waiting=1000) if v.delay]) == 2000


def test_it_leaves_what_others_drop_and_keeps_flows_from_being_offloaded() -> None:
    drops = ("policy", {"default": "drop"})
    assert Bench("chaos", before=[drops], delay=1.0).decide(tcp(HERE, THERE)) is DROP
    accepts = ("policy", {"default": "accept"})
    chaos = ("chaos", {"drop": 0.0})
    assert Bench("offload", before=[accepts, chaos], mark="0x4e/0xff").decide(tcp(HERE, THERE)) is ACCEPT


def test_it_needs_what_it_does() -> None:
    assert Chaos.needs_of(ChaosOptions(drop=0.5, delay=0.5)) is Needs.METADATA
    assert Chaos.needs_of(ChaosOptions(corrupt=0.5)) is Needs.PAYLOAD
    assert not Chaos.rewrites_of(ChaosOptions(drop=0.5))
    assert Chaos.rewrites_of(ChaosOptions(corrupt=0.5))
    assert Chaos.injects_of(ChaosOptions(duplicate=0.5))


@pytest.mark.parametrize("options", [{"drop": 1.5}, {"delay_for": "5s"}, {"delay_for": "1s", "jitter": "2s"}, {"delay_for": 3}])
def test_what_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChaosOptions(**options)


# In a kernel: datagrams on loopback, on their way out.

CONFIG = """
[queue.main]
gso = false
elements = ["chaos"]
[element.chaos]
seed = 1
{options}
[rules.app]
queue = "main"
hooks = ["{hook}"]
udp_ports = [11000]
tcp_ports = [11000]
role = "{role}"
"""
HOSTS = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


def agent(netns: Namespace, folder: Path, options: str, hook: str = "output") -> Agent:
    role = "client" if hook == "output" else "server"
    return Agent(netns, folder, CONFIG.format(options=options, hook=hook, role=role)).ready()


def datagrams(host: str, count: int, quiet: float) -> list[tuple[float, bytes]]:
    """Send so many; what arrives until nothing does for `quiet` seconds, with the seconds since it was sent. Runs inside."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    receiver = socket.socket(family, socket.SOCK_DGRAM)
    receiver.bind((host, 11000))
    receiver.settimeout(quiet)
    sender = socket.socket(family, socket.SOCK_DGRAM)
    sent = []
    for number in range(count):
        sent.append(time.monotonic())
        sender.sendto(b"%06d" % number, (host, 11000))
    arrived: list[tuple[float, bytes]] = []
    while True:
        try:
            data = receiver.recv(100)
        except TimeoutError:
            return arrived
        number = int(data) if data.isdigit() and int(data) < count else 0
        arrived.append((time.monotonic() - sent[number], data))


@pytest.mark.kernel
@HOSTS
def test_drops(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, "drop = 0.5")
    arrived = netns.call(datagrams, host, 400, 1.0)
    assert 140 < len(arrived) < 260
    assert running.totals()["dropped"] == 400 - len(arrived)
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_delays_by_the_time_and_in_bounds(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, 'delay = 1.0\ndelay_for = "300ms"\nwaiting = 60')
    arrived = netns.call(datagrams, host, 100, 1.5)
    late = [seconds for seconds, _ in arrived if seconds > 0.29]
    assert len(arrived) == 100
    assert len(late) == 60
    assert max(late) < 1.0
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_what_waits_when_the_agent_stops_arrives(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, 'delay = 1.0\ndelay_for = "4s"')
    code = (
        "import socket, sys\n"
        "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "receiver = socket.socket(family, socket.SOCK_DGRAM)\n"
        "receiver.bind((sys.argv[1], 11000))\n"
        "receiver.settimeout(20)\n"
        "for number in range(20): receiver.sendto(b'%d' % number, (sys.argv[1], 11000))\n"
        "print('sent', flush=True)\n"
        "print(len([receiver.recv(9) for number in range(20)]), flush=True)\n"
    )
    client = netns.start(sys.executable, "-c", code, host, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"sent\n"
    begin = time.monotonic()
    assert running.stop() == 0
    assert client.stdout.readline() == b"20\n"
    assert time.monotonic() - begin < 3.5


@pytest.mark.kernel
@HOSTS
@pytest.mark.parametrize("hook", ["output", "input"])
def test_duplicates(netns: Namespace, tmp_path: Path, host: str, hook: str) -> None:
    running = agent(netns, tmp_path, "duplicate = 1.0", hook)
    arrived = sorted(data for _, data in netns.call(datagrams, host, 50, 1.0))
    assert arrived == sorted([b"%06d" % number for number in range(50)] * 2)
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_corruption_is_dropped_by_the_receiver_or_reaches_it(netns: Namespace, tmp_path: Path, host: str) -> None:
    running = agent(netns, tmp_path, "corrupt = 1.0")
    assert netns.call(datagrams, host, 20, 1.0) == []
    running.configure(CONFIG.format(options='corrupt = 1.0\nchecksum = "mend"', hook="output", role="client"))
    running.verb("reload")
    arrived = [data for _, data in netns.call(datagrams, host, 20, 1.0)]
    assert len(arrived) == 20
    assert all(data != b"%06d" % number for number, data in enumerate(arrived))
    assert running.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_tcp_gets_through_all_of_it(netns: Namespace, tmp_path: Path, host: str) -> None:
    netns.run("ip", "link", "set", "lo", "mtu", "1500")
    options = 'drop = 0.02\nduplicate = 0.05\ncorrupt = 0.02\ndelay = 0.05\ndelay_for = "20ms"\njitter = "10ms"'
    running = agent(netns, tmp_path, options)
    server = netns.start(
        sys.executable,
        str(Path(__file__).parent.parent / "support" / "tcp_server.py"),
        "echo",
        host,
        "11000",
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    server.stdout.readline()
    text = "".join(f"{number}\n" for number in range(50_000))
    assert netns.run("nc", "-N", host, "11000", input=text).stdout == text
    seen = running.totals()
    assert seen["dropped"] > 0
    assert seen["rewritten"] > 0
    assert running.stop() == 0
