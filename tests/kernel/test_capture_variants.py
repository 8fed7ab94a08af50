"""Taps, inline links and the hybrid with fragments, IPv6, UDP segments, jumbo frames, and programs of others in front."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
from agent import Agent, until
from containers import Container, bridged
from inlined import inline_of
from namespace import Namespace

from nfq_agent.host import bpf

HYBRID = Path(__file__).parent.parent / "configs" / "hybrid.toml"
# Denies port 9 of both protocols. Datagrams to 7 and 9.
WATCH = """
[tap.pods]
interfaces = ["veth1"]
udp_ports = [7, 9]
elements = ["verdicts"]
[element.verdicts]
type = "policy"
default = "accept"
rule = [ { action = "drop", dport = 9 } ]
"""
JUDGE = WATCH.replace("[tap.pods]", "[inline.pods]")
# Prints the sizes of datagrams to the ports in argv, a line each.
SINK = """
import select, socket, sys
ends = []
for port in sys.argv[1:]:
    end = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    end.bind(("::", int(port)))
    ends.append(end)
print("ready", flush=True)
while True:
    for end in select.select(ends, [], [])[0]:
        print(end.getsockname()[1], len(end.recv(65536)), flush=True)
"""
# Sends SIZE bytes to ADDRESS and PORT, in datagrams of SEGMENT bytes that the kernel cuts (UDP_SEGMENT), or in one.
SEND = """
import socket, sys
address, port, size, segment = sys.argv[1], *map(int, sys.argv[2:])
end = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
if segment: end.setsockopt(17, 103, segment)
end.sendto(bytes(size), (address, port))
"""


class Sink:
    """Datagrams that arrive in a container at the ports 7 and 9."""

    def __init__(self, container: Container) -> None:
        self._process: Popen[Any] = container.start(sys.executable, "-c", SINK, "7", "9", stdout=PIPE, text=True)
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        assert self._lines.readline() == "ready\n"

    def got(self, number: int) -> list[tuple[int, int]]:
        """The next datagrams: port and size."""
        return [tuple(map(int, self._lines.readline().split())) for _ in range(number)]  # type: ignore[misc]  # two words


def send(container: Container, address: str, port: int, size: int, segment: int = 0) -> None:
    container.run(sys.executable, "-c", SEND, address, str(port), str(size), str(segment))


def watched(agent: Agent) -> dict[str, int]:
    """The counters of the tap's only interface."""
    (tap,) = agent.status()["taps"]
    (found,) = tap["interfaces"]
    return dict(found["counters"])


ADDRESSES = pytest.mark.parametrize("address", ["10.5.0.2", "fd05::2"])


@ADDRESSES
def test_a_tap_sees_the_first_fragment_and_counts_the_others(netns: Namespace, tmp_path: Path, address: str) -> None:
    first, second = bridged(netns)
    sink = Sink(second)
    agent = Agent(netns, tmp_path, WATCH).ready()
    send(first, address, 9, 4000)
    # Two of the three fragments have no ports.
    until(lambda: watched(agent)["fragments"] == 2, "the later fragments are counted")
    assert (watched(agent)["judged"], watched(agent)["would_drop"]) == (1, 1)
    assert sink.got(1) == [(9, 4000)]
    assert agent.stop() == 0


@ADDRESSES
def test_a_tap_sees_datagrams_that_are_not_cut_yet(netns: Namespace, tmp_path: Path, address: str) -> None:
    first, second = bridged(netns)
    sink = Sink(second)
    agent = Agent(netns, tmp_path, WATCH).ready()
    send(first, address, 9, 12_000, 1200)
    until(lambda: watched(agent)["would_drop"] > 0, "it is seen")
    assert sink.got(10) == [(9, 1200)] * 10
    counts = watched(agent)
    assert (counts["unreadable"], counts["lost"], counts["fragments"]) == (0, 0, 0)
    assert counts["judged"] == counts["would_drop"]
    assert agent.stop() == 0


@ADDRESSES
def test_an_inline_link_judges_a_datagram_by_its_first_fragment(netns: Namespace, tmp_path: Path, address: str) -> None:
    first, second = bridged(netns)
    sink = Sink(second)
    agent = Agent(netns, tmp_path, JUDGE).ready()
    send(first, address, 9, 4000)
    send(first, address, 7, 4000)
    # The denied one lacks its first fragment; the other one is whole.
    assert sink.got(1) == [(7, 4000)]
    until(lambda: inline_of(agent)["past_fragments"] == 4, "the later fragments are counted")
    assert (inline_of(agent)["judged"], inline_of(agent)["dropped"]) == (2, 1)
    assert agent.stop() == 0


@ADDRESSES
def test_an_inline_link_judges_datagrams_that_are_not_cut_yet(netns: Namespace, tmp_path: Path, address: str) -> None:
    first, second = bridged(netns)
    sink = Sink(second)
    agent = Agent(netns, tmp_path, JUDGE).ready()
    send(first, address, 9, 12_000, 1200)
    send(first, address, 7, 12_000, 1200)
    assert sink.got(10) == [(7, 1200)] * 10
    assert inline_of(agent)["dropped"] > 0
    assert agent.stop() == 0
    send(first, address, 9, 12_000, 1200)
    assert sink.got(10) == [(9, 1200)] * 10


def _load_next() -> int:
    """A program that leaves every packet to the next one (TCX_NEXT)."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    return bpf._load_program("other", code)  # noqa: SLF001  # a foreign one


def test_programs_in_front_of_ours_and_behind_change_nothing(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    sink = Sink(second)
    ready, enough = os.pipe(), os.pipe()

    def others() -> None:
        index = socket.if_nametoindex("veth1")
        links = [bpf.attach(_load_next(), index, side) for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS)]
        os.write(ready[1], b"x")
        os.read(enough[0], 1)
        for link in links:
            os.close(link)

    # In front: attached before all others, as ours is, and later. Behind: attached first.
    agent = Agent(netns, tmp_path, JUDGE).ready()
    child = os.fork()
    if child == 0:
        try:
            netns.enter()
            others()
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    until(lambda: inline_of(agent)["hidden"] == 1, "it is noticed")
    for place in ("in front", "behind"):
        send(first, "10.5.0.2", 9, 100)
        send(first, "10.5.0.2", 7, 100)
        assert sink.got(1) == [(7, 100)], place
        assert (inline_of(agent)["judged"], inline_of(agent)["dropped"]) == (2, 1), place
        assert agent.stop() == 0
        if place == "in front":
            agent.start()
            agent.ready()
    os.write(enough[1], b"x")
    os.waitpid(child, 0)


def test_the_hybrid_over_ipv6_and_jumbo_frames(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables; echo 1 >/proc/sys/net/bridge/bridge-nf-call-ip6tables")
    first, second = bridged(netns, mtu=9000)
    second.serve(4_000_000)
    agent = Agent(netns, tmp_path, HYBRID.read_text()).ready()
    for port in (8080, 9090):
        whole = first.run("curl", "-s", "-m", "30", "-H", "Host: www.free.test", f"http://[fd05::2]:{port}/").stdout
        assert whole == "0123456789abcdef" * 250_000
        assert first.get("fd05::2", "www.blocked.test", port=port, seconds=1.5) == "000"
    status = agent.status()
    assert sum(worker["dropped"] for queue in status["queues"] for worker in queue["workers"]) > 0
    assert status["inlines"][0]["counters"]["dropped"] > 0
    assert agent.stop() == 0
