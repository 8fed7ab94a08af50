"""Rules by the control group of a unit, on a booted host: the unit starts, starts again, crashes and stops under systemd."""

from __future__ import annotations

from typing import Any

import pytest

from booted.container import Container
from booted.nspawn import until
from booted.peers import main_pid, ours, status

# Sends a datagram to a port twenty times a second.
_SENDER = """import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    while True:
        sender.sendto(b"x", ("127.0.0.1", int(sys.argv[1])))
        time.sleep(0.05)
"""
_UNIT = """[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/sender.py {port}
Restart=on-failure
RestartSec=0
{more}
"""
_RULES = """[agent]
backend = "{backend}"
drift_check = "0"
[rules.unit]
queue = "main"
hooks = ["output"]
family = "inet"
udp_ports = [9001]
cgroup = "sender.service"
[rules.slice]
queue = "main"
hooks = ["output"]
family = "inet"
udp_ports = [9002]
cgroup = "jobs.slice"
[rules.others]
queue = "main"
hooks = ["output"]
family = "inet"
udp_ports = [9003]
not_cgroup = "sender.service"
"""


def counted(host: Container) -> dict[str, int]:
    """Packets by the name of the rule that took them to the queue, of the rules that are in now."""
    found: dict[str, int] = {}
    for each in status(host)["rules"]:
        for name in ("unit", "slice", "others"):
            if f"nfq-agent:default:{name}" in each["rule"] and "NFQUEUE" in each["rule"]:
                found[name] = found.get(name, 0) + int(each["packets"])
    return found


def counts(host: Container, name: str) -> None:
    """Wait until the rule counts, from now on."""
    before = counted(host).get(name, 0)
    until(lambda: counted(host).get(name, 0) > before + 2, f"rule {name} counts")


def followed(host: Container) -> int:
    """How often the agent has put in the rule of the unit's group."""
    return host.journal("--unit=nfq-agent", "--boot").count("rule unit is in for it")


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_rules_follow_the_units_of_systemd(host: Container, backend: str) -> None:
    host.write("/usr/local/lib/sender.py", _SENDER)
    for name, port, more in (("sender", 9001, ""), ("other", 9001, ""), ("job", 9002, "Slice=jobs.slice"), ("third", 9003, "")):
        host.write(f"/etc/systemd/system/{name}.service", _UNIT.format(port=port, more=more))
    host.write("/etc/nfq-agent/conf.d/cgroups.toml", _RULES.format(backend=backend))
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "other", "job", "third")
    host.run("systemctl", "restart", "nfq-agent")
    assert status(host)["backend"] == backend
    waiting = "the control group system.slice/sender.service does not exist; rule unit waits for it"
    assert status(host)["drift"]["waiting"] == [waiting]
    counts(host, "slice")
    counts(host, "others")
    assert counted(host).get("unit", 0) == 0

    host.run("systemctl", "start", "sender")
    counts(host, "unit")
    assert status(host)["drift"]["waiting"] == []
    # The same datagrams from the other unit do not match the rule.
    host.run("systemctl", "kill", "--signal=STOP", "sender")
    # What it was sending has left by then.
    until(lambda: "State:\tT" in host.shell(f"cat /proc/{main_pid(host, 'sender')}/status"), "it has stopped")
    stopped = counted(host)["unit"]
    counts(host, "others")
    assert counted(host)["unit"] == stopped
    host.run("systemctl", "kill", "--signal=CONT", "sender")
    # A restart makes a new group of the same name; so may systemd after a crash.
    before = followed(host)
    host.run("systemctl", "restart", "sender")
    until(lambda: followed(host) > before, "the rule follows")
    counts(host, "unit")
    pid = main_pid(host, "sender")
    host.shell(f"kill -KILL {pid}")
    until(lambda: main_pid(host, "sender") not in (0, pid), "systemd has started the unit again")
    counts(host, "unit")
    late: list[dict[str, Any]] = [each for each in status(host)["bypasses"] if each["cause"] == "cgroup-late"]
    assert [each["name"] for each in late] == ["system.slice/sender.service"]
    # A slice goes with its last unit, and is made again with the next.
    host.run("systemctl", "restart", "job")
    counts(host, "slice")

    host.run("systemctl", "stop", "sender")
    until(lambda: status(host)["drift"]["waiting"] == [waiting], "the agent sees that the group is gone")
    counts(host, "others")
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert "nfq-agent" not in host.run("nft", "list", "ruleset", check=False).stdout
