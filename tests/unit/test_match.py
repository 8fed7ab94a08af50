"""Every condition of a rule by itself: a packet that meets it, and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.geography import Whereabouts
from nfq_agent.match import Conditions, Match
from nfq_agent.packet import Hook, Packet
from nfq_agent.testing import tcp, udp

A, B = "192.0.2.1:40000", "198.51.100.7:443"
NAMES = {1: "lo", 2: "eth0"}


def meets(condition: dict[str, Any], packet: Packet) -> bool:
    """Whether a packet meets a condition, asked beside one that every packet meets and one that none does."""
    rules = [Conditions(), Conditions.model_validate(condition), Conditions.model_validate({"dport": 1})]
    bits = Match(rules, NAMES.__getitem__).bits(packet, packet.headers.five_tuple)
    assert bits in (0b001, 0b011)
    return bits == 0b011


@pytest.mark.parametrize(
    ("condition", "met", "not_met"),
    [
        ({"src": "192.0.2.0/24"}, tcp(A, B), tcp(B, A)),
        ({"dst": "198.51.100.7"}, tcp(A, B), tcp(B, A)),
        ({"sport": 40000}, tcp(A, B), tcp(B, A)),
        ({"sport": "39999:40001"}, tcp(A, B), tcp("192.0.2.1:40002", B)),
        ({"dport": [80, 443]}, tcp(A, B), tcp(A, "198.51.100.7:442")),
        ({"protocol": "udp"}, udp(A, B), tcp(A, B)),
        ({"hook": "output"}, tcp(A, B, hook=Hook.OUTPUT), tcp(A, B, hook=Hook.INPUT)),
        ({"direction": "in"}, tcp(A, B, hook=Hook.INPUT), tcp(A, B, hook=Hook.OUTPUT)),
        ({"uid": 5}, tcp(A, B, hook=Hook.OUTPUT, uid=5), tcp(A, B, hook=Hook.OUTPUT, uid=6)),
        ({"gid": 7}, tcp(A, B, hook=Hook.OUTPUT, gid=7), tcp(A, B, hook=Hook.OUTPUT, gid=6)),
        ({"interface": "eth*"}, tcp(A, B, indev=2), tcp(A, B, indev=1)),
        ({"interface": "eth0"}, tcp(A, B, hook=Hook.OUTPUT, outdev=2), tcp(A, B, hook=Hook.OUTPUT, outdev=1)),
    ],
)
def test_one_condition(condition: dict[str, Any], met: Packet, not_met: Packet) -> None:
    assert meets(condition, met)
    assert not meets(condition, not_met)


@pytest.mark.parametrize(
    ("condition", "parts", "by_process"),
    [
        ({}, (), False),
        ({"protocol": "udp"}, (), False),
        ({"src": "192.0.2.0/24", "sport": 7}, ("src", "sport"), False),
        ({"dst": "192.0.2.0/24", "dport": 7}, ("dst", "dport"), False),
        ({"uid": 5}, None, True),
        ({"gid": 7}, None, True),
        ({"hook": "output"}, None, False),
        ({"dst_country": "DE"}, None, False),
        ({"src_asn": 64496}, None, False),
        ({"interface": "eth0"}, None, False),
    ],
)
def test_what_a_condition_reads(condition: dict[str, Any], parts: tuple[str, ...] | None, by_process: bool) -> None:
    match = Match([Conditions(), Conditions.model_validate(condition)], NAMES.__getitem__)
    assert match.parts == parts
    assert match.by_process is by_process


class Germany:
    """All of 198.51.100.0/24 is there, in AS 64496."""

    def whereabouts(self, address: bytes) -> Whereabouts:
        return Whereabouts("DE", 64496) if address.startswith(bytes((198, 51, 100))) else Whereabouts()


@pytest.mark.parametrize("key", ["country", "asn"])
def test_the_place_of_each_end_is_its_own_condition(key: str) -> None:
    value = {"country": "DE", "asn": 64496}[key]
    rules = [Conditions(), Conditions.model_validate({f"dst_{key}": value}), Conditions.model_validate({f"src_{key}": value})]
    match = Match(rules, NAMES.__getitem__, Germany())
    assert match.bits(tcp(A, B), tcp(A, B).headers.five_tuple) == 0b011
    assert match.bits(tcp(B, A), tcp(B, A).headers.five_tuple) == 0b101
    # Without a database no address belongs anywhere.
    nowhere = Match(rules, NAMES.__getitem__)
    assert nowhere.bits(tcp(A, B), tcp(A, B).headers.five_tuple) == 0b001


def test_a_forwarded_packet_meets_the_name_of_either_interface() -> None:
    rules = [Conditions.model_validate({"interface": name}) for name in ("lo", "eth0", "wg0")]
    match = Match(rules, NAMES.__getitem__)
    packet = tcp(A, B, hook=Hook.FORWARD, indev=1, outdev=2)
    assert match.bits(packet, packet.headers.five_tuple) == 0b011


@pytest.mark.parametrize(
    "condition", [{"uid": 5}, {"gid": 5}, {"protocol": 0}, {"hook": "input"}, {"dport": 0}, {"sport": "0:1"}]
)
def test_a_condition_alone_meets_no_other_packet(condition: dict[str, Any]) -> None:
    packet = tcp(A, B, hook=Hook.OUTPUT, uid=6, gid=6)
    match = Match([Conditions.model_validate(condition)], NAMES.__getitem__)
    assert match.bits(packet, packet.headers.five_tuple) == 0
