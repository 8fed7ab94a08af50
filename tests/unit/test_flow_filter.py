"""The filter language: what it finds, where its errors point, and the policy rules that it comes to."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from openings import client_hello
from pydantic import ValidationError

from nfq_agent.elements.policy import Policy
from nfq_agent.filter_rules import rule_tables
from nfq_agent.flow_filter import FIELDS, NAMES, FilterError, parse
from nfq_agent.policy_options import PolicyOptions
from nfq_agent.protocols.known import OWNERS
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import DROP

FLOW = {
    "unit": "payments.service", "tls_sni": "api.Stripe.com", "protocol": "tls", "proto": "tcp", "verdict": "drop",
    "src": "10.0.0.5", "sport": 40001, "dst": "192.0.2.7", "dport": 443, "rule": "rule 3 (deny)", "bytes": 1200, "duration": 93.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("unit = payments.service and name ~ *.stripe.com and verdict = drop", True),
        ("unit = other.service or name ~ *.stripe.com and verdict = accept", False),
        ("(unit = other.service or name ~ *.stripe.com) and verdict = drop", True),
        ("not verdict = accept", True),
        ("name = api.stripe.com", True),
        ("name = *.stripe.com", False),
        ("name !~ *.stripe.com", False),
        ("container != web", True),
        ("container = web", False),
        ("not container = web", True),
        ("dst = 192.0.2.0/24 and src = 10.0.0.5", True),
        ("host = 10.0.0.0/8", True),
        ("dst = 2001:db8::/32", False),
        ("port = 80,443", True),
        ("dport = 400:500", True),
        ("dport = 80", False),
        ("protocol = tcp and protocol = tls", True),
        ("bytes > 1000 and bytes <= 1200", True),
        ("bytes < 1200", False),
        ("bytes > 1kB and bytes < 1MB", True),
        ("bytes = 1kB:2kB", True),
        ('bytes = 1:1100, "1 GB"', False),
        ("duration >= 90s and duration < 1.6m and duration = 1m:1h", True),
        ("duration > 1h or duration < 500ms", False),
        ('rule = "rule 3 (deny)"', True),
        ("NOT (dport = 443)", False),
        ('unit = "and"', False),
    ],
)
def test_what_a_filter_finds(text: str, expected: bool) -> None:
    assert parse(text).match(FLOW) is expected


def test_several_values_and_would_drops() -> None:
    assert parse("name = b.test").match({"dns_name": ("a.test", "b.test")})
    assert parse("name !~ *.test").match({"dns_name": ["a.example"]})
    would = {"verdict": "accept", "would": "drop"}
    assert parse("verdict = would-drop").match(would)
    assert not parse("verdict = accept").match(would)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("nam = x", 0, "'nam' is not a field; like it: name"),
        ("unit x", 5, "expected an operator"),
        ("unit = ", 7, "expected a value"),
        ("unit = a unit = b", 9, 'expected "and"'),
        ("(unit = a", 9, 'expected ")"'),
        ('unit = "a', 7, "quotation mark"),
        ("dst = 10.0.0.0/33", 6, "not an address or a network"),
        ("dport = http", 8, "not a number"),
        ("dst ~ 10.*", 4, "~ compares texts"),
        ("unit < b", 5, "< compares numbers"),
        ("bytes > 1,2", 10, "takes one value"),
        ("verdict = maybe", 10, "not a verdict"),
        ("and", 0, "'and' is not a field"),
        ("unit = a and", 12, "expected a field"),
        ("(" * 60, 51, "levels"),
        ("NAME = x", 0, "'NAME' is not a field; like it: name"),
        ("dport = 80,70000", 11, "'70000' is not a port; allowed: 0 to 65535"),
        ("dport = 5:3", 8, "range 5:3 ends before it begins"),
        ("dport = 80:x", 11, "'x' is not a number"),
        ("port = 1.5", 7, "'1.5' is not a port"),
        ("bytes > nan", 8, "'nan' is not a size"),
        ("bytes > 1_000", 8, "'1_000' is not a size; allowed: a number of bytes, or a number with kB, MB or GB, as in 64MB"),
        ("bytes > 1TB", 8, "'1TB' is not a size"),
        ("bytes = 1kB:2KB", 12, "'2KB' is not a size"),
        ("bytes = 2MB:1MB", 8, "range 2MB:1MB ends before it begins"),
        (
            "duration > 1d",
            11,
            "'1d' is not a duration; allowed: a number of seconds, or a number with us, ms, s, m or h, as in 5m",
        ),
        ("packets > 1kB", 10, "'1kB' is not a number"),
        ("hook = inptu", 7, "'inptu' is not a hook; allowed: prerouting, input, forward, output, postrouting"),
        ("direction = up", 12, "'up' is not a direction; allowed: in, out"),
    ],
)
def test_an_error_points_at_the_character(text: str, position: int, message: str) -> None:
    with pytest.raises(FilterError, match="character") as caught:
        parse(text)
    assert caught.value.position == position
    assert message in str(caught.value)
    assert caught.value.pointed.splitlines()[1].index("^") == position


@pytest.mark.parametrize(
    ("text", "pointed"),
    [
        # Wide characters take two columns, combining ones none; a tabulator is one below itself, too.
        ("unit = 漢字 and nam = x", "unit = 漢字 and nam = x\n                ^ character 15"),
        ("unit = e\u0301 and nam = x", "unit = e\u0301 and nam = x\n             ^ character 15"),
        ("unit = a\tand nam = x", "unit = a\tand nam = x\n        \t    ^ character 14"),
        ("unit = a\nand nam = x\nor unit = b", "and nam = x\n    ^ character 14"),
    ],
)
def test_the_mark_is_below_the_character_on_a_terminal(text: str, pointed: str) -> None:
    with pytest.raises(FilterError, match="'nam' is not a field") as caught:
        parse(text)
    assert caught.value.pointed.partition(": ")[0] == pointed


def test_every_field_can_be_asked_for() -> None:
    values = {"verdict": "Accept", "hook": "INPUT", "direction": "in", "src": "10.0.0.1", "dst": "10.0.0.1", "host": "10.0.0.1"}
    for field in FIELDS:
        parse(f"{field} = {values.get(field, '10')}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unit = a*.service and dport = 80,8000:8010", [{"unit": ["a[*].service"], "dport": [80, "8000:8010"]}]),
        ("tls_sni ~ *.test or dst = 10.0.0.0/8", [{"tls_sni": ["*.test"]}, {"dst": ["10.0.0.0/8"]}]),
        ("port = 53 and uid = 7", [{"sport": [53], "uid": [7]}, {"dport": [53], "uid": [7]}]),
        ("name ~ *.test", [{"tls_sni": ["*.test"]}, {"http_host": ["*.test"]}, {"dns_name": ["*.test"]}]),
    ],
)
def test_the_rules_that_a_filter_comes_to(text: str, expected: list[dict[str, Any]]) -> None:
    assert rule_tables(text) == expected


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("dport = 80 and verdict = drop", 15, "not known before"),
        ("not dport = 80", 0, "cannot say `not`"),
        ("dport != 80", 0, "takes = and ~"),
        ("dport = 80 and dport = 81", 15, "asked for twice"),
        (" and ".join(["(dport = 1 or tls_sni = a)"] * 1 + ["(port = 2 or host = 10.0.0.1)"] * 4), 0, "asked for twice"),
    ],
)
def test_what_a_policy_cannot_ask(text: str, position: int, message: str) -> None:
    with pytest.raises(FilterError, match=message) as caught:
        rule_tables(text)
    assert not position or caught.value.position == position


def test_a_rule_with_when_decides_as_its_keys_would() -> None:
    rule = {"action": "drop", "name": "evil", "when": "dport = 443 and name ~ *.evil.test or dst = 192.0.2.9"}
    run = Bench("policy", before=[("dpi", {})], rule=[rule], default="accept")
    ports = itertools.count(4000)

    def talk(server: str, name: str) -> bool:
        client = f"10.0.0.1:{next(ports)}"
        hello = client_hello(name)
        first = run.decide(tcp(client, server, flags="S", seq=1))
        return DROP in (first, run.decide(tcp(client, server, hello, seq=2)))

    assert talk("192.0.2.7:443", "a.evil.test")
    assert not talk("192.0.2.7:443", "a.good.test")
    assert not talk("192.0.2.7:8443", "a.evil.test")
    assert talk("192.0.2.9:25", "a.good.test")


def test_its_label_is_that_of_its_rule_in_the_file() -> None:
    options = PolicyOptions.from_table(
        {"rule": [{"action": "drop", "when": "port = 1"}, {"action": "drop", "name": "x", "when": "host = 10.0.0.1"}]}
    )
    assert [number for number, _ in options.numbered] == [1, 1, 2, 2]
    policy = Policy("p", options, print)
    assert policy.rule(udp("10.0.0.9:5", "10.0.0.1:6"), None) == "rule 2 (x)"
    again = PolicyOptions.from_table(
        {"rule": [{"action": "drop", "when": "port = 1"}, {"action": "drop", "name": "x", "when": "host = 10.0.0.1"}]}
    )
    assert options == again


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"when": "dprt = 1"}, "character 1: 'dprt' is not a field; like it: dport, port, sport: 'dprt = 1'"),
        ({"when": "dport = 1", "dport": 2}, "when asks for dport, and so does the key"),
        ({"when": "protocol = nonsense"}, "when: 'nonsense' is not a known protocol"),
    ],
)
def test_a_fault_in_when(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match="rule") as caught:
        PolicyOptions.from_table({"rule": [{"action": "drop", **rule}]})
    assert message in str(caught.value)


def test_the_page_shows_every_field_and_the_error_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "filter.md").read_text()
    for field in {*FIELDS} - {*OWNERS}:
        assert f"`{field}`" in page
    for block in page.split("```")[1::2]:
        if "^" in block:
            text = block.strip("\n").splitlines()[0]
            with pytest.raises(FilterError, match="character") as caught:
                parse(text)
            assert caught.value.pointed == block.strip("\n")
    in_log, when = re.findall(r'^when = "(.*)"', page, re.MULTILINE)
    parse(in_log)
    assert len(rule_tables(when)) == len(NAMES)
