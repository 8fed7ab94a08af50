"""Which ICMPv6 a default of drop leaves alone."""

from __future__ import annotations

import pytest

from nfq_agent.link_local import needed_by_link
from nfq_agent.packet import Packet
from nfq_agent.testing import Bench, icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP

ADDRESSES = "fe80::1", "ff02::1:ff00:7"


def discovery(kind: int, hop_limit: int = 255) -> Packet:
    packet = icmp(*ADDRESSES, bytes(20), kind=kind)
    return Packet(packet.payload[:7] + bytes([hop_limit]) + packet.payload[8:])


@pytest.mark.parametrize("kind", [133, 134, 135, 136, 137])
def test_neighbour_discovery(kind: int) -> None:
    assert needed_by_link(discovery(kind))
    assert not needed_by_link(discovery(kind, 254)), "a router has forwarded it"


@pytest.mark.parametrize("kind", [130, 131, 132, 143])
def test_listener_discovery(kind: int) -> None:
    assert needed_by_link(discovery(kind, 1))
    assert not needed_by_link(discovery(kind, 255))


@pytest.mark.parametrize(
    "packet",
    [
        discovery(128),
        discovery(1),
        icmp("192.0.2.1", "192.0.2.2", kind=135),
        tcp("[fe80::1]:1", "[fe80::2]:2"),
        udp("[fe80::1]:1", "[fe80::2]:135"),
        Packet(b""),
        Packet(discovery(135).payload[:40]),
    ],
)
def test_nothing_else(packet: Packet) -> None:
    assert not needed_by_link(packet)


@pytest.mark.parametrize("facts", [{}, {"tls_sni": "*.allowed.test"}])
@pytest.mark.parametrize("default", ["drop", "reject"])
def test_a_policy_that_drops_by_default(default: str, facts: dict[str, str]) -> None:
    rules = [{"action": "accept", "dport": 443, **facts}]
    policy = Bench("policy", before=[("dpi", {})] if facts else [], rule=rules, default=default)
    assert policy.decide(discovery(135)) is ACCEPT
    assert policy.decide(icmp(*ADDRESSES, kind=128)).outcome is DROP.action
    named = Bench("policy", rule=[{"action": "drop", "protocol": "icmpv6"}], default=default)
    assert named.decide(discovery(135)) is DROP


def test_the_default_of_a_queue() -> None:
    bench = Bench("rate-limit", rate="100/s", queue_default="drop")
    assert bench.decide(discovery(136)) is ACCEPT
    assert bench.decide(tcp("[fe80::1]:1", "[fe80::2]:2")) is DROP
