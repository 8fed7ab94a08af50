"""The line of a dropped flow: once, with rule, owner and name, within a rate; and which settings leave it to elements."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from openings import client_hello
from planned import config_of

from nfq_agent.config.drop_lines import drop_lines
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements.chaos import Chaos, ChaosOptions
from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.elements.policy import Policy
from nfq_agent.flow import Flow
from nfq_agent.owner import Owners
from nfq_agent.packet import Packet
from nfq_agent.policy_options import PolicyOptions
from nfq_agent.service.drop_trace import PER_SECOND
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Verdict

CLIENT, SERVER = "10.0.0.1:40001", "192.0.2.7:443"
BY_NAME = {"default": "accept", "rule": [{"action": "drop", "name": "evil", "tls_sni": "*.evil.test"}]}
BY_PORT = {"default": "drop", "rule": [{"action": "accept", "dport": 53}, {"action": "drop", "dport": 23}]}


class OfPayments(Owners):
    def names(self, packet: Packet) -> Mapping[str, str]:
        return {"unit": "payments.service"}


class Fails(PacketElement):
    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        raise RuntimeError("broken")


class Judged:
    """A judge over real elements, and what it logged."""

    def __init__(self, *elements: PacketElement, default: Verdict = ACCEPT, **settings: Any) -> None:
        self.said: list[SimpleNamespace] = []
        self.counters = Counters()
        settings = {"monitor": False, "drop_lines": frozenset(), **settings}
        self.judge = PacketJudge(
            ElementChain(elements, default, context=Context(owners=OfPayments())),
            WorkerSettings(1, default, DROP, **settings), self.counters, self.emit, lambda *_: None,
        )  # fmt: skip

    def emit(self, message: str, level: str = "info", **fields: Any) -> None:
        self.said.append(SimpleNamespace(text=message, level=level, fields=fields))

    def take(self, *packets: Packet, now: float = 1.0) -> list[str]:
        self.judge.now = now
        self.said.clear()
        for packet in packets:
            self.judge.verdict(packet)
        self.judge.log_pending()
        return [each.text for each in self.said]


def policy(table: dict[str, Any]) -> Policy:
    return Policy("egress", PolicyOptions.from_table(table), print)


def by_name() -> list[PacketElement]:
    return [Dpi("dpi", DpiOptions.from_table({}), print), policy(BY_NAME)]


def connection(name: str, sport: int = 40001) -> list[Packet]:
    client, hello = f"10.0.0.1:{sport}", client_hello(name)
    return [
        tcp(client, SERVER, flags="S", seq=1),
        tcp(SERVER, client, flags="SA", seq=100, ack=2),
        tcp(client, SERVER, hello, seq=2, ack=101),
        tcp(client, SERVER, hello, seq=2, ack=101),
        tcp(client, SERVER, flags="FA", seq=2 + len(hello), ack=101),
    ]


@pytest.mark.parametrize("monitor", [False, True])
def test_a_denied_flow_has_one_line_with_rule_owner_and_name(monitor: bool) -> None:
    judged = Judged(*by_name(), monitor=monitor)
    outcome = "would drop" if monitor else "dropped"
    assert judged.take(*connection("a.evil.test")) == [
        f"{outcome} tcp {CLIENT} -> {SERVER} INPUT, tls a.evil.test, unit payments.service, by egress: rule 1 (evil)"
    ]
    fields = judged.said[0].fields
    assert fields.items() >= {
        "event": "drop", "src": "10.0.0.1", "dport": 443, "proto": "tcp", "tls_sni": "a.evil.test", "unit": "payments.service",
        "element": "egress", "rule": "rule 1 (evil)", "reason": "egress: rule 1 (evil)", "hook": "INPUT",
    }.items()  # fmt: skip
    assert fields.get("would") == ("drop" if monitor else None)
    assert judged.take(*connection("a.good.test", 40002)) == []
    # Another connection on the same ports.
    again = [tcp(CLIENT, SERVER, flags="S", seq=900000), tcp(CLIENT, SERVER, client_hello("b.evil.test"), seq=900001)]
    assert len(judged.take(*again)) == 1


def test_without_flows_a_five_tuple_is_told_once_a_minute() -> None:
    judged = Judged(policy(BY_PORT))
    packet = udp("10.0.0.1:9", "192.0.2.7:23")
    assert judged.take(packet, packet) == [
        "dropped udp 10.0.0.1:9 -> 192.0.2.7:23 INPUT, unit payments.service, by egress: rule 2"
    ]
    assert judged.take(udp("10.0.0.1:9", "192.0.2.7:53")) == []
    assert judged.take(packet, now=50) == []
    assert judged.take(packet, now=111) != []
    assert judged.take(udp("10.0.0.1:9", "192.0.2.7:24"), now=112)[0].endswith("by egress: default")


def test_the_default_an_error_and_what_cannot_be_read() -> None:
    assert Judged(default=DROP).take(udp(CLIENT, SERVER))[0].endswith("by default")
    assert Judged(Fails("x", None, print)).take(udp(CLIENT, SERVER))[0].endswith("by on_error")
    (line,) = Judged(default=DROP).take(Packet(b"\x45\0", id=1))
    assert line == "dropped packet of 2 bytes INPUT, by default"


def test_the_turn_by_five_tuple_has_lines_too() -> None:
    judged = Judged(policy(BY_PORT))
    judged.judge.pure_verdict(udp(CLIENT, SERVER))
    judged.judge.log_pending()
    assert [each.fields["rule"] for each in judged.said] == ["default"]


def test_flows_beyond_the_rate_are_counted() -> None:
    judged = Judged(policy(BY_PORT))
    more = 20
    packets = [udp(f"10.0.0.1:{port}", "192.0.2.7:23") for port in range(1000, 1000 + PER_SECOND + more)]
    assert len(judged.take(*packets, *packets)) == PER_SECOND
    assert judged.counters.log_suppressed == more
    judged.said.clear()
    judged.judge.count_drops()
    assert judged.said == []
    judged.judge.now = 20.0
    judged.judge.count_drops()
    assert [each.fields["suppressed"] for each in judged.said] == [more]
    assert judged.said[0].text.startswith(f"{more} more flows were dropped")


def test_who_logs_its_own_drops_has_no_second_line() -> None:
    assert Judged(policy(BY_PORT), drop_lines=frozenset({"egress"})).take(udp(CLIENT, SERVER)) == []
    assert Judged(policy(BY_PORT), drop_lines=None).take(udp(CLIENT, SERVER)) == []


@pytest.mark.parametrize(
    ("elements", "queue", "expected"),
    [
        (["egress"], {}, frozenset()),
        (["explained"], {}, frozenset({"explained"})),
        (["limit", "egress"], {"mode": "monitor"}, frozenset({"limit"})),
        (["log", "egress"], {}, None),
        (["record", "egress"], {}, None),
        (["egress"], {"log_drops": False}, None),
        ([], {"default": "drop"}, frozenset()),
    ],
)
def test_which_drops_the_worker_logs(elements: list[str], queue: dict[str, Any], expected: frozenset[str] | None) -> None:
    config = config_of(
        queue={"main": {"elements": elements, **queue}},
        element={
            "egress": {"type": "policy", "default": "drop"},
            "explained": {"type": "policy", "default": "drop", "explain": True},
            "limit": {"type": "rate-limit", "rate": "5/s"},
        },
    )
    assert drop_lines(config, config.queue["main"]) == expected


def test_a_fault_made_on_purpose_is_named_and_not_the_default() -> None:
    judged = Judged(Chaos("chaos drill", ChaosOptions(drop=1.0), Judged().emit))
    assert judged.take(tcp(CLIENT, SERVER)) == [
        "dropped tcp 10.0.0.1:40001 -> 192.0.2.7:443 INPUT, unit payments.service, by chaos drill"
    ]
