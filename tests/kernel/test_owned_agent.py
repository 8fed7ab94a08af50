"""The agent with its rules in a table of its own: its life, its capabilities, and what only such a table matches."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest
from agent import Agent, until
from cost import assert_cost_below
from namespace import Namespace
from owned_table import OTHERS, listed, send
from reachable import python, reachable

from nfq_agent.host.xtables.backend import choose

pytestmark = pytest.mark.kernel


PYTHON = sys.executable


def test_auto_is_owned_beside_nat_in_nf_tables_and_says_so(netns: Namespace) -> None:
    assert netns.call(lambda: choose("auto", "a", captures=True).name) == "legacy"
    netns.shell(OTHERS["nft"])
    assert netns.call(lambda: choose("auto", "a").name) == "legacy"
    host = netns.call(lambda: choose("auto", "a", captures=True))
    assert host.name == "owned"
    assert "since nf_tables does NAT here (ip other c)" in host.notice


def test_it_needs_one_capability_alone(netns: Namespace) -> None:
    program = """
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.xtables.backend import choose
from rule_texts import baseline
host = choose("owned", "a")
both = {family: baseline() for family in ("inet", "inet6")}
assert all(applied.changes for applied in host.apply_all(both).values())
assert not any(applied.changes for applied in host.apply_all(both).values())
host.apply_all({family: {} for family in both})
host.close()
"""
    reachable(netns)
    confined = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    rights = [f"--{kind}=-all,+net_admin" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    netns.run(*confined, *rights, *python("-c", program))
    refused = netns.run(
        *confined, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", *python("-c", program), check=False
    )
    assert "backend owned cannot be used: CAP_NET_ADMIN is missing; start as root, or with that capability" in refused.stderr


AGENT = """
[agent]
backend = "owned"
[queue.main]
num = 7
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [53]
"""


def test_a_whole_life(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, AGENT).ready()
    netns.call(send, 53, 10)
    assert agent.totals()["received"] == 10
    assert agent.status()["backend"] == "owned"
    assert "Nothing to do" in agent.verb("plan").stdout
    agent.configure(AGENT.replace("53", "53, 54"))
    assert agent.verb("plan", check=False).returncode == 3
    agent.verb("reload")
    netns.call(send, 54, 5)
    assert agent.totals()["received"] == 15
    assert agent.queue()["uninspected"] == 0
    shown = agent.verb("rules").stdout
    assert re.search(r" 15 +\d+  -A NFQA-default-OUTPUT -p udp -m multiport --ports 53,54", shown)
    # A worker that comes back inherits nothing that would hold the table.
    os.kill(agent.workers()[0], 9)
    until(lambda: "serves again" in agent.log, "the worker comes back")
    agent.kill()
    until(lambda: "nfq-agent" not in listed(netns), "the table goes with the agent")
    agent.start()
    agent.ready()
    assert agent.stop() == 0
    assert "nfq-agent" not in listed(netns)


def test_apply_without_serving_leaves_rules_that_remove_takes_away(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "default.toml").write_text(AGENT)
    command = [PYTHON, "-m", "nfq_agent"]
    file = ["--config", str(tmp_path / "default.toml")]
    netns.run(*command, "apply", *file)
    assert "queue num 7 bypass" in listed(netns)
    assert "Nothing to do" in netns.run(*command, "plan", *file).stdout
    netns.run(*command, "remove", "--instance", "default")
    assert "nfq-agent" not in listed(netns)


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_what_goes_to_one_address_but_not_to_one_port(netns: Namespace, tmp_path: Path, backend: str) -> None:
    netns.shell(
        "for name in eth0 eth1 wg7; do ip link add $name type veth peer name peer-$name; ip link set peer-$name up; done;"
        "for i in 0 1; do ip address add 10.9.$i.1/24 dev eth$i; ip link set eth$i up; done; ip link set wg7 up;"
        "ip route add 1.2.3.4/32 dev eth0; ip route add 1.2.3.5/32 dev eth0;"
        "ip -6 address add fd00::1/64 dev wg7 nodad; ip -6 route add 2001:db8::4/128 dev wg7"
    )
    text = (Path(__file__).parent.parent / "configs" / "destination.toml").read_text()
    agent = Agent(netns, tmp_path, f'[agent]\nbackend = "{backend}"\n{text}').ready()

    def judged(*sends: tuple[str, int, socket.SocketKind]) -> int:
        before = agent.totals()["received"]
        for each in sends:
            netns.call(send_to, *each)
        return agent.totals()["received"] - before

    udp, tcp = socket.SOCK_DGRAM, socket.SOCK_STREAM
    assert judged(("1.2.3.4", 53, udp), ("1.2.3.4", 22, udp), ("1.2.3.4", 443, tcp), ("2001:db8::4", 53, udp)) == 4
    assert judged(("1.2.3.4", 22, tcp), ("1.2.3.5", 53, udp), ("10.9.0.9", 53, udp)) == 0
    # By another interface.
    netns.shell("ip route replace 1.2.3.4/32 dev eth1")
    assert judged(("1.2.3.4", 53, udp)) == 0
    assert agent.stop() == 0


def send_to(host: str, port: int, kind: socket.SocketKind) -> None:
    """One packet: a datagram, or the SYN of a connection without an answer."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sender:
        sender.setblocking(False)
        if kind == socket.SOCK_DGRAM:
            sender.sendto(b"x", (host, port))
        else:
            sender.connect_ex((host, port))


def processor(agent: Agent) -> float:
    """Seconds of the processor that an agent and its ended children used."""
    fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("backend", "times"), [("owned", 3), ("legacy", 6)])
def test_a_start_with_ten_thousand_ports(netns: Namespace, tmp_path: Path, backend: str, times: float) -> None:
    """Beside one with a single port; 0.4 s on a quiet machine."""
    # A check of the drift is no part of a start, and comes sooner the longer one takes.
    text = AGENT.replace("owned", backend).replace("[agent]", "[agent]\ndrift_check = 0")

    def used(ports: str) -> float:
        agent = Agent(netns, tmp_path, text.replace("[53]", f"[{ports}]")).ready()
        seconds = processor(agent)
        assert agent.stop() == 0
        return seconds

    assert_cost_below(times, lambda: used("53"), lambda: used(", ".join(map(str, range(1, 20001, 2)))))
