"""Every condition of a rule by itself: a packet that meets it, and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

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
