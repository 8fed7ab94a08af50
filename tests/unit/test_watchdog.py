"""Seconds stuck in; feed or kill out."""

from __future__ import annotations

from nfq_agent.service.watchdog import STUCK, decide


def test_without_a_service_manager_a_stuck_worker_is_killed() -> None:
    assert decide({"a": 0.0, "b": STUCK}, None).kill == {}
    assert decide({"a": 0.0, "proxy": STUCK + 0.1}, None).kill == {"proxy": STUCK + 0.1}


def test_with_one_its_watchdog_is_fed_while_all_make_progress() -> None:
    assert decide({}, 3.0).feed
    assert decide({"a": 1.4, "proxy": 0.0}, 3.0).feed
    assert not decide({"a": 0.0, "proxy": 1.5}, 3.0).feed
