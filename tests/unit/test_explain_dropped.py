"""`explain` of a packet that is dropped, or led to a proxy: what comes behind is not asked, or sees another packet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from nfq_agent.cli.explain import explain
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.question import Question

DROPPING: Final = """
[queue.first]
num = 7
elements = [{elements}]
[queue.later]
num = 8
[rules.first]
queue = "first"
table = "raw"
hooks = ["prerouting", "output"]
tcp_ports = [23, 443]
[rules.later]
queue = "later"
hooks = ["prerouting", "output"]
all = true
[inline.wan]
interfaces = ["wan*"]
elements = ["dpi", "deny"]
{mode}
[element.rate-limit]
rate = "5/s"
[element.deny]
type = "policy"
rule = [{{ action = "drop", dport = 23 }}, {{ action = "drop", tls_sni = "*.bad.test" }}]
"""
LATER: Final = "Rule:     [rules.later], table mangle -> queue later, number 8"


def told(file: Path, capsys: pytest.CaptureFixture[str], destination: str, name: str = "", **more: Any) -> list[str]:
    assert explain(Flags(file), Question("tcp", "192.0.2.1:40000", destination, name, **more)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("destination", "more", "elements", "expected"),
    [
        ("192.0.2.9:23", {}, "'dpi', 'deny'", [
            "          [rules.later] matches too, and is not asked: the packet is dropped in table raw",
        ]),
        # Its first packet passes.
        ("192.0.2.9:443", {"name": "a.bad.test"}, "'dpi', 'deny'", [LATER]),
        # What another element would answer before is not known.
        ("192.0.2.9:23", {}, "'dpi', 'rate-limit', 'deny'", [LATER]),
        ("192.0.2.9:23", {}, "'dpi', 'deny', 'rate-limit'", [
            "          [rules.later] matches too, and is not asked: the packet is dropped in table raw",
        ]),
        # On its way in an inline link comes first, and on its way out last.
        ("192.0.2.9:23", {"interface": "wan0", "hook": "prerouting"}, "'dpi', 'deny'", [
            "Inline:   [inline.wan], interface wan0", "At first: drop (deny: rule 1)",
            "          [rules.first] matches too, and is not asked: the packet is dropped by [inline.wan]",
            "          [rules.later] matches too, and is not asked: the packet is dropped by [inline.wan]",
        ]),
        ("192.0.2.9:23", {"interface": "wan0"}, "'dpi', 'deny'", [
            "Rule:     [rules.first], table raw -> queue first, number 7", "At first: drop (deny: rule 1)",
            "          [rules.later] matches too, and is not asked: the packet is dropped in table raw",
            "          [inline.wan] never sees it: it is dropped in table raw",
        ]),
    ],
)  # fmt: skip
def test_a_packet_that_is_dropped_comes_no_further(  # a line of the table
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    destination: str,
    more: dict[str, str],
    elements: str,
    expected: list[str],
) -> None:
    (file := tmp_path / "x.toml").write_text(DROPPING.format(elements=elements, mode=""))
    lines = told(file, capsys, destination, **more)
    assert [line for line in lines if line in expected] == expected
    assert (LATER in lines) == (LATER in expected)


def test_a_packet_that_would_be_dropped_comes_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DROPPING.format(elements="'dpi', 'deny'", mode='mode = "monitor"').replace("num = 7", 'num = 7\nmode = "monitor"')
    (file := tmp_path / "x.toml").write_text(text)
    assert LATER in told(file, capsys, "192.0.2.9:23", interface="wan0", hook="prerouting")


LEADING: Final = """
[queue.late]
num = 7
elements = ["deny"]
[proxy.web]
listen = ["0.0.0.0:15002", "[::]:15006"]
[rules.web]
proxy = "web"
hooks = ["output", "prerouting"]
tcp_ports = [80]
[rules.servers]
queue = "late"
table = "filter"
hooks = ["output"]
tcp_ports = [80]
[rules.led]
queue = "late"
table = "filter"
hooks = ["output"]
tcp_ports = [15002, 15006]
dst = ["127.0.0.0/8", "::1"]
[element.deny]
type = "policy"
default = "drop"
"""


@pytest.mark.parametrize(
    ("source", "destination", "seen"),
    [
        ("192.0.2.1:40000", "192.0.2.9:80", "tcp 192.0.2.1:40000 -> 127.0.0.1:15002"),
        ("[2001:db8::1]:40000", "[2001:db8::9]:80", "tcp [2001:db8::1]:40000 -> [::1]:15006"),
    ],
)
def test_behind_a_rule_that_leads_to_a_proxy_the_packet_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, destination: str, seen: str
) -> None:
    (file := tmp_path / "x.toml").write_text(LEADING)
    assert explain(Flags(file), Question("tcp", source, destination)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"          table filter sees it as {seen}" in lines
    assert "Rule:     [rules.led], table filter -> queue late, number 7" in lines
    assert not any("[rules.servers]" in line for line in lines)
    # No table of a rule follows where packets come in.
    assert explain(Flags(file), Question("tcp", source, destination, hook="prerouting")) == 0
    assert "filter" not in capsys.readouterr().out
