"""Which DNS answers are believed: answers by hand, that differ from a sound one in one point each."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent import until
from name_servers import ADDRESS, COMES, ECHO_TCP, GOOD, TLS, Resolver, curl, echoes, named_hosts, query, start
from namespace import Namespace

pytestmark = pytest.mark.kernel


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """Servers, and the host with the agent."""
    with named_hosts(tmp_path) as hosts:
        yield hosts


# What an answer is made of, and whether it is believed.
FORGED = {
    "sound": (f"[message(number, question, {GOOD})]", True),
    "another-number": (f"[message(number ^ 1, question, {GOOD})]", False),
    "another-question": (f'[message(number, labels("b.good.test") + question[-4:], {GOOD})]', False),
    "another-type": (f"[message(number, question[:-4] + bytes((0, 28, 0, 1)), {GOOD})]", False),
    "an-error": (f"[message(number, question, {GOOD}, flags=0x8183)]", False),
    "no-response": (f"[message(number, question, {GOOD}, flags=0x0100)]", False),
    "another-owner": (f'[message(number, question, record("c.good.test", 1, {ADDRESS}))]', False),
    "the-second": (f'[message(number, question, record("a.good.test", 1, bytes(4))), message(number, question, {GOOD})]', False),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_answers_are_not_believed(hosts: tuple[Namespace, Namespace], tmp_path: Path, kind: str) -> None:
    servers, host = hosts
    reply, believed = FORGED[kind]
    Resolver(servers, reply)
    agent = start(host, tmp_path, '"10.203.0.3"')
    query(host, "a.good.test")
    assert echoes(host, "10.203.0.1", ECHO_TCP, COMES if believed else 0.5) is believed, agent.log
    assert agent.stop() == 0


def test_the_answer_of_another_resolver_is_not_believed(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    servers, host = hosts
    Resolver(servers, FORGED["sound"][0])
    agent = start(host, tmp_path)
    query(host, "a.good.test")
    assert not echoes(host, "10.203.0.1", ECHO_TCP), agent.log
    assert agent.stop() == 0


def test_an_answer_without_a_question_is_not_believed(hosts: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    servers, host = hosts
    agent = start(host, tmp_path, '"10.203.0.3"')

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
            resolver.bind(("10.203.0.3", 53))
            name = b"\1a\4good\4test\0"
            answer = name + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton("10.203.0.1")
            message = struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0) + name + struct.pack("!HH", 1, 1) + answer
            resolver.sendto(message, ("10.203.0.2", 5555))

    servers.call(send)
    until(lambda: agent.totals("egress")["received"] >= 1, "the answer was judged")
    assert not echoes(host, "10.203.0.1", ECHO_TCP), agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize("kind", ["hint", "alias"])
def test_a_zone_of_others_proves_no_allowed_name(hosts: tuple[Namespace, Namespace], tmp_path: Path, kind: str) -> None:
    """A user asks for a record of a zone of their own, which names an allowed host: with addresses, or as what stands for it."""
    servers, host = hosts
    data = 'bytes((0, 1)) + labels("a.good.test") + bytes((0, 4, 0, 4, 10, 203, 0, 3))'
    if kind == "alias":
        data = 'bytes(2) + labels("a.good.test")'
    record = f'record("x.evil.test", 65, {data})'
    address = 'record("x.evil.test", 1, bytes((10, 203, 0, 3)))'
    Resolver(servers, f"[message(number, question, {record} if kind == 65 else {address})]")
    agent = start(host, tmp_path, '"10.203.0.3"')
    for each in (65, 1):
        query(host, "x.evil.test", each)
    assert not curl(host, "a.good.test", "10.203.0.3", TLS), agent.log
    assert not echoes(host, "10.203.0.3", ECHO_TCP), agent.log
    assert agent.stop() == 0


SERVICE = {
    # A hint for the name itself; another host with a hint; another host whose address is asked for by itself, as an alias too.
    "own-hint": ("bytes((0, 1, 0, 0, 4, 0, 4)) + ADDRESS", False),
    "host-with-hint": ('bytes((0, 1)) + labels("edge.cdn.test") + bytes((0, 4, 0, 4)) + ADDRESS', False),
    "host": ('bytes((0, 1)) + labels("edge.cdn.test") + bytes((0, 1, 0, 3, 2)) + b"h2"', True),
    "alias": ('bytes(2) + labels("edge.cdn.test")', True),
}


@pytest.mark.parametrize("kind", SERVICE)
def test_service_records(hosts: tuple[Namespace, Namespace], tmp_path: Path, kind: str) -> None:
    servers, host = hosts
    data, asks_again = SERVICE[kind]
    record = f'record("a.good.test", 65, {data.replace("ADDRESS", ADDRESS)})'
    Resolver(servers, f'[message(number, question, {record} if kind == 65 else record("edge.cdn.test", 1, {ADDRESS}))]')
    agent = start(host, tmp_path, '"10.203.0.3"')
    query(host, "a.good.test", 65)
    if asks_again:
        assert not curl(host, "a.good.test", "10.203.0.1", TLS), agent.log
        query(host, "edge.cdn.test", 1)
    assert curl(host, "a.good.test", "10.203.0.1", TLS, COMES), agent.log
    assert not curl(host, "a.good.test", "10.203.0.3", TLS), agent.log
    assert agent.stop() == 0
