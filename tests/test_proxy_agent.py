"""The proxy as the agent runs it: started, reloaded and stopped under load, by the verbs; nothing lost, nothing left."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from agent import Agent, until
from namespace import Namespace
from test_proxy import TPROXY, Meanwhile, ask, configuration, load, receive, server

pytestmark = pytest.mark.kernel
BACKENDS = pytest.mark.parametrize("backend", ["legacy", "nft"])


def saved(netns: Namespace) -> str:
    """Every rule of every kind in the namespace, and its routing rules."""
    return netns.shell(
        "for save in iptables-legacy-save ip6tables-legacy-save iptables-nft-save ip6tables-nft-save; do $save 2>/dev/null; done;"
        "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"
    )


def with_backend(backend: str, text: str) -> str:
    return f'[agent]\nbackend = "{backend}"\n{text}'


def long(seconds: float) -> str:
    """One connection that speaks now and then."""
    with socket.create_connection(("127.0.0.1", 8080), timeout=10) as it:
        until_ = time.monotonic() + seconds
        while time.monotonic() < until_:
            it.sendall(b"x" * 1000)
            if receive(it, 1000) != b"x" * 1000:
                return "cut"
            time.sleep(0.05)
    return "whole"


@BACKENDS
def test_start_reload_and_stop_under_load(netns: Namespace, tmp_path: Path, backend: str) -> None:
    server(netns, "echo")
    before = saved(netns).count("NFQA")
    clients = [Meanwhile(netns, load, 6.0), Meanwhile(netns, load, 6.0)]
    agent = Agent(netns, tmp_path, with_backend(backend, configuration())).ready()
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    last = Meanwhile(netns, long, 2.5)
    time.sleep(0.3)
    for proxy in ('elements = ["stream-log"]', "chunk = 1000", ""):
        agent.configure(with_backend(backend, configuration(proxy=proxy)))
        agent.verb("reload")
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        time.sleep(0.2)
    assert agent.stop() == 0
    assert last.result() == "whole"
    results = [client.result() for client in clients]
    assert [bad for _, bad in results] == [0, 0]
    assert saved(netns).count("NFQA") == before == 0
    until(lambda: "15002" not in netns.shell("ss -ltnH"), "the ports are free again")


@BACKENDS
def test_tproxy_leaves_nothing(netns: Namespace, tmp_path: Path, backend: str) -> None:
    before = netns.shell("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")
    text = with_backend(backend, configuration(proxy=TPROXY, hooks='"prerouting"', listen='"0.0.0.0:15002", "[::]:15002"'))
    agent = Agent(netns, tmp_path, text).ready()
    assert "proto 221" in netns.shell("ip rule")
    agent.kill()
    assert "NFQA" in saved(netns)
    agent.verb("remove")
    assert "NFQA" not in saved(netns)
    assert netns.shell("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all") == before


def test_its_counters_are_in_the_status(netns: Namespace, tmp_path: Path) -> None:
    server(netns, "echo")
    agent = Agent(netns, tmp_path, configuration()).ready()
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    (proxy,) = agent.status()["proxies"]
    assert proxy["counters"]["connections"] == 1
    assert proxy["counters"]["bytes_forward"] == proxy["counters"]["bytes_reverse"] == 5
    assert agent.stop() == 0
