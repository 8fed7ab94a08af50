"""What is said of policies: what happens to packets, and what a change of the configuration changes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nfq_agent.config.capture import InlineConfig, TapConfig
from nfq_agent.config.model import Model
from nfq_agent.config.models import Agent, Config, LogConfig, QueueConfig
from nfq_agent.config.policy_summary import counted, differences, summary, told
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.elements import ElementError
from nfq_agent.elements.loading import reimported

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


def test_rules_that_move_are_not_told_as_gone_and_new() -> None:
    first, second, third = ({"action": "accept", "dport": port} for port in (1, 2, 3))
    assert change(config([first, second, third]), config([third, first, second])) == [
        "queue main: allow: rule 3 -> 1: accept dport 3"
    ]
    assert change(config([first, second, first]), config([second, first])) == ["queue main: allow: - accept dport 1"]
    assert change(config([first, second, third]), config([third, {"action": "drop", "dport": 2}, first])) == [
        "queue main: allow: + drop dport 2",
        "queue main: allow: - accept dport 2",
        "queue main: allow: rule 3 -> 1: accept dport 3",
    ]
    many = [{"action": "accept", "dport": port} for port in range(1, 3000)]
    assert len(change(config(many), config(many[::-1]))) == 2998


def test_an_element_of_another_type_and_of_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def using(kind: str) -> Config:
        return Config.model_validate({"queue": {"main": {"elements": ["e"]}}, "element": {"e": {"type": kind}}})

    assert change(using("log"), using("record"))[0] == "queue main: e: type log -> record"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    text = "from nfq_agent import PacketElement\nclass Mine(PacketElement):\n    pass\n"
    (file := tmp_path / "summed.py").write_text(text)
    before = summary(using("summed:Mine"))
    file.write_text(text + "#\n")
    assert list(differences(before, before)) == []
    with reimported():
        assert list(differences(before, summary(using("summed:Mine")))) == ["queue main: e: its code has changed"]


TABLES: dict[str, tuple[type[Model], dict[str, Any]]] = {
    "queue": (QueueConfig, {}),
    "tap": (TapConfig, {"interfaces": ["eth0"]}),
    "inline": (InlineConfig, {"interfaces": ["eth0"], "tcp_ports": [80]}),
    "proxy": (ProxyConfig, {"listen": ["0.0.0.0:1"], "capture": "tproxy"}),
    "agent": (Agent, {}),
    "log": (LogConfig, {}),
}
# One of these is another valid value of each key.
OTHERS: tuple[Any, ...] = (
    True, False, 5, 300, 4096, 5000, 300_000, 200_000_000, "1ms", "100ms", "5s", "0x10/0xf0", "0x70", "drop", "judge", "meta",
    "first", "owned", "off", "debug", "json", "client", "monitor", "clsact", "redirect", "port = 80", "other", "100:103",
    "192.0.2.1:80", ["192.0.2.1"], ["192.0.2.1:80"], ["eth9"], [81], ["/x"], ["log"], ["stream-log"],
)  # fmt: skip
# It has one value.
CONSTANT = ("inline", "fail_open")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (kind, field.alias or name)
        for kind, (model, _) in TABLES.items()
        for name, field in model.model_fields.items()
        if (kind, name) != CONSTANT
    ],
)
def test_no_key_changes_without_a_word(kind: str, key: str) -> None:
    def using(table: dict[str, Any]) -> Config:
        return Config.model_validate({kind: table if kind in ("agent", "log") else {"x": table}})

    begun = {**TABLES[kind][1], **({"balance": "10:11"} if key == "cpu_fanout" else {})}
    before, tried = using(begun), 0
    for value in OTHERS:
        try:
            after = using({**begun, key: value})
            lines = change(before, after)
        except (ValidationError, ElementError):
            continue
        if after != before:
            tried += 1
            assert any(f" {key} " in f" {line} " for line in lines), (value, lines)
            assert not re.search(r"\b(None|True|False)\b|[(]'|\[", re.sub(r"^\[\w+\]", "", lines[0])), lines
    assert tried


def test_what_a_reload_refuses_is_told() -> None:
    assert change(Config(), Config.model_validate({"agent": {"backend": "owned", "confinement": "off"}})) == [
        "[agent]: backend auto -> owned; a reload refuses it, a restart takes it",
        "[agent]: confinement available -> off",
    ]


def test_proxies_are_told_and_compared() -> None:
    before = Config.model_validate(
        {
            "proxy": {"web": {"listen": ["0.0.0.0:1"], "elements": ["slow"]}},
            "element": {"slow": {"type": "delay", "by": "100ms"}},
        }
    )
    assert list(told(summary(before))) == [
        "proxy web: listens on 0.0.0.0:1; elements slow; connects to where the client wanted to"
    ]
    after = Config.model_validate(
        {
            "proxy": {"web": {"listen": ["0.0.0.0:1"], "target": "192.0.2.1:80", "opening_timeout": "90s", "buffer": 5000,
                              "elements": ["slow"]}},
            "element": {"slow": {"type": "delay", "by": "70ms"}},
        }
    )  # fmt: skip
    assert change(before, after) == [
        "proxy web: target none -> 192.0.2.1:80",
        "proxy web: opening_timeout 1m -> 1.5m",
        "proxy web: buffer 262144 -> 5000",
        "proxy web: slow: by 100ms -> 70ms",
    ]
    assert change(before, Config()) == ["proxy web: no longer served"]


def test_beside_an_agent_of_an_earlier_version_only_what_it_tells_is_compared() -> None:
    older = summary(config())
    del older["[agent]"], older["[log]"], older["main"]["compile"]
    now = config(compile="auto").model_copy(update={"proxy": {"web": ProxyConfig()}})
    assert list(differences(older, summary(now))) == []


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


def test_changes_are_counted_by_what_they_are_of() -> None:
    lines = [
        "queue main: mode monitor -> enforce",
        "new tap pods: only watches",
        "[log]: level info -> debug",
        "new proxy web: x",
    ]
    assert list(counted(lines)) == ["2 changes of policy", "1 of proxies", "1 of the log"]
    assert list(counted(["[agent]: drift_check 5s -> 10s"])) == ["1 change of the agent's keys"]
    assert list(counted(["proxy web: a", "proxy web: no longer served"])) == ["2 changes of proxies"]


def test_ssh_that_is_dropped_by_a_change_is_named() -> None:
    both = "queue main: drops what no rule matches, SSH included"
    may = {"action": "accept", "dport": 22}, {"action": "accept", "sport": 22}
    assert both in change(config([*may]), config([may[0]]))
    assert "queue main: drops SSH" in change(config([], None), config([{"action": "drop", "dport": 22}], None))
    # An agent of an earlier version tells whether, and not which.
    before = json.loads(json.dumps(summary(config([*may]))))
    before["main"]["cuts_ssh"] = True
    assert both not in list(differences(before, summary(config([may[0]]))))
