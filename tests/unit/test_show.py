"""The output of plans and findings: as text and as JSON."""

from __future__ import annotations

import json
import sys

import pytest
from fake_rules import FakeHost, FakeKernel

from nfq_agent.cli import show
from nfq_agent.cli.finding import Finding
from nfq_agent.cli.show import PolicyPlan
from nfq_agent.config.models import Config
from nfq_agent.rules.diff import Changes, Delete, DropChain, Insert, NewChain
from nfq_agent.rules.model import Family, Installed, Rule
from nfq_agent.rules.plan import plan
from nfq_agent.service.live_rules import ListedRule

Said = pytest.CaptureFixture[str]
RULE = Rule.parse('-A NFQA-a-INPUT -p tcp -m tcp --dport 80 -m comment --comment "nfq-agent:a:web" -j NFQUEUE --queue-num 1')
CHANGES: dict[Family, Changes] = {
    "inet": {"mangle": [NewChain("NFQA-a-INPUT"), Insert(RULE, 1)]},
    "inet6": {"mangle": [Delete(RULE, 3), DropChain("NFQA-a-INPUT")]},
}
NOTHING = PolicyPlan([], False)


@pytest.mark.parametrize(
    ("lines", "known", "changed"), [([], True, False), (["a"], True, True), (["a"], False, False), ([], False, False)]
)
def test_a_policy_changes_only_beside_an_agent_that_said_what_it_does(lines: list[str], known: bool, changed: bool) -> None:
    assert PolicyPlan(lines, known).changed is changed


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not broken: the workers of pytest-xdist have COLUMNS=80."""
    monkeypatch.setenv("COLUMNS", "200")


def test_counters_of_ten_digits_stand_below_each_other(capsys: Said) -> None:
    counted = [(1, 9), (9_876_543_210, 9_876_543_210_123)]
    show.rules("a", [("legacy", ListedRule("inet", "mangle", Installed(RULE, 1, *each))) for each in counted])
    _, head, *lines = capsys.readouterr().out.splitlines()
    place = head.index("rule")
    assert [line[:place].split() for line in lines] == [[str(packets), str(size)] for packets, size in counted]
    assert {line[place:] for line in lines} == {str(RULE)}


def test_a_plan_for_people_begins_with_its_sum(capsys: Said) -> None:
    show.plan("a", "legacy", CHANGES, ["a table would become present"], PolicyPlan(["queue web: default accept -> drop"], True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# Plan for instance a, legacy backend: 1 rule added, 1 removed, 1 change of policy. Nothing is written."
    assert lines.index("# iptables") < lines.index("# ip6tables")
    assert any(line.startswith("+ ") and str(RULE) in line for line in lines)
    assert any(line.startswith("- ") and str(RULE) in line for line in lines)
    assert lines[-2:] == ["# queue web: default accept -> drop", "# besides: a table would become present"]


def test_a_plan_without_a_change(capsys: Said) -> None:
    show.plan("a", "legacy", {}, ["the system user x would be created"], PolicyPlan(["queue web: mode enforce"], False))
    assert capsys.readouterr().out.splitlines() == [
        "Nothing to do: the kernel has the rules of instance a as configured (legacy backend).",
        "# queue web: mode enforce",
        "# besides: the system user x would be created",
    ]


def test_a_plan_for_programs_names_each_step() -> None:
    found = show.plan_object("a", "legacy", CHANGES, [], NOTHING)
    assert json.loads(json.dumps(found)) == found
    assert [(each["family"], each["table"], each["do"]) for each in found["changes"]] == [
        ("inet", "mangle", "new-chain"),
        ("inet", "mangle", "insert"),
        ("inet6", "mangle", "delete"),
        ("inet6", "mangle", "delete-chain"),
    ]
    assert found["changes"][1] == {
        "family": "inet", "table": "mangle", "do": "insert", "chain": "NFQA-a-INPUT", "number": 1, "rule": str(RULE)
    }  # fmt: skip
    assert found["policy_changed"] is None


def test_lines_are_wrapped_for_a_narrow_terminal_and_left_for_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = "queue web: mode enforce; default accept; rules.web: bypass = false drops this traffic"
    show.prose(text, 4)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setenv("COLUMNS", "40")
    show.prose(text, 4)
    first, *rest = capsys.readouterr().out.splitlines()
    assert len(first) <= 40
    assert all(line.startswith("    ") and len(line) <= 40 for line in rest)
    assert " ".join([first, *(line.strip() for line in rest)]) == text


def test_what_programs_read_too_is_wrapped_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    path = "/usr/share/doc/nfq-agent/examples/configs/egress-policy.toml"
    monkeypatch.setenv("COLUMNS", "40")
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        show.comment(f"# besides: {path} is read")
        show.wrapped(f"Nearest: {path} is read", 9)
    # A comment stays one among lines that are commands; what is copied stays whole.
    assert capsys.readouterr().out == (
        f"# besides: {path} is read\nNearest: {path} is read\n"
        f"# besides:\n# {path}\n# is read\nNearest:\n{9 * ' '}{path}\n{9 * ' '}is read\n"
    )


def ruleset() -> dict[Family, dict[str, object]]:
    config = Config.model_validate({"queue": {"q": {}}, "rules": {"r": {"queue": "q", "tcp_ports": [80], "family": "inet"}}})
    return plan(config, 990)  # type: ignore[return-value]  # only its tables are asked for


class Host(FakeHost):
    """A backend whose tables may be visible to root only."""

    shown = True

    def present(self, family: Family) -> frozenset[str] | None:
        return super().present(family) if self.shown else None


def test_side_effects_of_legacy_rules() -> None:
    host = Host(FakeKernel(), "a")
    effects = show.side_effects(ruleset(), host, "proxyuser")  # type: ignore[arg-type]  # a fake with the contract
    assert effects[0].startswith("the system user proxyuser would be created")
    assert effects[1].startswith("the inet table mangle would become present, and stays so")
    assert effects[2].startswith("the rules are legacy ones")
    host.kernel.table("inet", "mangle")
    assert len(show.side_effects(ruleset(), host, None)) == 1  # type: ignore[arg-type]  # a host of the test
    host.shown = False
    assert show.side_effects(ruleset(), host, None)[0] == "which inet tables are present is visible to root only"  # type: ignore[arg-type]  # a host of the test
    assert show.side_effects({}, host, None) == []


def test_side_effects_of_an_owned_table() -> None:
    host = Host(FakeKernel(), "a")
    host.name, host.notice = "owned", "backend owned is used, since legacy rules cannot be"
    effects = show.side_effects(ruleset(), host, None)  # type: ignore[arg-type]  # a host of the test
    assert effects == [host.notice, "the rules are in nf_tables: `nft list ruleset` lists them, `iptables` does not"]


def test_findings_with_their_advice(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show.findings([Finding("good", "kernel", "fine"), Finding("error", "rights", "root is needed", "run it with sudo")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["ok       kernel: fine", "error    rights: root is needed", "         -> run it with sudo"]


def test_a_map_has_an_entry_on_each_line(capsys: Said) -> None:
    entries = ",".join(f"10.0.{number}.0-10.0.{number}.255/6/80=drop.{number}" for number in range(1, 13))
    rule = f"-A NFQA-default-OUTPUT -p tcp -j VERDICTS --of dst,protocol,dport --map {entries}"
    show.changes({"inet": {"mangle": [Insert(Rule.parse(rule), 1)]}})
    _, _, _, line, first, *others, last = capsys.readouterr().out.splitlines()
    assert line == "+ -A NFQA-default-OUTPUT -p tcp -j VERDICTS --of dst,protocol,dport --map (12 entries)"
    assert first == "    dst 10.0.1.0-10.0.1.255, protocol 6, dport 80: drop (rule 1)"
    assert (len(others), last) == (9, "    and 2 more; --json has all")
    # For programs it is whole.
    assert (
        show.plan_object("default", "owned", {"inet": {"mangle": [Insert(Rule.parse(rule), 1)]}}, [], PolicyPlan([], False))[
            "changes"
        ][0]["rule"]
        == rule
    )
