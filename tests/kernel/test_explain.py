"""`explain` says of a packet what an agent does with it: random configurations, and real datagrams."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, until
from namespace import Namespace

from nfq_agent.cli.explain import explain
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.question import Question

pytestmark = pytest.mark.kernel

SOURCES = ("127.0.0.4", "127.0.0.5")
TARGETS = ("127.0.0.2", "127.0.0.3")
PORTS = (7001, 7002, 7003)
CONDITIONS: dict[str, list[Any]] = {
    "src": ['"127.0.0.4"', '["127.0.0.4", "127.0.0.5"]', '"10.0.0.0/8"'],
    "not_dst": ['"127.0.0.3"'],
    "dst": ['"127.0.0.2/31"', '"127.0.0.3"'],
    "interface": ['"lo"', '"l*"', '"eth0"'],
    "uid": ['"root"', "7"],
    "not_uid": ["7", "0"],
    "gid": ["0", "7"],
    "not_udp_ports": ["7002"],
    "role": ['"client"', '"server"'],
    "table": ['"raw"', '"filter"'],
    "mark": ['"0x0/0xf"', '"0x1/0xf"'],
    "family": ['"inet6"', '"inet"'],
}
POLICY: dict[str, list[str]] = {
    "src": ['"127.0.0.4"'],
    "dst": ['"127.0.0.3"'],
    "dport": ["7001", '"7002:7003"'],
    "sport": ["7001"],
    "uid": ['"root"', "7"],
    "gid": ["7", "0"],
    "interface": ['"lo"', '"eth*"'],
    "direction": ['"in"', '"out"'],
    "hook": ['"output"', '"input"'],
    "protocol": ['"udp"', '"tcp"'],
}


# What a capture does not tell.
UNSEEN = frozenset(("uid", "not_uid", "gid", "mark", "table"))
CAPTURE = '[element.capture]\ntype = "pcap"\ndirectory = "/run/captured"\n'


def written(chance: random.Random, unseen: frozenset[str] = frozenset(), capture: str = "") -> str:
    """A configuration of up to three rules for two queues, each with a policy. unseen: conditions that are left out."""
    text = capture
    more = ', "capture"' if capture else ""
    for number, name in enumerate(("a", "b")):
        text += (
            f'[queue.{name}]\nnum = {number + 7}\ndefault = "{chance.choice(("accept", "drop"))}"\nelements = ["p{name}"{more}]\n'
        )
        text += f'[element.p{name}]\ntype = "policy"\n' + ('default = "drop"\n' if chance.random() < 0.3 else "")
        for _ in range(chance.randrange(3)):
            keys = {
                key: chance.choice(POLICY[key]) for key in chance.sample(sorted(POLICY.keys() - unseen), chance.randint(1, 2))
            }
            text += f'[[element.p{name}.rule]]\naction = "{chance.choice(("accept", "drop"))}"\n'
            text += "".join(f"{key} = {value}\n" for key, value in keys.items())
    for number in range(chance.randint(1, 3)):
        text += f'[rules.r{number}]\nqueue = "{chance.choice("ab")}"\nhooks = ["output"]\n'
        text += chance.choice(("udp_ports = [7001, 7002]\n", 'udp_ports = ["7002:7003"]\n', 'protocol = "udp"\n'))
        for key in chance.sample(sorted(CONDITIONS.keys() - unseen), chance.randint(0, 2)):
            text += f"{key} = {chance.choice(CONDITIONS[key])}\n"
    return text


def ends() -> Iterator[tuple[str, str, int]]:
    return product(SOURCES, TARGETS, PORTS)


def send(*words: str) -> None:
    """One datagram from each source to each target and port. words: in front of its text."""
    for source, target, port in ends():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((source, 6000))
            sender.sendto(" ".join((*words, source, target, str(port))).encode(), (target, port))


# Writes each datagram that comes as a line.
RECEIVER = f"""
import select, socket
receivers = []
for target in {TARGETS}:
    for port in {PORTS}:
        receivers.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        receivers[-1].bind((target, port))
print("ready", flush=True)
while True:
    for each in select.select(receivers, [], [])[0]:
        print(each.recv(100).decode(), flush=True)
"""


@pytest.mark.parametrize("seed", range(6))
def test_it_says_what_happens(netns: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    agent = Agent(netns, tmp_path, written(random.Random(seed))).ready()
    expected, taken = set(), 0
    for source, target, port in ends():
        asked = Question(
            "udp", f"{source}:6000", f"{target}:{port}", hook="output", interface="lo", uid=os.geteuid(), gid=os.getegid()
        )
        assert explain(Flags(agent.config), asked) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("At first:")]
        if not any("drop" in line for line in said):
            expected.add(f"{source} {target} {port}")
        # A drop ends the way of the packet.
        taken += next((number for number, line in enumerate(said, 1) if "drop" in line), len(said))
    with (tmp_path / "received").open("wb") as out:
        netns.start(sys.executable, "-c", RECEIVER, stdout=out)

    def received() -> set[str]:
        return set((tmp_path / "received").read_text().splitlines())

    def judged() -> int:
        return sum(worker["received"] for queue in agent.status()["queues"] for worker in queue["workers"])

    until(lambda: "ready" in received(), "the receiver is there")
    netns.call(send)
    until(lambda: judged() == taken, "what explain says to be taken is judged")
    assert agent.stop() == 0
    # Each behind what came to its port before.
    netns.call(send, "last")
    last = {f"last {source} {target} {port}" for source, target, port in ends()}
    until(lambda: last <= received(), "all that passes has come")
    assert received() - last - {"ready"} == expected


# With seed 1 no rule takes a packet.
@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_a_replay_of_what_the_agent_saw_says_what_it_did(netns: Namespace, tmp_path: Path, seed: int) -> None:
    netns.shell("mkdir -m 777 /run/captured")
    agent = Agent(netns, tmp_path, written(random.Random(seed), UNSEEN, CAPTURE)).ready()
    netns.call(send)
    assert agent.stop() == 0
    for capture in netns.shell("ls /run/captured/*.pcapng").split():
        done = netns.run(*COMMAND, "replay", capture, "--config", str(agent.config), "--json", check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)
        assert told["changed"] == []
        assert all(flow["before"] == flow["after"] for flow in told["flows"])


REDIRECTED = """
[queue.servers]
num = 7
[queue.led]
num = 8
[proxy.web]
listen = ["127.0.0.1:15002", "[::1]:15006"]
[rules.web]
proxy = "web"
hooks = ["output"]
tcp_ports = [80]
[rules.servers]
queue = "servers"
table = "filter"
hooks = ["output"]
tcp_ports = [80]
role = "client"
[rules.led]
queue = "led"
table = "filter"
hooks = ["output"]
tcp_ports = [15002, 15006]
dst = ["127.0.0.1", "::1"]
role = "client"
"""


def test_table_filter_sees_where_a_connection_is_redirected_to(
    netns: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Agent(netns, tmp_path, REDIRECTED).ready()
    # One that is taken by the rule for servers only if it is not redirected.
    for host in ("127.0.0.2", "::1"):
        netns.run(sys.executable, "-c", CONNECT, host, check=False)
    until(lambda: agent.totals("led")["received"] >= 2, "the redirected connections are seen")
    assert agent.totals("servers")["received"] == 0
    assert agent.stop() == 0
    for source, host in (("127.0.0.1:40000", "127.0.0.2:80"), ("[::1]:40000", "[::1]:80")):
        assert explain(Flags(agent.config), Question("tcp", source, host)) == 0
        said = capsys.readouterr().out
        assert "[rules.led], table filter -> queue led, number 8" in said
        assert "[rules.servers]" not in said


CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], 80), 5.0) as connection:
    connection.recv(1)
"""
