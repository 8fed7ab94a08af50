"""The drift check follows control groups: how often it looks at all of them, and which rules it puts in then."""

from __future__ import annotations

from fake_rules import FakeHost, FakeKernel

from nfq_agent.config.models import Config
from nfq_agent.log import Log, LogEvent
from nfq_agent.rules.plan import plan
from nfq_agent.service.drift_check import DriftCheck
from nfq_agent.service.group_walk import GroupWalk
from nfq_agent.service.live_rules import LiveRules
from nfq_agent.service.meter import Meter

CONFIG = Config.model_validate({
    "agent": {"backend": "owned"},
    "queue": {"main": {"num": 100, "compile": "auto", "elements": ["allow"], "log_drops": False}},
    "element": {"allow": {"type": "policy", "default": "accept", "rule": [{"action": "drop", "unit": "web*.service"}]}},
    "rules": {"app": {"queue": "main", "hooks": ["output"], "udp_ports": [53]}},
})  # fmt: skip


class Host:
    """Control groups, a clock, and what the drift check of their rules has done."""

    def __init__(self) -> None:
        self.groups = [(1, "/"), (2, "/web.service")]
        self.walks = 0
        self.now = 100.0
        self.lines: list[str] = []
        self.kernel = FakeKernel()
        walk = GroupWalk(self._walked, lambda: self.now)
        log = Log(self._written, "info", lambda: self.now)
        self.drift = DriftCheck(LiveRules(FakeHost(self.kernel, "default")), Meter(), log, 60.0, walk)
        self.drift.ruleset = plan(CONFIG, 972, lists=True)
        self.drift.apply(self.drift.ruleset)

    def _walked(self) -> list[tuple[int, str]]:
        self.walks += 1
        return list(self.groups)

    def _written(self, event: LogEvent) -> bool:
        self.lines.append(event.message)
        return True

    def follows(self) -> tuple[int, bool]:
        """How often a look a second later walks through the groups, and whether the rules are others then."""
        walks, before = self.walks, self.kernel.save("inet")
        self.now += 1.1
        self.drift.follow_groups(self.now)
        return self.walks - walks, self.kernel.save("inet") != before


def test_all_groups_are_looked_at_once_for_a_change() -> None:
    host = Host()
    assert host.follows() == (1, False)
    host.groups.append((7, "/web-2.service"))
    assert host.follows() == (1, True)
    assert "--numbers 2,7" in "".join(host.kernel.save("inet"))
    # Of no concern to a rule.
    host.groups.append((8, "/db.service"))
    assert host.follows() == (1, False)
    assert host.lines == []
