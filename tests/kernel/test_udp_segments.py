"""One send of several datagrams (UDP_SEGMENT): each is judged and counted, whatever the elements are."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from openings import dns_query

pytestmark = pytest.mark.kernel

# linux/udp.h
_UDP_SEGMENT = 103
# The elements of one queue for each port, and which of the four datagrams arrive; None where chance decides.
CHAINS: dict[int, tuple[str, list[int] | None]] = {
    53: ('"dpi", "names"', [0, 1, 3]),
    5301: ('"slow"', [0, 1]),
    5302: ('"third"', None),
    5303: ('"lossy"', []),
    5304: ('"log", "headers"', [0, 1, 2, 3]),
}
_ELEMENTS = """
[element.names]
type = "policy"
default = "accept"
rule = [ { action = "drop", dns_name = ["*.evil.test"] } ]

[element.headers]
type = "policy"
default = "accept"
explain = true

[element.slow]
type = "rate-limit"
rate = "1/m"
burst = 2
per = "destination"

[element.third]
type = "sample"
one_in = 3
rest = "drop"

[element.lossy]
type = "chaos"
drop = 1.0
"""


def config(chains: dict[int, str], more: str = "") -> str:
    """A queue for each port."""
    return _ELEMENTS + "".join(
        f"""
[queue.q{port}]
num = {170 + place}
fail_open = false
elements = [{elements}]
{more}
[rules.r{port}]
queue = "q{port}"
hooks = ["output"]
udp_ports = [{port}]
role = "client"
"""
        for place, (port, elements) in enumerate(chains.items())
    )


def arriving(host: str, port: int, datagrams: list[bytes], least: int) -> list[bytes]:
    """Which datagrams of one send arrive. least: so many of them do, however late."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_DGRAM) as server, socket.socket(kind, socket.SOCK_DGRAM) as client:
        server.bind((host, port))
        client.connect((host, port))
        client.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, len(datagrams[0]))
        client.send(b"".join(datagrams))
        found: list[bytes] = []
        try:
            while len(found) < len(datagrams):
                server.settimeout(60 if len(found) < least else 0.7)
                found.append(server.recv(2000))
        except TimeoutError:
            pass
        return found


def queries(*names: str) -> list[bytes]:
    """Queries of one length."""
    return [dns_query(name) for name in names]


def test_each_datagram_of_one_send_is_judged_and_counted(netns: Namespace, tmp_path: Path) -> None:
    sent = queries("a1.good.test", "a2.good.test", "a3.evil.test", "a4.good.test")
    agent = Agent(netns, tmp_path, config({port: elements for port, (elements, _) in CHAINS.items()})).ready()
    for port, (elements, passed) in CHAINS.items():
        for host in ("127.0.0.1", "::1"):
            found = netns.call(arriving, host, port, sent, 1 if passed is None else len(passed))
            if passed is None:
                assert len(found) in (1, 2)
            else:
                assert found == [sent[place] for place in passed], elements
        counted = agent.totals(f"q{port}")
        assert (counted["received"], counted["cut"]) == (2 * len(sent), 2), elements
        assert agent.queue(f"q{port}")["uninspected"] == 0
    until(lambda: agent.log.count("by default") >= 2 * len(sent), "each is explained")
    assert agent.stop() == 0


def test_quic_connections_in_one_send_are_judged_each(netns: Namespace, tmp_path: Path) -> None:
    from aioquic.quic.configuration import QuicConfiguration  # noqa: PLC0415  # needs cryptography
    from aioquic.quic.connection import QuicConnection  # noqa: PLC0415  # needs cryptography

    def flight(name: str) -> bytes:
        client = QuicConnection(configuration=QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name=name))
        client.connect(("192.0.2.1", 443), now=0.0)
        return client.datagrams_to_send(now=0.0)[0][0]

    names = _ELEMENTS.replace("dns_name", "tls_sni")
    text = config({443: '"dpi", "names"'}).replace(_ELEMENTS, names)
    agent = Agent(netns, tmp_path, text).ready()
    sent = [flight("a1.good.test"), flight("a2.evil.test"), flight("a3.good.test")]
    for host in ("127.0.0.1", "::1"):
        assert netns.call(arriving, host, 443, sent, 2) == [sent[0], sent[2]]
    assert agent.stop() == 0


def test_where_joined_datagrams_are_asked_for_names_are_in_conflict(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, config({53: '"dpi", "names"'}, "gso = true")).ready()
    checked = agent.verb("check")
    assert "judges the first" in checked.stdout + checked.stderr
    sent = queries("a1.good.test", "a2.evil.test")
    for host in ("127.0.0.1", "::1"):
        assert netns.call(arriving, host, 53, sent, 0) == []
        assert netns.call(arriving, host, 53, sent[:1], 1) == sent[:1]
    assert agent.stop() == 0


def test_a_bulk_tcp_stream_stays_whole_in_the_queue_that_cuts_udp(netns: Namespace, tmp_path: Path) -> None:
    netns.run("ip", "link", "set", "lo", "mtu", "1500")
    rules = config({53: '"dpi", "names"'}).replace("udp_ports = [53]", "udp_ports = [53]\ntcp_ports = [8080]")
    agent = Agent(netns, tmp_path, rules).ready()
    sent = queries("a1.good.test", "a2.evil.test", "a3.good.test", "a4.good.test")
    size = 8_000_000

    def stream(host: str) -> int:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 8080), family=kind) as server, socket.socket(kind) as client:
            client.connect((host, 8080))
            accepted, _ = server.accept()

            def send() -> None:
                client.sendall(bytes(size))
                client.close()

            sender = threading.Thread(target=send)
            sender.start()
            taken = 0
            with accepted:
                # A send of many datagrams in the middle of it: the stream's frames stay whole behind it, too.
                while taken < size // 2:
                    taken += len(accepted.recv(65536))
                assert arriving(host, 53, sent, 3) == [sent[0], sent[2], sent[3]]
                while data := accepted.recv(65536):
                    taken += len(data)
            sender.join()
            return taken

    for count, host in enumerate(("127.0.0.1", "::1"), 1):
        assert netns.call(stream, host) == size
        counted = agent.totals("q53")
        assert counted["cut"] == count
        # Cut, it would be 5,500 packets for each stream.
        assert counted["received"] < count * size / 1500 / 2
    assert agent.stop() == 0
