"""`[log] when`: which lines are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nfq_agent.config.file import load
from nfq_agent.config.models import ConfigError
from nfq_agent.log import Log, LogEvent
from nfq_agent.log_filter import shows

FLOW: dict[str, Any] = {
    "src": "10.0.0.1", "dst": "192.0.2.1", "dport": 443, "hook": "OUTPUT", "verdict": "drop", "unit": "shop.service",
    "reason": "egress: rule 1 (no-evil)", "dns_name": "a.test b.test", "outdev": "eth0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("when", "shown"),
    [
        ("unit = shop.service and verdict = drop", True),
        ("unit = other.service", False),
        ("element = egress and rule ~ *no-evil*", True),
        ("name = b.test", True),
        ("name = 'a.test b.test'", False),
        ("interface = eth0 and direction = out", True),
        ("direction = in", False),
        ("verdict != drop", False),
        ("dst = 192.0.2.0/24 and dport = 440:450", True),
    ],
)
def test_lines_of_flows_are_chosen(when: str, shown: bool) -> None:
    chooses = shows(when.replace("'", '"'))
    assert chooses is not None
    assert chooses(FLOW) is shown


def test_warnings_and_what_is_about_no_flow_are_always_written() -> None:
    written: list[LogEvent] = []

    def write(event: LogEvent) -> bool:
        written.append(event)
        return True

    log = Log(write, "info", lambda: 0.0, shows("unit = other.service"))
    log("a flow", **FLOW)
    log("a flow, for worse", level="warning", **FLOW)
    log("rules repaired")
    assert [event.message for event in written] == ["a flow, for worse", "rules repaired"]
    before = log.become(Log(write, "info", lambda: 0.0))
    log("a flow", **FLOW)
    assert written[-1].message == "a flow"
    log.become(before)
    log("another", **FLOW)
    assert written[-1].message == "a flow"


def test_without_a_filter_nothing_is_asked() -> None:
    assert shows("") is None


def test_a_fault_of_the_filter_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('[log]\nlevel = "info"\nwhen = "unti = x"\n')
    with pytest.raises(ConfigError) as caught:
        load(path)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{path}: log.when: character 1: 'unti' is not a field; like it: unit")
    assert "(line 3)" in fault
