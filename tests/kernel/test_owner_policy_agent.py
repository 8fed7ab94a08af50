"""An agent whose policy by owner is compiled: services that start again, what is counted, and what `plan` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agent import Agent, until
from control_groups import leave
from namespace import Namespace

pytestmark = pytest.mark.kernel

CONFIG = """
[agent]
backend = "owned"
drift_check = "1s"
[queue.main]
num = 7
compile = "auto"
elements = ["allow", "offload"]
log_drops = false
[element.allow]
type = "policy"
rule = [
  {{ name = "payments", action = "accept", unit = "payments-{tag}.service", dport = 8443 }},
  {{ name = "web", action = "accept", container = "web-{tag}" }},
  {{ name = "rest", action = "drop", cgroup = "/*-{tag}.service" }},
]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.out]
queue = "main"
tcp_ports = ["8000:9000"]
udp_ports = ["8000:9000"]
"""
# Joins a control group and connects, or sends a datagram.
PROGRAM = """
import os, socket, sys
group, kind, port = sys.argv[1:]
with open(group + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
if kind == "udp":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"x", ("127.0.0.1", int(port)))
        except PermissionError:
            sys.exit(1)
else:
    with socket.create_connection(("127.0.0.1", int(port)), 60) as connection:
        connection.sendall(b"x")
"""


def in_kernel(agent: Agent, rule: str) -> int:
    found = [each["in_kernel"] for each in agent.queue()["decisions"] if each["rule"] == rule]
    return sum(found)


def test_services_and_what_is_counted(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    agent = Agent(netns, tmp_path, CONFIG.format(tag=tag)).ready()
    netns.start("nc", "-lk", "127.0.0.1", "8443", stdout=subprocess.DEVNULL)
    until(lambda: ":20FB " in netns.shell("cat /proc/net/tcp"), "port 8443 is open")

    def passes(group: str, port: int, kind: str = "tcp") -> bool:
        return netns.run(sys.executable, "-c", PROGRAM, str(root / group), kind, str(port), check=False).returncode == 0

    assert passes(f"payments-{tag}.service", 8443)
    assert passes(f"machine-web\\x2d{tag}.scope", 8443)
    assert not passes(f"other-{tag}.service", 8443, "udp")
    assert not passes(f"payments-{tag}.service", 8444, "udp")
    # A SYN may be sent twice on a busy machine.
    assert in_kernel(agent, "rule 1 (payments)") >= 1
    assert in_kernel(agent, "rule 2 (web)") >= 1
    assert in_kernel(agent, "rule 3 (rest)") == 2
    # The rest of the connections passed by the mark.
    assert agent.status()["offloaded"]["accepted"] > 2
    assert "Nothing to do" in agent.verb("plan").stdout

    # A service that starts again has another group, which goes to the worker until the rules know it.
    group = root / f"payments-{tag}.service"
    leave(group)
    group.mkdir()
    assert passes(group.name, 8443)
    number = str(group.stat().st_ino)
    until(lambda: number in " ".join(rules(agent)), "the rules know the new group")
    denied = in_kernel(agent, "rule 3 (rest)")
    counted = in_kernel(agent, "rule 1 (payments)")
    assert passes(group.name, 8443)
    assert not passes(group.name, 8445, "udp")
    assert in_kernel(agent, "rule 1 (payments)") > counted
    assert in_kernel(agent, "rule 3 (rest)") == denied + 1

    # A group below another is not taken for it, whether it is known or not.
    below = group / "below"
    below.mkdir()
    assert passes(f"{group.name}/below", 8443)
    number = str(below.stat().st_ino)
    leave(below)
    until(lambda: number not in " ".join(rules(agent)), "the rules know that it is gone")
    assert agent.status()["drift"]["repairs"] == 0
    assert "Nothing to do" in agent.verb("plan").stdout
    assert agent.stop() == 0


def rules(agent: Agent) -> list[str]:
    return [each["rule"] for each in agent.status()["rules"]]
