"""The warning about packets that came back without our mark: one for all, and it names the rule."""

from __future__ import annotations

from nfq_agent.log import Log, LogEvent
from nfq_agent.service.foreign_marks import RepeatLog

RULE = "iptables-legacy -t mangle -A OUTPUT -j CONNMARK --restore-mark rewrites the bits 0x7000000"


def test_one_warning_names_the_rule_and_the_next_comes_a_minute_later() -> None:
    lines: list[str] = []
    asked = 0

    def write(event: LogEvent) -> bool:
        lines.append(event.message)
        return True

    def find() -> list[str]:
        nonlocal asked
        asked += 1
        return [RULE] if asked == 1 else []

    log = RepeatLog(Log(write, "info", float))
    log.say({7: 0, 8: 0}, find, 0.0)
    assert (lines, asked) == ([], 0)
    log.say({7: 3, 8: 0}, find, 1.0)
    assert len(lines) == 1
    assert lines[0].startswith("queue 7: 3 packets came back 16 times")
    assert f"this rule stands before ours: {RULE}; give it a mask" in lines[0]
    log.say({7: 9, 8: 0}, find, 2.0)
    assert (len(lines), asked) == (1, 1)
    # The worker was replaced and counts from zero.
    log.say({7: 2, 8: 4}, find, 62.0)
    assert len(lines) == 2
    assert lines[1].startswith("queue 7: 2 packets; queue 8: 4 packets came back")
    assert "no rule before ours was found" in lines[1]
    log.say({7: 2, 8: 4}, find, 200.0)
    assert len(lines) == 2
