"""The status: what the JSON holds, what docs/verbs.md says of it, and what people see of it in narrow terminals."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nfq_agent.cli import show_status
from nfq_agent.counters import INLINE_COUNTERS, PROXY_COUNTERS, TAP_COUNTERS, WORKER_COUNTERS, Counters
from nfq_agent.service.status import (
    BypassStatus,
    ConfinementStatus,
    DecisionStatus,
    DriftStatus,
    InForce,
    InlineStatus,
    InterfaceStatus,
    LatencyStatus,
    OffloadStatus,
    ProxyStatus,
    QueueStatus,
    RuleStatus,
    Status,
    StatusError,
    TapStatus,
    TrialStatus,
    WorkerStatus,
)

DOCS = Path(__file__).parents[2] / "docs" / "verbs.md"
TEN_DIGITS = 9_876_543_210
COUNTERS = dict.fromkeys(WORKER_COUNTERS, TEN_DIGITS)
JUDGED = dict.fromkeys((*INLINE_COUNTERS, "errors"), TEN_DIGITS)
TAPPED = dict.fromkeys((*TAP_COUNTERS, "errors"), TEN_DIGITS)
DECISIONS = (
    DecisionStatus("allow", "rule 1 (stripe)", TEN_DIGITS),
    DecisionStatus("allow", "rule 2", 0),
    DecisionStatus("allow", "default", 7),
    DecisionStatus("allow", "midstream", 0),
)
BUCKETS = {"1e-05": 3, "0.001": 4, "+Inf": 1}
RULE = '-A NFQA-default-OUTPUT -p tcp -m multiport --dports 11000 -m comment --comment "nfq-agent:default:app" -j NFQUEUE'
REPORT = Status(
    instance="default",
    running=True,
    version="1.2.3",
    state="serving",
    pid=4_194_304,
    since=1_000_000.0,
    backend="legacy",
    queues=(
        QueueStatus(
            "main", "enforce", True, ("dpi", "log"), InForce("packet", 65535, 4096, True, True), 0, None, TEN_DIGITS, 3,
            (WorkerStatus(65535, 4_194_303, 2, 64_000_000, 123_456.7, None, COUNTERS),), DECISIONS, LatencyStatus(BUCKETS, 12.5),
        ),
    ),
    proxies=(ProxyStatus("tcp", ("0.0.0.0:15002",), (), None, 0, None, dict.fromkeys(PROXY_COUNTERS, TEN_DIGITS)),),
    taps=(
        TapStatus(
            "pods", ("dpi",), 4_194_302, 0, 64_000_000, 65535, TAPPED,
            (InterfaceStatus("veth0123456789a", 4_194_304, "web", TAPPED),), DECISIONS,
        ),
    ),
    inlines=(
        InlineStatus(
            "pods", "enforce", ("dpi",), 4_194_302, 0, 64_000_000, TEN_DIGITS, 4096, JUDGED,
            (InterfaceStatus("veth0123456789a", 4_194_304, None, JUDGED),), DECISIONS,
        ),
    ),
    offloaded=OffloadStatus(1, 2, 3),
    rules=(RuleStatus("inet6", "mangle", RULE, TEN_DIGITS, 123 * TEN_DIGITS),),
    drift=DriftStatus(2, 1_000_100.0, 5.0, 10.0, ("inet mangle + -A OUTPUT -j NFQA-default-OUTPUT",), "", 2.5, 1_000_099.0),
    log_lines_lost=7,
    bypasses=(BypassStatus("queue", "main", TEN_DIGITS, "packets", "the queue was full", "more numbers"),),
    trial=TrialStatus("faults", "main", {"drop": 0.25, "delay": 0.5, "delay_for": "80ms"}, 29.5),
)  # fmt: skip


def documented() -> dict[str, dict[str, str]]:
    """The keys and meanings of each table of the documentation, by its heading."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in DOCS.read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif heading in ("The verbs", "explain", "replay", "learn", "bugreport", "top and trace"):
            continue
        elif row := re.fullmatch(r"\| `(\w+)` \| (.+) \|", line):
            tables.setdefault(heading, {})[row[1]] = row[2]
    return tables


def names(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def test_every_key_is_documented_and_no_other() -> None:
    tables = documented()
    workers = [name for name in names(WorkerStatus) if name != "counters"] + list(WORKER_COUNTERS)
    assert {heading: list(rows) for heading, rows in tables.items()} == {
        "status": names(Status),
        "queues": names(QueueStatus),
        "decisions": names(DecisionStatus),
        "latency": names(LatencyStatus),
        "in_force": names(InForce),
        "workers": workers,
        "proxies": names(ProxyStatus),
        "counters": list(PROXY_COUNTERS),
        "taps": names(TapStatus),
        "interfaces": names(InterfaceStatus),
        "inlines": names(InlineStatus),
        "counters of an inline interface": list(INLINE_COUNTERS),
        "counters of an interface": list(TAP_COUNTERS),
        "offloaded": names(OffloadStatus),
        "rules": names(RuleStatus),
        "drift": names(DriftStatus),
        "bypasses": names(BypassStatus),
        "confinement": names(ConfinementStatus),
        "trial": names(TrialStatus),
    }
    assert tables["workers"].items() >= WORKER_COUNTERS.items()
    assert tables["counters"] == PROXY_COUNTERS
    assert tables["counters of an interface"] == TAP_COUNTERS
    assert tables["counters of an inline interface"] == INLINE_COUNTERS


def test_the_json_is_read_back() -> None:
    value = json.loads(json.dumps(REPORT.as_object()))
    assert value["queues"][0]["workers"][0]["received"] == TEN_DIGITS
    assert value["queues"][0]["in_force"]["max_len"] == 4096
    assert Status.from_object(value) == REPORT


def test_a_key_of_a_newer_agent_is_left_out_and_a_missing_one_is_said() -> None:
    value = REPORT.as_object()
    assert Status.from_object({**value, "weather": "fine"}) == REPORT
    del value["drift"]
    with pytest.raises(StatusError, match="another version"):
        Status.from_object(value)


def test_counters_have_a_slot_each() -> None:
    counters = Counters()
    for place, name in enumerate(counters.names):
        setattr(counters, name, place)
    assert list(counters.snapshot().values()) == list(range(len(counters.names)))
    counters.received = -1
    assert counters.received == 2**64 - 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_text_fits(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("nfq_agent.cli.show._WIDTH", width)
    other = dataclasses.replace(REPORT, instance="blue", since=0.0)
    show_status.status(REPORT, [other], REPORT.since + 93_784)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count(str(TEN_DIGITS)) >= 5 + len(PROXY_COUNTERS)
    assert "up 1 d 2 h" in text
    assert "Drift: 2 repairs" in text
    assert "the next in 10s at most" in " ".join(text.split())
    assert "Rules: 1 are not as configured" in text
    assert f"Uninspected: {TEN_DIGITS} packets" in text
    assert "Also running: instance blue, version 1.2.3" in text
    faults = "Faults: queue main, drop=0.25 delay=0.5 delay_for=80ms; they end in 30 s, or by `nfq-agent chaos off`"
    assert faults in " ".join(text.split())
    waiting = dataclasses.replace(REPORT, trial=TrialStatus("reload", "", {}, 42.0))
    show_status.status(waiting, [], REPORT.since)
    assert "A reload waits for `nfq-agent confirm`; it is taken back in 42 s" in " ".join(capsys.readouterr().out.split())


def test_an_interface_shows_what_it_counted_and_what_matters_at_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nfq_agent.cli.show._WIDTH", 60)
    counters = {**dict.fromkeys(JUDGED, 0), "up": 1_000_000, "judged": 999_998, "decided_accepted": 12_345_678, "past_full": 2}
    (inline,) = REPORT.inlines
    inline = dataclasses.replace(inline, interfaces=(InterfaceStatus("veth1", 4, "web", counters),), counters=counters)
    show_status.status(dataclasses.replace(REPORT, inlines=(inline,)), [], REPORT.since)
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("  veth1"))
    assert lines[place : place + 2] == [
        "  veth1 (container web): 1000000 up, 999998 judged, 0", "    dropped, 12345678 decided accepted, 2 past full",
    ]  # fmt: skip


def test_rules_that_differ_in_their_ports_alone_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ends = "-m comment --comment nfq-agent:default:app -j NFQUEUE --queue-num 100"
    text = f"-A NFQA-default-INPUT -p tcp -m multiport --ports {{}} {ends}"
    rules = tuple(RuleStatus("inet", "mangle", text.format(port), 3, 40) for port in (80, 443))
    show_status.status(dataclasses.replace(REPORT, rules=rules), [], REPORT.since)
    assert "6 80 inet mangle INPUT app queue 100 (2 rules)" in " ".join(capsys.readouterr().out.split())
