"""What is said of policies: what happens to packets, and what a change of the configuration changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nfq_agent.config.models import Config
from nfq_agent.config.policy_summary import cuts_ssh, differences, summary, told

GOOD = {"action": "accept", "tls_sni": ["*.good.test"], "dport": 443}


def config(
    rules: list[dict[str, Any]] | None = None,
    default: str | None = "drop",
    elements: tuple[str, ...] = ("dpi", "allow"),
    **queue: Any,
) -> Config:
    policy: dict[str, Any] = {"type": "policy", "rule": [GOOD] if rules is None else rules}
    if default is not None:
        policy["default"] = default
    return Config.model_validate(
        {
            "queue": {"main": {"num": 7, "elements": list(elements), **queue}},
            "rules": {"out": {"queue": "main", "all": True, "hooks": ["input", "output"]}},
            "element": {"allow": policy},
        }
    )


def change(before: Config, after: Config) -> list[str]:
    # As they come from a running agent.
    found: dict[str, Any] = json.loads(json.dumps(summary(before)))
    return list(differences(found, summary(after)))


def test_the_sentence_for_a_queue() -> None:
    assert list(told(summary(config()))) == [
        "queue main: mode enforce; allow: 1 rule, else drop; drops what no rule matches, SSH included"
    ]
    assert list(told(summary(config(mode="monitor")))) == ["queue main: mode monitor; allow: 1 rule, else drop"]
    assert list(told(summary(config(default=None)))) == [
        "queue main: mode enforce; allow: 1 rule, else the next element; default accept"
    ]


def captures(drops: str, **inline: Any) -> Config:
    policy = {"type": "policy", "default": "accept", "rule": [{"action": "drop", "tls_sni": [drops]}]}
    tables = {"interfaces": ["veth*"], "elements": ["dpi", "deny"]}
    return Config.model_validate(
        {"tap": {"pods": tables}, "inline": {"pods": {**tables, "tcp_ports": [443], **inline}}, "element": {"deny": policy}}
    )


def test_a_tap_and_an_inline_link_are_told_and_compared_too() -> None:
    before = captures("*.bad.test")
    assert list(told(summary(before))) == [
        "tap pods: only watches; deny: 1 rule, else accept",
        "inline pods: mode enforce; deny: 1 rule, else accept",
    ]
    assert change(before, captures("*.bad.test")) == []
    assert change(before, captures("*.evil.test", mode="monitor", tcp_ports=[443, "8000:8100"], exclude=["veth9"])) == [
        "tap pods: deny: - drop tls_sni *.bad.test",
        "tap pods: deny: + drop tls_sni *.evil.test",
        "inline pods: mode enforce -> monitor",
        "inline pods: exclude none -> veth9",
        "inline pods: tcp_ports 443 -> 443 8000:8100",
        "inline pods: deny: - drop tls_sni *.bad.test",
        "inline pods: deny: + drop tls_sni *.evil.test",
    ]
    assert change(captures("x.test", default="drop"), Config()) == ["tap pods: no longer served", "inline pods: no longer served"]


def test_nothing_changes() -> None:
    assert change(config(), config()) == []


def test_monitor_to_enforce_says_what_is_dropped() -> None:
    assert change(config(mode="monitor"), config()) == [
        "queue main: mode monitor -> enforce",
        "queue main: drops what no rule matches, SSH included",
    ]


def test_a_default_that_turns() -> None:
    assert change(config(default="accept"), config()) == [
        "queue main: allow: default accept -> drop",
        "queue main: drops what no rule matches, SSH included",
    ]
    assert change(config(elements=()), config(elements=(), default="drop")) == []


def test_rules_that_come_and_go() -> None:
    lan = {"action": "accept", "name": "lan", "dst": "10.0.0.0/8", "protocol": "udp"}
    assert change(config(), config([lan, GOOD])) == ["queue main: allow: + accept (lan) dst 10.0.0.0/8, protocol 17"]
    assert change(config([GOOD, lan]), config()) == ["queue main: allow: - accept (lan) dst 10.0.0.0/8, protocol 17"]


def test_a_thousand_other_rules() -> None:
    old, new = (
        [{"action": "accept", "tls_sni": f"{name}{number}.good.test"} for number in range(1000)] for name in ("old", "new")
    )
    lines = change(config(old), config(new))
    assert len(lines) == 2000
    assert {lines[0], lines[-1]} == {
        "queue main: allow: - accept tls_sni old0.good.test", "queue main: allow: + accept tls_sni new999.good.test"
    }  # fmt: skip


def test_other_options_elements_and_queues() -> None:
    assert change(config(), config(elements=("dpi", "allow", "log"))) == ["queue main: elements dpi, allow -> dpi, allow, log"]
    other = config().model_copy(update={"queue": {}})
    assert change(config(), other) == ["queue main: no longer served"]
    assert change(other, config())[0].startswith("new queue main: mode enforce")


def test_long_lists_that_differ_read_differently() -> None:
    many = [f"10.0.{number}.0/24" for number in range(200)]
    lines = change(config([{"action": "drop", "src": many}]), config([{"action": "drop", "src": [*many[:-1], "10.9.0.0/24"]}]))
    assert len(lines) == 2
    assert all(len(line) < 250 and "and 192 more" in line for line in lines)


@pytest.mark.parametrize(
    ("rule", "cut"),
    [
        (GOOD, True),
        ({"action": "accept", "dport": 22}, False),
        ({"action": "accept", "dport": "20:30", "protocol": "tcp"}, False),
        ({"action": "accept", "protocol": "ssh"}, False),
        ({"action": "accept", "src": "10.0.0.0/8"}, False),
        ({"action": "drop", "dport": 22}, True),
        ({"action": "accept", "protocol": "udp"}, True),
        ({"action": "accept", "dport": 443}, True),
    ],
)
def test_when_ssh_is_cut(rule: dict[str, Any], cut: bool) -> None:
    assert cuts_ssh(config([rule]), "main") is cut


def test_ssh_is_not_cut_where_no_rule_takes_it() -> None:
    web = config().model_copy(deep=True)
    web = Config.model_validate({**web.model_dump(exclude_unset=True), "rules": {"web": {"queue": "main", "tcp_ports": [80]}}})
    assert not cuts_ssh(web, "main")
