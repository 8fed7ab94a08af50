"""`learn --for`: what it makes of the records of an agent, and that it proves the proposal by them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from nfq_agent.cli import learn_live, learned, proposal
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.learn_live import Watching
from nfq_agent.cli.learned import Learned, Wish
from nfq_agent.config.file import load
from nfq_agent.public_suffixes import PublicSuffixes

CONFIG = """
[queue.egress]
num = 7
mode = "monitor"
elements = ["dpi"]
[rules.out]
queue = "egress"
hooks = ["output"]
all = true
"""
LIST = """
// a comment
com
uk
co.uk
*.ck
!www.ck
github.io
"""


def record(number: int, dst: str = "192.0.2.1", dport: int = 443, proto: str = "tcp", **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": "flow", "queue": 7, "hook": "OUTPUT", "proto": proto, "src": "10.0.0.1", "sport": 40000 + number, "dst": dst,
        "dport": dport, "verdict": "accept", "first": 100.0 + number, "duration": 1.0, "packets": 2, "bytes": 100,
        "pkts_toserver": 1, "bytes_toserver": 50, "pkts_toclient": 1, "bytes_toclient": 50,
    }  # fmt: skip
    return found | more


def watch(*records: dict[str, Any], grouped: Any = None) -> Watching:
    watching = Watching({7: "egress"}, grouped)
    watching.add(records, 200.0, 1_700_000_000.0)
    watching.end(1_700_000_000.0)
    return watching


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    path = tmp_path / "agent.toml"
    path.write_text(CONFIG)
    return Flags(path)


def test_a_rule_for_each_unit_and_name_that_accepts_what_was_seen(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pay: dict[str, Any] = {
        "protocol": "tls",
        "tls_sni": "pay.test",
        "unit": "shop.service",
        "cgroup": "/system.slice/shop.service",
    }
    watching = watch(
        record(1), record(1, **pay), record(1, **pay, kind="end"), record(2, **pay), record(3, **pay | {"unit": "other.service"}),
        record(4, protocol="tls", tls_sni="pay.test", unit="session-4.scope"),
        record(5, "192.0.2.5", 5000),
        record(6, "192.0.2.53", 53, "udp", protocol="dns", dns_name=["pay.test"], container="web"),
        {key: value for key, value in record(7, "192.0.2.9", proto="proto-132").items() if key not in ("sport", "dport")},
    )  # fmt: skip
    assert proposal.write(load(flags.config), watching.learned, tmp_path / "out.toml")
    text = (tmp_path / "out.toml").read_text()
    rules = tomllib.loads(text)["element"]["learned-egress"]["rule"]
    assert [{key: value for key, value in rule.items() if key != "action"} for rule in rules] == [
        {"unit": "shop.service", "tls_sni": "pay.test", "dport": 443},
        {"unit": "other.service", "tls_sni": "pay.test", "dport": 443},
        {"tls_sni": "pay.test", "dport": 443},
        {"protocol": "tcp", "dst": "192.0.2.5", "dport": 5000},
        {"container": "web", "protocol": "dns", "dst": "192.0.2.53", "dport": 53},
        {"protocol": 132, "dst": "192.0.2.9"},
    ]
    assert "# 2 flows, " in text
    assert ", from shop.service\n" in text
    # What another unit asks for, or another name, is not accepted.
    extra = Watching({7: "egress"}, None)
    extra.add([record(8, **pay | {"tls_sni": "b.test"}), record(9, **pay)], 200.0, 0.0)
    extra.end(0.0)
    accepted, total, missed = extra.judge(proposal.proposed(flags, load(flags.config), {"egress": watching.learned["egress"]}))
    assert (accepted, total) == (1, 2)
    assert missed == ["tcp 10.0.0.1:40008 -> 192.0.2.1:443 b.test"]
    assert capsys.readouterr().out == ""


def test_the_whole_watch_is_covered_by_its_own_proposal(flags: Flags) -> None:
    watching = watch(record(1, protocol="tls", tls_sni="a.test"), record(2, protocol="http", http_host="b.test", dport=80))
    assert watching.judge(proposal.proposed(flags, load(flags.config), watching.learned)) == (2, 2, [])


@pytest.mark.parametrize("proto", ["sctp", "dccp", "udplite", "gre", "esp", "icmp", "proto-99", "tcp", "udp"])
@pytest.mark.parametrize("dst", ["192.0.2.1", "2001:db8::9"])
def test_a_flow_of_any_protocol_is_covered_by_its_own_proposal(flags: Flags, proto: str, dst: str) -> None:
    seen = record(1, dst, proto="icmpv6" if (proto, ":" in dst) == ("icmp", True) else proto)
    if ":" in dst:
        seen["src"] = "fd00::1"
    if proto not in ("sctp", "dccp", "udplite"):
        # Nor do later fragments have ports.
        del seen["sport"], seen["dport"]
    watching = watch(seen)
    assert watching.judge(proposal.proposed(flags, load(flags.config), watching.learned)) == (1, 1, [])


def test_what_the_agent_drops_is_not_proposed_and_counted() -> None:
    watching = watch(
        record(1, verdict="drop"), record(2, verdict="accept", would="drop"), {"kind": "flow", "src": 3}, record(3, queue=9)
    )
    assert len(watching.learned["egress"]) == 1
    assert (watching.dropped, watching.flows, watching.unreadable, watching.elsewhere) == (1, 1, 1, 1)


def test_a_flow_that_is_silent_for_long_is_learned_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching({7: "egress"}, None)
    watching.add([record(1)], 200.0, 0.0)
    watching.add([], 300.0, 0.0)
    assert watching.flows == 0
    watching.add([], 321.0, 0.0)
    assert watching.flows == 1
    monkeypatch.setattr(learn_live, "_MOST_FLOWS", 2)
    watching.add([record(number) for number in range(2, 6)], 322.0, 0.0)
    assert watching.flows == 3


def test_rules_and_different_flows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MOST_RULES", 2)
    monkeypatch.setattr(learn_live, "_MOST_SEEN", 1)
    watching = watch(*(record(port, dport=port) for port in range(1, 5)))
    assert len(watching.learned["egress"]) == 2
    assert watching.learned["egress"].left_out == 2
    assert watching.not_judged == 3


def test_names_are_grouped_by_registered_domain_when_asked(flags: Flags) -> None:
    suffixes = PublicSuffixes(LIST.splitlines())
    names = ("a.shop.co.uk", "b.shop.co.uk", "shop.co.uk")
    flows = [record(number, protocol="tls", tls_sni=name) for number, name in enumerate(names)]
    watching = watch(*flows, grouped=suffixes.registrable)
    (wish,) = watching.learned["egress"].evidence
    assert wish.table == {"tls_sni": ["shop.co.uk", "*.shop.co.uk"], "dport": 443}
    assert watching.judge(proposal.proposed(flags, load(flags.config), watching.learned)) == (3, 3, [])


@pytest.mark.parametrize("name", ["github.io", "localhost", "192.0.2.1"])
def test_a_name_that_is_nobodys_domain_is_grouped_with_no_other(flags: Flags, name: str) -> None:
    watching = watch(record(1, protocol="http", http_host=name), grouped=PublicSuffixes(LIST.splitlines()).registrable)
    (wish,) = watching.learned["egress"].evidence
    assert wish.table == {"http_host": name, "dport": 443}


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("www.example.com", "example.com"),
        ("example.com", "example.com"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("me.github.io", "me.github.io"),
        ("x.me.github.io", "me.github.io"),
        ("a.b.c.ck", "b.c.ck"),
        ("x.www.ck", "www.ck"),
        # No registrant has all names below these.
        ("co.uk", ""),
        ("github.io", ""),
        ("localhost", ""),
        ("192.0.2.1", ""),
        ("[2001:db8::1]", ""),
        ("host.internal", "host.internal"),
        ("A.Example.COM.", "example.com"),
    ],
)
def test_the_registered_domain_of_a_name(name: str, domain: str) -> None:
    assert PublicSuffixes(LIST.splitlines()).registrable(name) == domain


def test_a_comment_counts_clients_it_does_not_keep() -> None:
    found = Learned()
    for number in range(100):
        found.add({Wish("tcp", "", "192.0.2.1", 1): 1.0}, 2.0, f"10.0.0.{number}")
    (evidence,) = found.evidence.values()
    assert evidence.comment.endswith("from 10.0.0.0, 10.0.0.1, 10.0.0.10 and at least 61 more")
