"""Drops that no element logs: by which settings, and the line that says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planned import config_of

from nfq_agent.config.drop_cause import unlogged_cause
from nfq_agent.log import Log, LogEvent
from nfq_agent.service.unlogged import DropLog, Drops

POLICY: dict[str, Any] = {"type": "policy", "default": "drop"}


@pytest.mark.parametrize(
    ("elements", "options", "queue", "expected"),
    [
        (["egress"], {}, {}, "element egress"),
        (["log", "egress"], {}, {}, ""),
        (["pcap", "egress"], {}, {}, ""),
        (["egress"], {"explain": True}, {}, ""),
        (["limit"], {}, {}, ""),
        (["limit", "egress"], {}, {"mode": "monitor"}, ""),
        (["limit", "dpi", "egress"], {}, {}, "elements dpi, egress"),
        (["limit"], {}, {"default": "drop"}, 'default = "drop"'),
        (["chaos"], {}, {"default": "drop"}, 'element chaos or default = "drop"'),
        ([], {}, {}, ""),
    ],
)
def test_what_drops_unseen(elements: list[str], options: dict[str, Any], queue: dict[str, str], expected: str) -> None:
    config = config_of(
        queue={"main": {"elements": elements, **queue}},
        element={
            "egress": {**POLICY, **options}, "limit": {"type": "rate-limit", "rate": "5/s"}, "pcap": {"directory": "/var/tmp"},
        },
    )  # fmt: skip
    assert unlogged_cause(config, config.queue["main"]) == expected


def test_one_line_a_minute_with_the_number_since_the_last() -> None:
    lines: list[tuple[str, str]] = []

    def write(event: LogEvent) -> bool:
        lines.append((event.level, event.message))
        return True

    log = DropLog(Log(write, "info", float))
    found = [Drops("queue main", 0, "element egress"), Drops("queue other", 9, "")]

    def say(count: int, now: float) -> list[tuple[str, str]]:
        found[0] = replace(found[0], count=count)
        lines.clear()
        log.say(lambda: found, now)
        return list(lines)

    assert say(0, 0) == []
    ((level, text),) = say(20, 1)
    assert level == "warning"
    assert text.startswith("queue main dropped 20 packets (by element egress) since the start")
    assert 'only = "drop"' in text
    assert say(50, 30) == []
    assert "dropped 30 packets" in say(50, 61)[0][1]
    assert say(50, 200) == []
    # A worker that was replaced counts from zero.
    assert "dropped 7 packets" in say(7, 300)[0][1]
