"""The proxy as the agent runs it: started, reloaded and stopped under load, by the verbs; nothing lost, nothing left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from namespace import PATIENCE, Namespace
from proxied import TPROXY, configuration
from saved_host import listening, saved
from tcp_client import Load, Talk, ask, receive, server

pytestmark = pytest.mark.kernel


DRAIN = 'drain = "60s"\n'
BACKENDS = pytest.mark.parametrize("backend", ["legacy", "owned"])


def with_backend(backend: str, text: str) -> str:
    return f'[agent]\nbackend = "{backend}"\n{text}'


def progress(*clients: Load) -> None:
    """Each of them has made another good exchange."""
    for client in clients:
        until(lambda client=client, before=client.good: client.good > before + 1, "the exchanges continue")  # type: ignore[misc]  # bound early


@BACKENDS
def test_start_reload_and_stop_under_load(netns: Namespace, tmp_path: Path, backend: str) -> None:
    server(netns, "echo")
    before = saved(netns).count("NFQA")
    clients = [Load(netns), Load(netns)]
    agent = Agent(netns, tmp_path, with_backend(backend, configuration(proxy=DRAIN))).ready()
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    long = Talk(netns)
    until(lambda: long.good, "it talks")
    for proxy in ('elements = ["stream-log"]', "chunk = 1000", ""):
        agent.configure(with_backend(backend, configuration(proxy=DRAIN + proxy)))
        agent.verb("reload")
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        progress(long, *clients)
    agent.process.terminate()
    until(lambda: "15002" not in netns.shell("ss -ltnH"), "it takes no more connections")
    # The connection that runs is carried on, and others do not need the agent any more.
    progress(long, *clients)
    assert long.end() == []
    assert agent.process.wait(timeout=60) == 0
    progress(*clients)
    assert [client.end() for client in clients] == [[], []], agent.log
    assert saved(netns).count("NFQA") == before == 0
    # Only the tests' own server is left.
    assert netns.processes() == netns.running()


def test_a_stop_waits_for_its_deadline_and_no_longer(netns: Namespace, tmp_path: Path) -> None:
    server(netns, "echo")
    agent = Agent(netns, tmp_path, configuration(proxy='drain = "2s"')).ready()

    def stay() -> tuple[str, float]:
        with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
            it.sendall(b"x")
            assert it.recv(1) == b"x"
            began = time.monotonic()
            # Not by Popen, which takes what is not this process's child for ended.
            os.kill(agent.process.pid, signal.SIGTERM)
            # Still carried, although nothing new is.
            it.sendall(b"y")
            assert it.recv(1) == b"y"
            try:
                return it.recv(1).decode() or "end", time.monotonic() - began
            except ConnectionResetError:
                return "reset", time.monotonic() - began

    how, seconds = netns.call(stay)
    assert how == "reset", "a truncated stream must not look complete"
    assert seconds >= 2
    assert agent.process.wait(timeout=PATIENCE) == 0
    assert "NFQA" not in saved(netns)


@BACKENDS
def test_tproxy_leaves_nothing(netns: Namespace, tmp_path: Path, backend: str) -> None:
    before = netns.shell("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")
    text = with_backend(backend, configuration(proxy=TPROXY, hooks='"prerouting"', listen='"0.0.0.0:15002", "[::]:15002"'))
    agent = Agent(netns, tmp_path, text).ready()
    assert "proto 221" in netns.shell("ip rule")
    agent.kill()
    # An owned table goes with the process.
    assert ("NFQA" in saved(netns)) == (backend == "legacy")
    agent.verb("remove")
    assert "NFQA" not in saved(netns)
    assert netns.shell("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all") == before


def test_a_reload_from_redirect_to_tproxy(routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path) -> None:
    """On the listeners that are open already, which have to become transparent."""
    client, gateway, target = routed
    server(target, "who", "10.2.0.2")
    agent = Agent(gateway, tmp_path, configuration(hooks='"prerouting"')).ready()
    assert client.call(ask, "10.2.0.2", 8080, b"").decode().split()[0] == "10.2.0.1"
    agent.configure(configuration(proxy=f"{TPROXY}keep_client = true", hooks='"prerouting"'))
    agent.verb("reload")
    assert client.call(ask, "10.2.0.2", 8080, b"").decode().split()[0] == "10.1.0.2"
    until(lambda: agent.status()["proxies"][0]["counters"]["connections"] == 2, "both are counted")
    assert agent.stop() == 0
    assert "NFQA" not in saved(gateway)


@pytest.mark.parametrize("capture", ["", TPROXY], ids=["redirect", "tproxy"])
def test_connections_through_the_router_continue_when_the_agent_starts(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path, capture: str
) -> None:
    client, gateway, target = routed
    server(target, "echo", "10.2.0.2")

    def across() -> None:
        with socket.create_connection(("10.2.0.2", 8080), timeout=60) as it:
            it.sendall(b"before")
            assert receive(it, 6) == b"before"
            agent = Agent(gateway, tmp_path, configuration(proxy=capture, hooks='"prerouting"')).ready()
            it.sendall(b"meanwhile")
            assert receive(it, 9) == b"meanwhile"
            assert ask("10.2.0.2", 8080) == b"hello"
            # The new one alone is the proxy's.
            until(lambda: agent.status()["proxies"][0]["counters"]["connections"] == 1, "it is counted")
            os.kill(agent.process.pid, signal.SIGTERM)
            until(lambda: "NFQA" not in saved(gateway), "the rules are gone")
            it.sendall(b"after")
            assert receive(it, 5) == b"after"

    client.call(across)


def test_a_reload_that_fails_leaves_the_routes_as_they_were(netns: Namespace, tmp_path: Path) -> None:
    server(netns, "echo")
    agent = Agent(netns, tmp_path, configuration(hooks='"prerouting"')).ready()
    everything = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"

    def there() -> list[str]:
        return [*netns.shell(everything).splitlines(), *(line for line in saved(netns).splitlines() if line.startswith("-A"))]

    before = there()
    agent.configure(configuration(proxy=TPROXY, hooks='"prerouting"'))
    # Another process holds the lock, so that the rules cannot be changed.
    holder = netns.start("flock", "--close", "/run/xtables.lock", "sh", "-c", "echo held; exec sleep 60", stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert agent.verb("reload", check=False).returncode == 1
    holder.kill()
    holder.wait()
    assert "reload failed, the configuration in force stays" in agent.log
    assert there() == before
    # And it can be done afterwards.
    agent.verb("reload")
    assert "proto 221" in netns.shell("ip rule")
    assert agent.stop() == 0
    assert "proto 221" not in netns.shell(everything)


def target_of(text: str) -> str:
    """The rule that a configuration captures with, as iptables writes it."""
    return "-j TPROXY" if TPROXY in text else "-j REDIRECT"


# In the chain that TPROXY's rules are in too.
SNIFF = '[queue.q]\nnum = 7\n[rules.sniff]\nqueue = "q"\nhooks = ["prerouting"]\nudp_ports = [5353]\n'


@pytest.mark.parametrize("rest", ["", SNIFF], ids=["alone", "beside a queue"])
@pytest.mark.parametrize("captures", [("", TPROXY), (TPROXY, "")], ids=["to tproxy", "from tproxy"])
def test_running_connections_continue_when_the_capture_changes(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path, captures: tuple[str, str], rest: str
) -> None:
    client, gateway, target = routed
    server(target, "echo", "10.2.0.2")
    before, after = (configuration(proxy=f'drain = "60s"\n{capture}', hooks='"prerouting"', rest=rest) for capture in captures)
    agent = Agent(gateway, tmp_path, before).ready()

    def across() -> bytes:
        with socket.create_connection(("10.2.0.2", 8080), timeout=60) as it:
            it.sendall(b"before")
            assert receive(it, 6) == b"before"
            agent.configure(after)
            reload = threading.Thread(target=agent.verb, args=("reload",))
            reload.start()
            until(lambda: target_of(after) in saved(gateway), "what comes is captured in the other way")
            it.sendall(b"meanwhile")
            answer = receive(it, 9)
        reload.join()
        return answer

    assert client.call(across) == b"meanwhile"
    assert client.call(ask, "10.2.0.2", 8080) == b"hello"
    assert agent.stop() == 0
    assert "NFQA" not in saved(gateway)
    assert "proto 221" not in gateway.shell("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")


def test_its_counters_are_in_the_status(netns: Namespace, tmp_path: Path) -> None:
    server(netns, "echo")
    agent = Agent(netns, tmp_path, configuration()).ready()
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    expected = {"connections": 1, "bytes_forward": 5, "bytes_reverse": 5}

    def counted() -> bool:
        (proxy,) = agent.status()["proxies"]
        return bool(expected.items() <= proxy["counters"].items())

    until(counted, "it is counted")
    assert agent.stop() == 0


def test_counting_continues_over_a_reload(netns: Namespace, tmp_path: Path) -> None:
    """A reload puts another process in the place of the one that still carries a connection; the figures are those of both."""
    server(netns, "echo")
    agent = Agent(netns, tmp_path, configuration(proxy='drain = "600s"')).ready()

    def counted() -> dict[str, int]:
        (proxy,) = agent.status()["proxies"]
        return dict(proxy["counters"])

    def all_counted(step: int) -> bool:
        return counted()["bytes_reverse"] == 1000 * (step + 1) + 5 * (step + 1)

    def short_ended(step: int) -> bool:
        counters = counted()
        return (counters["connections"], counters["active"]) == (2 + step, 1)

    def over_reloads() -> None:
        with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
            for step in range(4):
                it.sendall(b"x" * 1000)
                assert receive(it, 1000) == b"x" * 1000
                if step < 3:
                    agent.configure(configuration(proxy=f'drain = "600s"\nchunk = {1000 + step}'))
                    agent.verb("reload")
                    assert ask("127.0.0.1", 8080) == b"hello"
                    until(partial(all_counted, step), "all is counted")
                    # The end of the short connection may be noticed after its last byte was counted.
                    until(partial(short_ended, step), "the short connection has ended")

    netns.call(over_reloads, timeout=240)
    until(lambda: counted()["active"] == 0, "the connection has ended")
    expected = {"connections": 4, "bytes_forward": 4015, "bytes_reverse": 4015, "reset": 0, "refused": 0}
    until(lambda: {name: counted()[name] for name in expected} == expected, "the last bytes are counted")
    assert agent.stop() == 0


def test_a_reload_opens_and_closes_listeners(netns: Namespace, tmp_path: Path) -> None:
    """Those that stay are not closed for a moment, so that no client is refused, nor can they be taken."""
    server(netns, "echo")
    other = '[proxy.other]\nlisten = ["0.0.0.0:15009"]\n'
    agent = Agent(netns, tmp_path, configuration(rest=other)).ready()
    client = Load(netns)

    def listens(*places: str) -> bool:
        return {each for each in listening(netns) if ":1500" in each} == set(places)

    for places in (("0.0.0.0:15002", "0.0.0.0:15006", "[::]:15002"), ("[::]:15002", "0.0.0.0:15002"), ("0.0.0.0:15002",)):
        agent.configure(configuration(", ".join(f'"{place}"' for place in places)))
        agent.verb("reload")
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        until(partial(listens, *places), "it listens there")
        progress(client)
    assert client.end() == []
    assert agent.stop() == 0
    assert not any(":1500" in each for each in listening(netns))


def test_a_reload_to_a_listener_that_is_in_use(netns: Namespace, tmp_path: Path) -> None:
    """It is refused by name, and the proxy continues unchanged, with a connection that runs and its counts."""
    server(netns, "echo")
    agent = Agent(netns, tmp_path, configuration()).ready()
    netns.start("nc", "-l", "-p", "15009")
    until(lambda: "0.0.0.0:15009" in listening(netns), "the other process listens")

    def over_the_refusal() -> None:
        with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
            it.sendall(b"before")
            assert receive(it, 6) == b"before"
            agent.configure(configuration('"0.0.0.0:15009", "[::]:15002"'))
            refused = agent.verb("reload", check=False)
            assert refused.returncode != 0
            assert "0.0.0.0:15009" in refused.stdout + refused.stderr
            it.sendall(b"after")
            assert receive(it, 5) == b"after"

    netns.call(over_the_refusal)
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"

    def proxy() -> dict[str, Any]:
        (found,) = agent.status()["proxies"]
        return dict(found)

    assert proxy()["listen"] == ["0.0.0.0:15002", "[::]:15002"]
    until(lambda: {"connections": 2, "bytes_reverse": 16}.items() <= proxy()["counters"].items(), "all is counted")
    assert agent.stop() == 0
    assert "NFQA" not in saved(netns)
