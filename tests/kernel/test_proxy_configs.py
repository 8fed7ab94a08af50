"""The proxy as configurations ask for it: the contract file, the environment, several queues beside it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from functools import partial
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from namespace import PATIENCE, ROOT, Namespace
from proxied import configuration
from saved_host import listening, saved
from tcp_client import ask, how_it_ends, server

pytestmark = pytest.mark.kernel


CONTRACTS = Path(__file__).parent.parent / "configs"


def test_the_contract_file_by_the_agent(netns: Namespace, tmp_path: Path) -> None:
    """transparent-proxy.toml unchanged: its listeners, its rules, connections of both families, the log, and the end."""
    for host in ("0.0.0.0", "::1"):
        server(netns, "who", host)
    agent = Agent(netns, tmp_path, (CONTRACTS / "transparent-proxy.toml").read_text()).ready()
    assert {"0.0.0.0:15002", "0.0.0.0:15006", "[::]:15002"} <= listening(netns)
    rules = saved(netns)
    for chain in ("PREROUTING", "OUTPUT"):
        assert rules.count(f"-A {chain} ") == 4, "a jump to what redirects and one to what counts, for each family"
    # Those that redirect, and those that count what should be.
    assert rules.count("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m multiport --dports 8080") == 8
    assert "--sport" not in rules
    assert rules.count("-j REDIRECT --to-ports 15002") == 4

    def logged(host: str) -> bool:
        return re.search(rf"{re.escape(host)}\]?:8080: ended after", agent.log) is not None

    for host in ("127.0.0.1", "::1"):
        # The server speaks with the proxy, whose own connection has another port than the client's.
        assert netns.call(ask, host, 8080, b"").decode().split()[0] == host
        until(partial(logged, host), "the connection is logged")
    until(lambda: agent.status()["proxies"][0]["counters"]["connections"] == 2, "both are counted")
    for port, hosts in ((15002, ("127.0.0.1", "::1")), (15006, ("127.0.0.1",))):
        for host in hosts:
            assert netns.call(how_it_ends, host, port) == "ECONNRESET"
    until(lambda: agent.log.count("our own listener, and no target is configured") == 3, "each refusal is said")
    assert agent.stop() == 0
    assert "NFQA" not in saved(netns)
    assert not any(":1500" in each for each in listening(netns))


def test_the_environment_wins_over_the_contract_file(netns: Namespace, tmp_path: Path) -> None:
    server(netns, "echo", "127.0.0.1", 9000)
    text = (CONTRACTS / "transparent-proxy.toml").read_text()
    agent = Agent(netns, tmp_path, text, TARGET_ADDR="127.0.0.1:9000", LOG_LEVEL="warning", LOG_FORMAT="json")
    until(lambda: "15006" in netns.shell("ss -ltnH") and "REDIRECT" in saved(netns), "the rules are in")
    # Both have no other destination than the listener itself.
    for port in (15002, 15006):
        assert netns.call(ask, "127.0.0.1", port) == b"hello"
    # `stream-log` speaks at level info, a destination that refuses is a warning.
    assert netns.call(how_it_ends, "127.0.0.1", 8080) == "ECONNRESET"
    until(lambda: "cannot connect" in agent.log, "the warning is logged")
    events = [json.loads(line) for line in agent.log.splitlines()]
    assert {event["level"] for event in events} == {"warning"}
    (event,) = [event for event in events if "connection" in event]
    assert (event["dst"], event["dport"]) == ("127.0.0.1", 8080)
    assert f"connection {event['connection']}: " in event["message"]
    assert agent.stop() == 0


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_target_in_the_environment_that_is_none(netns: Namespace, verb: str) -> None:
    """Refused before anything on the host has changed."""
    before = netns.shell("cat /etc/passwd"), saved(netns)
    command = ("env", "TARGET_ADDR=nowhere", *COMMAND, verb, "--config", str(CONTRACTS / "transparent-proxy.toml"))
    done = netns.run(*command, check=False)
    assert done.returncode == 78
    assert done.stderr == (
        "environment: TARGET_ADDR: 'nowhere' is not a valid endpoint; "
        'allowed: HOST:PORT, as in "0.0.0.0:15002" or "[::]:15002"\n'
    )
    assert (netns.shell("cat /etc/passwd"), saved(netns)) == before


def test_several_queues_rules_and_a_proxy_in_one_agent(netns: Namespace, tmp_path: Path) -> None:
    """multi.toml unchanged, with transparent-proxy.toml as a drop-in beside it."""
    server(netns, "echo")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "proxy.toml").write_text((CONTRACTS / "transparent-proxy.toml").read_text())
    agent = Agent(netns, tmp_path, (CONTRACTS / "multi.toml").read_text()).ready()
    status = agent.status()
    assert {(queue["name"], queue["workers"][0]["number"]) for queue in status["queues"]} == {("web", 120), ("dns", 121)}
    assert [proxy["name"] for proxy in status["proxies"]] == ["tcp"]

    def talk() -> None:
        for port in (80, 8000, 8010):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=60)
        query = bytes.fromhex("123401000001000000000000") + b"\4name\7example\3org\0\0\1\0\1"
        socket.socket(type=socket.SOCK_DGRAM).sendto(query, ("127.0.0.1", 53))
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", 53), timeout=60)

    netns.call(talk)
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    # Each in OUTPUT and INPUT; a SYN and the reset that answers it.
    until(lambda: agent.totals("web")["accepted"] == 12, "web saw three connections")
    until(lambda: agent.totals("dns")["accepted"] == 6, "dns saw a connection and a datagram")
    until(lambda: ":8080: ended after" in agent.log, "the proxy carried one")
    for seen in ("tcp .*:80 OUTPUT", "tcp .*:8000 OUTPUT", "tcp .*:8010 INPUT", "tcp .*:53 INPUT", "udp .*:53 OUTPUT"):
        assert re.search(f"info    {seen} accept", agent.log), seen
    assert agent.stop() == 0
    assert "NFQA" not in saved(netns)
    assert netns.processes() == netns.running()


def test_the_configuration_and_the_element_of_the_page(netns: Namespace, tmp_path: Path) -> None:
    """docs/proxy.md word for word: its first configuration, and the element that it shows."""
    page = (ROOT / "docs" / "proxy.md").read_text()
    text = page.split("```toml\n")[1].split("```")[0]
    (tmp_path / "elements" / "my_package").mkdir(parents=True)
    (tmp_path / "elements" / "my_package" / "__init__.py").touch()
    (tmp_path / "elements" / "my_package" / "my_module.py").write_text(page.split("```python\n")[1].split("```")[0])
    line = re.search(r'`(elements = \["my_package.my_module:NoSecrets"\])`', page)
    assert line is not None
    server(netns, "echo")
    agent = Agent(netns, tmp_path, text).ready()
    assert netns.call(ask, "127.0.0.1", 8080, b"a secret") == b"a secret"
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    agent.configure(text.replace('elements = ["stream-log"]', line[1]))
    agent.verb("reload")
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    assert netns.call(how_it_ends, "127.0.0.1", 8080, b"a secret") == "ECONNRESET"
    assert agent.stop() == 0


def test_a_firewall_that_drops_what_is_redirected_is_named(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path
) -> None:
    """INPUT drops all but the server's own port, as ufw does; the line that the doctor names makes it work."""
    client, gateway, _ = routed
    server(gateway, "echo", "10.1.0.1")
    gateway.shell("iptables-legacy -w -A INPUT -i lo -j ACCEPT; iptables-legacy -w -A INPUT -p tcp --dport 8080 -j ACCEPT")
    gateway.shell("iptables-legacy -w -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT; iptables-legacy -w -P INPUT DROP")
    agent = Agent(gateway, tmp_path, configuration(hooks='"prerouting"')).ready()

    def knock() -> None:
        for _ in range(15):
            with socket.socket() as it, contextlib.suppress(OSError):
                it.settimeout(0.05)
                it.connect(("10.1.0.1", 8080))

    client.call(knock)
    until(lambda: sum(rule["packets"] for rule in agent.status()["rules"] if "REDIRECT" in rule["rule"]) >= 15, "it is counted")
    done = agent.verb("doctor", check=False)
    found = " ".join(done.stdout.split())
    assert re.search(r"redirected \d+ connections to port 15002, and 0 arrived", found), found
    line = "iptables -I INPUT -p tcp -m multiport --dports 15002 -m conntrack --ctstate DNAT -j ACCEPT"
    assert line in found
    gateway.shell(line.replace("iptables", "iptables-legacy"))
    assert client.call(ask, "10.1.0.1", 8080) == b"hello"
    assert agent.stop() == 0


def test_target_addr_without_a_configuration(netns: Namespace) -> None:
    """The proxy on both of its ports, for whatever is sent there, and no rule; a rule of the user's own keeps its destination."""
    server(netns, "who", "127.0.0.1", 8080)
    server(netns, "echo", "127.0.0.1", 8081)
    netns.shell("! test -e /etc/nfq-agent/nfq-agent.toml")
    agent = netns.start("env", "TARGET_ADDR=localhost:8080", *COMMAND, "run", stdout=-3, stderr=-3)
    until(lambda: {"0.0.0.0:15002", "0.0.0.0:15006", "[::]:15002", "[::]:15006"} <= listening(netns), "it listens")
    for host in ("127.0.0.1", "::1"):
        for port in (15002, 15006):
            assert netns.call(ask, host, port, b"").startswith(b"127.0.0.1 ")
    assert "NFQA" not in saved(netns)
    netns.shell(
        "iptables-legacy -w -t nat -A OUTPUT -p tcp --dport 8081 -m owner ! --uid-owner proxyuser -j REDIRECT --to-ports 15006"
    )
    assert netns.call(ask, "127.0.0.1", 8081) == b"hello"
    agent.terminate()
    assert agent.wait(timeout=PATIENCE) == 0


def test_a_rule_leads_to_the_listener_that_it_names(netns: Namespace, tmp_path: Path) -> None:
    server(netns, "echo")
    agent = Agent(
        netns, tmp_path, '[proxy.tcp]\n[rules.r]\nproxy = "tcp"\nport = 15006\nhooks = ["output"]\ntcp_ports = [8080]\n'
    )
    agent.ready()
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    assert "--to-ports 15006" in saved(netns)
    assert "--to-ports 15002" not in saved(netns)
    assert agent.stop() == 0
