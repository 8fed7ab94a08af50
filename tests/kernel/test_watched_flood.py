"""A flood of new flows beside all that watches: the worker judges all of it, at nearly the cost of a flood without watchers.

What the worker spends is compared within one run, by its processor time for packets that wait already: the load of the machine
changes neither figure.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
from agent import COMMAND, Agent, suspend, until
from namespace import PATIENCE, Namespace

from nfq_agent.testing import udp

CONFIG = """
[queue.main]
num = 7
max_len = 16384
mode = "monitor"
elements = [{elements}]
[rules.udp]
queue = "main"
udp_ports = [7000]
hooks = ["output"]
[element.names]
type = "policy"
default = "accept"
rule = [{{ action = "drop", name = "none", tls_sni = ["none.test"] }}]
[element.ports]
type = "policy"
rule = [{{ action = "drop", name = "telnet", dport = 23 }}]
[element.limit]
type = "rate-limit"
rate = "100000000/s"
"""
# Takes datagrams, so that none is answered by an ICMP error.
SINK = """
import socket, time
sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sink.bind(("127.0.0.1", 7000))
time.sleep(600)
"""
# More than a worker shows its watchers while it waits for more.
FLOWS = 6000
ROUNDS = 3


def spent(process: int) -> float:
    """Seconds of processor time of a process so far."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def waiting() -> int:
    """Packets that wait in the queue of this namespace."""
    return int(Path("/proc/net/netfilter/nfnetlink_queue").read_text().split()[2])


def clients(number: int) -> list[str]:
    """The clients of many flows, other ones for each number."""
    return [f"127.{number}.{flow >> 8}.{flow & 255}:{1024 + flow}" for flow in range(FLOWS)]


def flood(worker: int, senders: list[str]) -> tuple[int, float]:
    """A datagram of each of them, all of which wait before the worker reads them.

    Returns how many waited, and the worker's microseconds for each.
    """
    packets = [udp(client, "127.0.0.1:7000", b"hello").payload for client in senders]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        # A packet that waits for its verdict is in the sender's buffer still (SO_SNDBUFFORCE).
        raw.setsockopt(socket.SOL_SOCKET, 32, 1 << 27)
        suspend(worker)
        try:
            for packet in packets:
                raw.sendto(packet, ("127.0.0.1", 0))
            found, before = waiting(), spent(worker)
        finally:
            os.kill(worker, signal.SIGCONT)
        until(lambda: waiting() == 0, "no packet waits any more")
    return found, (spent(worker) - before) / FLOWS * 1e6


@contextmanager
def watchers(netns: Namespace, agent: Agent, folder: Path) -> Iterator[list[str]]:
    """All that watches. What `top` and `trace` print in the end is in the list then."""
    verbs = (
        ("top", "--json"),
        ("trace", "dport = 7000"),
        ("trace", "verdict = drop and name = none.test"),
        ("learn", "-o", str(folder / "proposal.toml")),
    )
    started = [
        netns.start(*COMMAND, verb, "--config", str(agent.config), *more, "--for", "600", stdout=PIPE, stderr=DEVNULL, text=True)
        for verb, *more in verbs
    ]
    said: list[str] = []
    try:
        yield said
    finally:
        for process in started:
            process.send_signal(signal.SIGINT)
        said += [process.communicate(timeout=PATIENCE)[0] for process in started]


@pytest.mark.parametrize("elements", ['"dpi", "names"', '"ports"', '"limit"', ""], ids=["flows", "pure", "compiled", "none"])
def test_watchers_leave_the_worker_to_its_packets(netns: Namespace, tmp_path: Path, elements: str) -> None:
    netns.start(sys.executable, "-c", SINK)
    agent = Agent(netns, tmp_path, CONFIG.format(elements=elements)).ready()
    (worker,) = agent.workers()
    numbers = itertools.count(1)

    def cost() -> float:
        found, microseconds = netns.call(flood, worker, clients(next(numbers)))
        assert found == FLOWS
        return float(microseconds)

    cost()
    alone = statistics.median(cost() for _ in range(ROUNDS))
    with watchers(netns, agent, tmp_path) as said:
        # The first answers are there then.
        agent.verb("trace", "dport = 1", "--for", "1")
        cost()
        watched = statistics.median(cost() for _ in range(ROUNDS))
        assert 'nfq_agent_up{agent="default"} 1.0' in agent.verb("metrics").stdout
        cost()
    print(f"{alone:.2f} us a packet without watchers, {watched:.2f} beside them")
    # Where the elements were shown all packets for the watchers it was 9 to 44 times as much.
    assert watched < 3 * alone
    shown = json.loads(said[0])
    assert shown["flows"]
    assert shown["unshown"] > 0
    counters = agent.totals()
    assert counters["received"] == FLOWS * (next(numbers) - 1)
    lost = {name: counters[name] for name in ("errors", "unanswered", "enobufs")}
    assert lost == dict.fromkeys(lost, 0)
    assert agent.stop() == 0


@pytest.mark.parametrize("elements", ['"ports"', '"limit"', ""], ids=["pure", "compiled", "none"])
def test_packets_that_are_not_looked_at_count_for_their_flow(netns: Namespace, tmp_path: Path, elements: str) -> None:
    netns.start(sys.executable, "-c", SINK)
    agent = Agent(netns, tmp_path, CONFIG.format(elements=elements)).ready()
    (worker,) = agent.workers()
    client = ["127.0.0.1:6000"]

    def packets() -> int:
        """Of the flow, as `top` has them."""
        flows = json.loads(agent.verb("top", "sport = 6000", "--for", "1", "--json").stdout)["flows"]
        return sum(flow["packets"] for flow in flows)

    with watchers(netns, agent, tmp_path):
        sent = 0

        def seen() -> bool:
            nonlocal sent
            netns.call(flood, worker, client)
            sent += 1
            return packets() > 0

        until(seen, "the flow is shown")
        # The first ones may have passed before the watch.
        before = packets()
        assert before <= sent
        netns.call(flood, worker, client * FLOWS)
        until(lambda: packets() == before + FLOWS, "all packets are counted")
    assert agent.stop() == 0
