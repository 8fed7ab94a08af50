"""A proxy and its connections when the agent starts and is reloaded."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from agent import COMMAND, Agent, ours, until
from agent_flood import udp
from namespace import PATIENCE, Namespace
from traffic import Lines

pytestmark = pytest.mark.kernel


PROXY = """
[proxy.tcp]
listen = ["127.0.0.1:15002"]
{more}
[rules.redirect]
proxy = "tcp"
hooks = ["output"]
family = "inet"
tcp_ports = [8080]
"""


def test_a_reload_of_a_proxy_lets_its_connections_end_and_the_watchdog_sleep(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        agent = Agent(netns, tmp_path, PROXY.format(more=""), NOTIFY_SOCKET=str(path), WATCHDOG_USEC="3000000").ready()
        lines = Lines(netns)
        lines.carry(b"before")
        (old,) = [proxy["pid"] for proxy in agent.status()["proxies"]]
        agent.configure(PROXY.format(more='elements = ["stream-log"]'))
        # It does not wait for the connection that is still open.
        agent.verb("reload")
        assert Path(f"/proc/{old}").exists()
        (new,) = [proxy["pid"] for proxy in agent.status()["proxies"]]
        assert old != new
        lines.carry(b"after")
        lines.end()
        until(lambda: not Path(f"/proc/{old}").exists(), "the old process ends with its last connection")
        assert agent.process.poll() is None
        assert agent.stop() == 0
        assert ours(netns) == []


def test_a_reload_that_takes_a_proxy_away_lets_its_connections_end(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, PROXY.format(more='drain = "20s"') + udp()).ready()
    lines = Lines(netns)
    lines.carry(b"before")
    agent.configure(udp())
    reload = netns.start(*COMMAND, "reload", "--config", str(agent.config), stdout=subprocess.DEVNULL)
    until(
        lambda: not any("-A OUTPUT" in line and ":jump" in line for line in nat(netns)), "nothing new is redirected to the proxy"
    )
    lines.carry(b"after")
    lines.end()
    assert reload.wait(timeout=PATIENCE) == 0
    assert [line for line in nat(netns) if "NFQA-" in line] == []
    assert agent.status()["proxies"] == []
    assert agent.stop() == 0
    assert ours(netns) == []


def nat(namespace: Namespace) -> list[str]:
    """The rules of table nat, IPv4."""
    return namespace.run("iptables-legacy", "-w", "-t", "nat", "-S").stdout.splitlines()


def test_a_running_connection_continues_when_a_proxy_starts(netns: Namespace, tmp_path: Path) -> None:
    # Nothing tracks connections here before the agent's rules do, so that the kernel meets this one in its middle.
    lines = Lines(netns)
    lines.carry(b"before")
    agent = Agent(netns, tmp_path, PROXY.format(more="")).ready()
    lines.carry(b"after")
    lines.end()
    assert agent.stop() == 0
