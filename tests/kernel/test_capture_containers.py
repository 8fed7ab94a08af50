"""Interfaces are named by the containers behind them: processes in control groups of the real hierarchy."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, Started, until
from containers import Container, bridged, routed
from namespace import Namespace

CONFIG = """
[{kind}.pods]
interfaces = ["veth*"]
tcp_ports = [8080]
elements = ["verdicts", "log"]
[element.verdicts]
type = "policy"
default = "accept"
rule = [ {{ action = "drop", container = "web-{tag}", direction = "in" }} ]
[element.log]
each = "flow"
"""


def interfaces(agent: Agent, kind: str) -> dict[str, str | None]:
    (table,) = agent.status()[f"{kind}s"]
    return {each["name"]: each["container"] for each in table["interfaces"]}


def judged(agent: Agent, kind: str) -> dict[str, Any]:
    counters: dict[str, Any] = agent.status()[f"{kind}s"][0]["counters"]
    return counters


@contextmanager
def container_of(namespace: Container, groups: tuple[Path, str]) -> Iterator[None]:
    """The process of the namespace is in the control group of a container meanwhile."""
    root, tag = groups
    (root / f"machine-web\\x2d{tag}.scope" / "cgroup.procs").write_text(str(namespace.pid))
    try:
        yield
    finally:
        (root / "cgroup.procs").write_text(str(namespace.pid))


def test_a_policy_and_the_log_know_the_container(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    _, tag = groups
    first, second = bridged(netns)
    second.serve()
    with container_of(first, groups):
        agent = Agent(netns, tmp_path, CONFIG.format(kind="inline", tag=tag)).ready()
        until(lambda: interfaces(agent, "inline") == {"veth1": f"web-{tag}", "veth2": None}, "one container is known")
        # The worker is told a moment after the status.
        until(lambda: first.get("10.5.0.2", seconds=1.5) == "000", "it is denied")
        until(lambda: f"drop, 60 bytes, container web-{tag}" in agent.log, "the log names it")
        assert f"veth1 (container web-{tag})" in agent.verb("status").stdout
        # A worker that comes later is told, too.
        agent.configure(CONFIG.format(kind="tap", tag=tag))
        agent.verb("reload")
        until(lambda: interfaces(agent, "tap") == {"veth1": f"web-{tag}", "veth2": None}, "the tap knows it")
        until(lambda: first.get("10.5.0.2") == "200" and judged(agent, "tap")["would_drop"] > 0, "it would have been dropped")
        assert agent.stop() == 0


def test_a_container_whose_process_comes_after_its_interface(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    _, tag = groups
    agent = Agent(netns, tmp_path, CONFIG.format(kind="tap", tag=tag)).ready()
    first, _ = bridged(netns)
    until(lambda: interfaces(agent, "tap") == {"veth1": None, "veth2": None}, "none is known")
    with container_of(first, groups):
        until(lambda: interfaces(agent, "tap")["veth1"] == f"web-{tag}", "it is found")
        assert agent.stop() == 0


FORWARDED = """
[queue.l7]
num = 130
elements = ["verdicts", "log"]
[rules.apps]
queue = "l7"
hooks = ["forward"]
tcp_ports = [8080]
{bridge}
[element.verdicts]
type = "policy"
default = "accept"
rule = [ {{ action = "drop", container = "web-{tag}", dport = 8080, name = "none of the web" }} ]
[element.log]
each = "packet"
"""


@pytest.mark.parametrize("layout", ["bridged", "routed"])
def test_a_queue_knows_the_container_of_what_is_forwarded(
    netns: Namespace, tmp_path: Path, groups: tuple[Path, str], layout: str
) -> None:
    _, tag = groups
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    first, second = bridged(netns) if layout == "bridged" else routed(netns)
    address = "10.5.0.2" if layout == "bridged" else "10.6.2.2"
    back = "10.5.0.1" if layout == "bridged" else "10.6.1.2"
    first.serve()
    second.serve()
    bridge = 'interface = "veth*"\nbridge = true' if layout == "bridged" else ""
    agent = Agent(netns, tmp_path, FORWARDED.format(tag=tag, bridge=bridge)).ready()
    assert first.get(address) == "200"
    with container_of(first, groups):
        # Found within a second; a flow that began before keeps its verdict.
        until(lambda: first.get(address, seconds=0.5) == "000", "it is denied")
        until(lambda: f"drop, 60 bytes, container web-{tag}, by verdicts: rule 1" in agent.log, "the log names it")
        # It is also the one that another asks.
        assert second.get(back, seconds=0.5) == "000"
        agent.configure(FORWARDED.format(tag=tag, bridge=bridge).replace('"drop"', '"accept"'))
        agent.verb("reload")
        assert second.get(back) == "200"
        until(lambda: f":8080 FORWARD accept, 60 bytes, container web-{tag}" in agent.log, "the log names it by the other end")
        # A worker that comes after a death knows it at once.
        (worker,) = agent.workers()
        os.kill(worker, signal.SIGKILL)
        until(lambda: agent.status()["queues"][0]["workers"][0]["restarts"] == 1, "it is replaced")
        assert agent.stop() == 0


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_a_container_on_a_bridge_with_an_address_is_known_by_its_own_address(
    netns: Namespace, tmp_path: Path, groups: tuple[Path, str], family: str
) -> None:
    """As on docker0: netfilter sees the bridge, and no port of it."""
    _, tag = groups
    netns.shell("""
        for each in /proc/sys/net/bridge/bridge-nf-call-ip*tables; do echo 0 >$each; done
        echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding""")
    first, second = bridged(netns)
    outside = Container(netns, 9)
    for where, device in (("10.5.0.254/24", "br0"), ("fd05::fe/64", "br0"), ("10.6.9.1/24", "veth9"), ("fd06:9::1/64", "veth9")):
        netns.run("ip", "address", "add", where, "dev", device, *(["nodad"] if ":" in where else []))
    netns.run("ip", "link", "set", "veth9", "up")
    outside.shell("""
        ip address add 10.6.9.2/24 dev eth0; ip address add fd06:9::2/64 dev eth0 nodad; ip link set eth0 up
        ip route add default via 10.6.9.1; ip route add default via fd06:9::1""")
    for each in (first, second):
        each.shell("ip route add default via 10.5.0.254; ip route add default via fd05::fe")
    out, back, added, gateway, size = {
        "ipv4": ("10.6.9.2", "10.5.0.1", "10.5.0.1/24 dev eth0", "10.5.0.254", 60),
        "ipv6": ("fd06:9::2", "fd05::1", "fd05::1/64 dev eth0 nodad", "fd05::fe", 80),
    }[family]
    first.serve()
    outside.serve()
    agent = Agent(netns, tmp_path, FORWARDED.format(tag=tag, bridge="")).ready()
    until(lambda: first.get(out) == "200", "there is a way out")
    with container_of(first, groups):
        until(lambda: first.get(out, seconds=0.5) == "000", "it is denied")
        until(lambda: f"FORWARD drop, {size} bytes, container web-{tag}" in agent.log, "it is named")
        # It is also the one that another asks; the other container on the bridge is not meant.
        assert outside.get(back, seconds=0.5) == "000"
        assert second.get(out) == "200"
        # An address goes to another container while the agent runs.
        first.shell("ip address flush dev eth0 scope global")
        second.shell(f"""
            ip address flush dev eth0 scope global; ip address add {added}
            ip route replace default via {gateway}""")
        until(lambda: second.get(out, seconds=0.5) == "200", "the address is the other's")
        assert agent.stop() == 0


RIGHTS = "+net_admin,+net_raw,+setuid,+setgid,+kill,+dac_override"


@pytest.mark.parametrize("more", ["", ",+sys_ptrace"])
def test_the_right_that_the_drop_in_adds_is_what_it_takes(
    netns: Namespace, tmp_path: Path, groups: tuple[Path, str], more: str
) -> None:
    """As in the unit: processes of others are hidden (ProtectProc=invisible). The worker has no such right."""
    _, tag = groups
    first, _ = bridged(netns)
    with container_of(first, groups):
        netns.shell("mount -t proc -o hidepid=invisible proc /proc")
        rights = RIGHTS + more
        # Inheritable ones would come back: where a test host is a container, all are.
        held = ("setpriv", "--inh-caps=-all", f"--bounding-set=-all,{rights}")
        agent = Started(netns, tmp_path, CONFIG.format(kind="tap", tag=tag), held)
        agent.ready()
        if more:
            until(lambda: interfaces(agent, "tap")["veth1"] == f"web-{tag}", "it is known")
            assert "are not known" not in agent.log
        else:
            until(lambda: "the containers behind interfaces are not known: /proc/" in agent.log, "it says what is missing")
            assert "allowed: CAP_SYS_PTRACE (the drop-in containers.conf of the unit)" in agent.log
            assert interfaces(agent, "tap")["veth1"] is None
        worker = agent.status()["taps"][0]["pid"]
        had = Path(f"/proc/{worker}/status").read_text()
        assert int(had.partition("CapPrm:")[2].split()[0], 16) >> 19 & 1 == 0
        assert agent.stop() == 0
        assert agent.log.count("are not known") == (not more)
