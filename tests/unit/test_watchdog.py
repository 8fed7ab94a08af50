"""Seconds stuck in; feed or kill out. And which seconds count."""

from __future__ import annotations

from nfq_agent.host.pulse import Progress
from nfq_agent.service.watchdog import HOPELESS, STUCK, decide


def test_a_worker_that_is_stuck_is_killed_alone() -> None:
    decision = decide({"a": 0.0, "b": STUCK, "proxy": STUCK + 0.1})
    assert decision.kill == {"proxy": STUCK + 0.1}
    assert decision.feed


def test_the_service_manager_is_fed_unless_killing_does_not_help() -> None:
    assert decide({}).feed
    assert decide({"a": HOPELESS - 0.1}).feed
    assert not decide({"a": 0.0, "proxy": HOPELESS}).feed


def test_time_without_a_cpu_is_no_hang() -> None:
    waited = [100.0]
    progress = Progress(lambda _: waited[0])
    assert progress.stuck_for(7, 1, 50.0) == 0.0
    # Ten seconds later it has had no CPU for eight of them.
    waited[0] = 108.0
    assert progress.stuck_for(7, 1, 60.0) == 2.0
    # A hang, with a CPU to itself.
    assert progress.stuck_for(7, 1, 62.0) == 4.0
    assert progress.stuck_for(8, 1, 63.0) == 0.0
    waited[0] = 110.0
    assert progress.stuck_for(8, 1, 65.0) == 0.0
    progress.restart()
    assert progress.stuck_for(8, 1, 99.0) == 0.0
