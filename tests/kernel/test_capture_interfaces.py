"""Interfaces as hosts have them, for a tap and an inline link: moved, renamed, bridged with VLANs, large segments, tunnels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from containers import SERVER, Container, bridged
from inlined import attached, config, inline_of
from namespace import Namespace

KINDS = pytest.mark.parametrize("kind", ["tap", "inline"])


def configured(kind: str, interfaces: str = "veth*") -> str:
    # Also where the worker has to wait for a processor.
    more = 'patience = "10s"' if kind == "inline" else ""
    return config(more=more).replace("[inline.pods]", f"[{kind}.pods]").replace("veth*", interfaces)


def captured(agent: Agent) -> dict[str, Any]:
    """The status of the only tap or inline link."""
    status = agent.status()
    return dict((status["taps"] + status["inlines"])[0])


def taken(agent: Agent) -> list[str]:
    """The interfaces that are taken now."""
    return sorted(each["name"] for each in captured(agent)["interfaces"])


def denies(agent: Agent, kind: str, first: Container, address: str = "10.5.0.2") -> None:
    """A free name passes; a denied one is dropped, or would be."""

    def seen() -> int:
        return int(captured(agent)["counters"]["would_drop" if kind == "tap" else "dropped"])

    before = seen()
    assert first.get(address, "www.free.test") == "200"
    passes = first.get(address, "www.blocked.test", seconds=30 if kind == "tap" else 1.5)
    assert passes == ("200" if kind == "tap" else "000")
    until(lambda: seen() > before, "the denied name was seen")


@KINDS
def test_an_interface_that_moves_to_another_namespace_is_released(netns: Namespace, tmp_path: Path, kind: str) -> None:
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, configured(kind)).ready()
    until(lambda: taken(agent) == ["veth1", "veth2"], "both are taken")
    with Namespace() as other:
        netns.run("ip", "link", "set", "veth1", "netns", str(other.pid))
        until(lambda: taken(agent) == ["veth2"], "it is released")
        # A link of tcx goes with its device to the other namespace.
        until(lambda: attached(other) == 0, "nothing is attached to it")
        other.run("ip", "link", "set", "veth1", "netns", str(netns.pid))
    netns.run("ip", "link", "set", "veth1", "master", "br0", "up")
    until(lambda: taken(agent) == ["veth1", "veth2"], "it is taken again")
    until(lambda: "state UP" in netns.run("ip", "-o", "link", "show", "veth1").stdout, "its port is up")
    denies(agent, kind, first)
    assert agent.stop() == 0


@KINDS
def test_an_interface_is_followed_by_its_name(netns: Namespace, tmp_path: Path, kind: str) -> None:
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, configured(kind, "shop*")).ready()
    assert taken(agent) == []

    def rename(old: str, new: str) -> None:
        netns.shell(f"ip link set {old} down; ip link set {old} name {new}; ip link set {new} up")
        until(lambda: "state UP" in netns.run("ip", "-o", "link", "show", new).stdout, "its port is up")

    rename("veth1", "shop1")
    until(lambda: taken(agent) == ["shop1"], "it is taken")
    denies(agent, kind, first)
    rename("shop1", "shop2")
    until(lambda: taken(agent) == ["shop2"], "it has its new name")
    denies(agent, kind, first)
    rename("shop2", "other")
    until(lambda: taken(agent) == [], "it is released")
    assert first.get("10.5.0.2", "www.blocked.test") == "200"
    assert agent.stop() == 0


@KINDS
def test_containers_with_ipv6_alone(netns: Namespace, tmp_path: Path, kind: str) -> None:
    first, second = bridged(netns)
    for each in (first, second):
        each.run("ip", "-4", "address", "flush", "dev", "eth0")
    second.serve()
    agent = Agent(netns, tmp_path, configured(kind)).ready()
    denies(agent, kind, first, "fd05::2")
    assert agent.stop() == 0


@KINDS
def test_a_bridge_that_knows_vlans(netns: Namespace, tmp_path: Path, kind: str) -> None:
    first, second = bridged(netns)
    if "Error" in netns.run("ip", "link", "set", "br0", "type", "bridge", "vlan_filtering", "1", check=False).stderr:
        pytest.skip("this kernel has no bridges that know VLANs (CONFIG_BRIDGE_VLAN_FILTERING)")
    second.serve()
    agent = Agent(netns, tmp_path, configured(kind)).ready()
    denies(agent, kind, first)
    assert agent.stop() == 0


@KINDS
def test_segments_of_more_than_64_kilobytes(netns: Namespace, tmp_path: Path, kind: str) -> None:
    first, second = bridged(netns)
    for end in (first, second):
        end.run("ip", "link", "set", "eth0", "gso_max_size", "200000", "gro_max_size", "200000")
    second.serve(8_000_000)
    agent = Agent(netns, tmp_path, configured(kind)).ready()
    for address in ("[fd05::2]", "10.5.0.2"):
        whole = first.run("curl", "-s", "-m", "60", "-H", "Host: www.free.test", f"http://{address}:8080/").stdout
        assert whole == "0123456789abcdef" * 500_000
    denies(agent, kind, first, "fd05::2")
    if kind == "inline":
        assert inline_of(agent)["lost"] == 0
    assert agent.stop() == 0


def test_an_inline_link_on_every_interface_leaves_the_loopback_alone(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    netns.run("ip", "address", "add", "10.5.0.254/24", "dev", "br0")
    second.serve()
    server = netns.start(sys.executable, "-c", SERVER, "1600", stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    agent = Agent(netns, tmp_path, configured("inline", "*")).ready()
    until(lambda: taken(agent) == ["br0", "veth1", "veth2"], "all but the loopback are taken")
    assert "inline pods: lo is not taken: the host's packets to itself cannot be sent on" in agent.log
    for address in ("10.5.0.2", "10.5.0.254"):
        denies(agent, "inline", first, address)
    for address in ("127.0.0.1", "[::1]"):
        asked = netns.run("curl", "-s", "-m", "30", "-H", "Host: www.blocked.test", f"http://{address}:8080/").stdout
        assert len(asked) == 1600
    assert agent.stop() == 0


@KINDS
def test_an_interface_without_ethernet_headers_is_not_taken(netns: Namespace, tmp_path: Path, kind: str) -> None:
    netns.run("ip", "tuntap", "add", "tun0", "mode", "tun")
    netns.run("ip", "tuntap", "add", "tap0", "mode", "tap")
    netns.shell("ip link set tun0 up; ip link set tap0 up")
    text = configured(kind).replace('"veth*"', '"tun*", "tap*"')
    agent = Agent(netns, tmp_path, text).ready()
    assert taken(agent) == ["tap0"]
    said = f"{kind} pods: tun0 is not taken: its packets have no Ethernet header"
    assert agent.log.count(said) == 1
    how = "takes" if kind == "tap" else "takes, by programs on both sides (tcx links),"
    plan = " ".join(agent.verb("plan").stdout.split())
    assert plan.endswith(f"# {kind}.pods {how} these interfaces, and others that match later: tap0")
    netns.run("ip", "tuntap", "add", "tun1", "mode", "tun")
    until(lambda: said.replace("tun0", "tun1") in agent.log, "a new one is named too")
    assert taken(agent) == ["tap0"]
    assert agent.stop() == 0
