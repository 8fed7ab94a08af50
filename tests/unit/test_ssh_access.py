"""Which configurations drop SSH: by the rules that take it, by each kind of policy, both ways, at an inline link."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.capture.recording import Recorded
from nfq_agent.cli.judging import Judging
from nfq_agent.cli.sighting import Fate, Sighting
from nfq_agent.config.models import Config
from nfq_agent.config.ssh_access import cuts_ssh
from nfq_agent.packet import Hook
from nfq_agent.testing import tcp

CLIENT, SERVER = "192.0.2.7:40000", "10.0.0.1:22"
IN, OUT = ("input",), ("output",)
BOTH = ("input", "output")


def config(rules: list[dict[str, Any]], default: str | None = "drop", taken: dict[str, Any] | None = None, **more: Any) -> Config:
    policy: dict[str, Any] = {"type": "policy", "rule": rules, **({} if default is None else {"default": default})}
    queue = {key: more.pop(key) for key in ("mode", "default") if key in more}
    return Config.model_validate(
        {
            "queue": {"main": {"num": 7, "elements": ["dpi", "allow"], **queue}},
            "rules": {"r": {"queue": "main", "hooks": list(BOTH), **(taken or {"all": True})}},
            "element": {"allow": {**policy, **more}},
        }
    )


def cut(*args: Any, **more: Any) -> str:
    found = config(*args, **more)
    return cuts_ssh(found, found.queue["main"])


SSH = {"action": "accept", "dport": 22}
ANSWERS = {"action": "accept", "sport": 22}
NAME = {"action": "accept", "tls_sni": "*.good.test", "dport": 443}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([], "SSH"),
        ([NAME], "SSH"),
        ([NAME, SSH], ""),
        # Without a fact in any rule each packet is judged by itself, and the answers come from port 22.
        ([SSH], "SSH"),
        ([SSH, ANSWERS], ""),
        ([SSH, {"action": "accept", "dport": "1024:65535"}], ""),
        ([SSH, {"action": "accept", "direction": "out"}], "outgoing SSH"),
        ([SSH, {"action": "accept", "direction": "in"}], "SSH"),
        ([SSH, {"action": "accept", "src": "10.0.0.0/8"}], ""),
        ([NAME, {"action": "accept", "dport": "20:30", "protocol": "tcp"}], ""),
        ([{"action": "accept", "protocol": "ssh"}], ""),
        ([{"action": "accept", "ssh_banner": "*"}], ""),
        ([{"action": "accept", "unit": "ssh.service"}], ""),
        ([{"action": "accept", "facts": {"mine": "*"}}], ""),
        ([{"action": "accept", "facts": {"dpi": "*"}, "dst": "10.0.0.0/8"}], ""),
        ([{"action": "accept", "protocol": "udp"}], "SSH"),
        ([NAME, {"action": "drop", "dport": 22}], "SSH"),
        # The first rule that matches decides.
        ([NAME, {"action": "drop", "dport": 22}, SSH], "SSH"),
        ([NAME, {"action": "drop", "dport": 22, "src": "192.0.2.0/24"}, SSH], ""),
        ([{"action": "reject", "protocol": "ssh"}, SSH], "SSH"),
        ([{"action": "drop", "protocol": "http"}, SSH], ""),
    ],
)
def test_by_the_rules_of_a_policy_that_drops_the_rest(rules: list[dict[str, Any]], said: str) -> None:
    assert cut(rules) == said


@pytest.mark.parametrize(
    ("rules", "more", "said"),
    [
        ([{"action": "drop", "dport": 22}], {"default": None}, "SSH"),
        ([{"action": "drop"}], {"default": "accept"}, "SSH"),
        ([{"action": "drop", "sport": 22}], {"default": "accept"}, "SSH"),
        ([{"action": "drop", "dport": 22, "src": "192.0.2.0/24"}], {"default": "accept"}, ""),
        ([NAME, SSH], {"undecided": "drop"}, ""),
        ([{"action": "accept", "protocol": "ssh"}], {"undecided": "drop"}, "SSH"),
        ([{"action": "accept", "dst_name": "*.good.test"}], {"undecided": "drop"}, ""),
        ([{"action": "accept", "facts": {"dpi": "*"}, "src": "192.0.2.0/24"}, SSH], {"undecided": "drop"}, ""),
        ([], {"mode": "monitor"}, ""),
    ],
)
def test_by_what_else_a_policy_has(rules: list[dict[str, Any]], more: dict[str, Any], said: str) -> None:
    assert cut(rules, **more) == said


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ({"tcp_ports": [80]}, ""),
        ({"tcp_ports": ["20:30"]}, "SSH"),
        ({"tcp_syn": True}, "SSH"),
        ({"tcp_syn": True, "tcp_ports": [443]}, ""),
        ({"protocol": ["tcp"]}, "SSH"),
        ({"protocol": ["udp"]}, ""),
        ({"all": True, "not_tcp_ports": [22]}, ""),
        ({"all": True, "hooks": ["forward"]}, "forwarded SSH"),
        ({"tcp_ports": [22], "hooks": ["output"]}, "SSH"),
        ({"tcp_ports": [22], "hooks": ["output"], "role": "client"}, "outgoing SSH"),
        ({"tcp_ports": [22], "role": "client"}, "outgoing SSH"),
        ({"tcp_ports": [22], "role": "server"}, "SSH"),
        ({"tcp_syn": True, "hooks": ["output"]}, "outgoing SSH"),
        ({"tcp_syn": True, "hooks": ["prerouting"]}, "SSH"),
    ],
)
def test_by_the_rule_that_takes_the_packets(taken: dict[str, Any], said: str) -> None:
    assert cut([NAME], taken=taken) == said


@pytest.mark.parametrize(
    ("inline", "said"),
    [
        ({}, "SSH"),
        ({"tcp_ports": [22]}, "SSH"),
        ({"tcp_ports": [80]}, ""),
        ({"udp_ports": [22]}, ""),
        ({"mode": "monitor"}, ""),
        ({"elements": [], "default": "drop"}, "SSH"),
        ({"elements": []}, ""),
    ],
)
def test_at_an_inline_link(inline: dict[str, Any], said: str) -> None:
    found = Config.model_validate(
        {
            "inline": {"link": {"interfaces": ["eth0"], "elements": ["dpi", "allow"], **inline}},
            "element": {"allow": {"type": "policy", "rule": [NAME], "default": "drop"}},
        }
    )
    assert cuts_ssh(found, found.inline["link"]) == said


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    "rules",
    [[], [SSH], [SSH, ANSWERS], [ANSWERS], [{"action": "drop", "dport": 22}, SSH], [{"action": "accept", "dport": "22:65535"}]],
)
def test_the_chain_itself_drops_what_is_said_to_be_dropped(rules: list[dict[str, Any]], flow: bool) -> None:
    judging = Judging(config([*rules, *[NAME] * flow]), enforce=False)
    packets = [
        (Hook.INPUT, tcp(CLIENT, SERVER, flags="S", seq=1)),
        (Hook.OUTPUT, tcp(SERVER, CLIENT, flags="SA", seq=1, ack=2)),
        (Hook.INPUT, tcp(CLIENT, SERVER, b"SSH-2.0-client\r\n", seq=2, ack=2)),
        (Hook.OUTPUT, tcp(SERVER, CLIENT, b"SSH-2.0-server\r\n", seq=2, ack=18)),
    ]
    fates = [
        judging.judge(Recorded(1.0 + number, packet.payload, packet.length, ""), Sighting(hook, Fate.PASSED)).outcome
        for number, (hook, packet) in enumerate(packets)
    ]
    assert (max(fates) is Fate.DROPPED) == bool(cut([*rules, *[NAME] * flow]))
