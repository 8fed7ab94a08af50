"""Faults for a time (`nfq-agent chaos`): what ends them, and what is in force then. A supervisor on a fake machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from on_trial import Agent, break_traffic, config, faulty, restored
from store_contract import FakeKeeper


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.supervisor.stop(failed=False)


@pytest.fixture
def kept() -> Iterator[Agent]:
    made = Agent(FakeKeeper())
    yield made
    made.supervisor.stop(failed=False)


def test_faults_end_with_a_crash(kept: Agent) -> None:
    agent = kept
    agent.file = config(1000)
    assert break_traffic(agent, drop=0.5)["ok"]
    agent.crash()
    assert not faulty(agent)
    agent.pass_time(60)
    assert agent.port == 1000
    assert agent.ask("confirm", keep=True) == {"ok": False, "message": "no reload waits for a confirmation"}


def test_faults_end_by_themselves(agent: Agent) -> None:
    assert break_traffic(agent, drop=0.5)["ok"]
    assert faulty(agent)
    agent.pass_time(29)
    assert faulty(agent)
    agent.pass_time(2)
    assert not faulty(agent)
    assert agent.port == 1000
    assert any("over: no faults any more" in line for line in agent.machine.lines)


def test_faults_are_ended_and_never_kept(agent: Agent) -> None:
    break_traffic(agent, delay=0.5)
    assert not agent.ask("confirm", keep=True)["ok"]
    assert faulty(agent)
    assert not break_traffic(agent, drop=0.1)["ok"]
    assert agent.ask("confirm", keep=False)["ok"]
    assert not faulty(agent)


def test_the_end_of_faults_takes_back_no_reload(agent: Agent) -> None:
    assert agent.ask("confirm", keep=False, faults=True) == {"ok": False, "message": "no queue has faults"}
    agent.file = config(2000)
    assert agent.ask("reload", confirm=60.0)["ok"]
    answer = agent.ask("confirm", keep=False, faults=True)
    assert not answer["ok"]
    assert "no queue has faults; a reload waits for its confirmation" in answer["message"]
    assert agent.ask("confirm", keep=True) == {"ok": True, "message": "the reload is confirmed"}


def test_what_is_on_trial_already_is_named_and_how_it_ends(agent: Agent) -> None:
    assert break_traffic(agent, drop=0.1)["ok"]
    assert break_traffic(agent, drop=0.5)["message"] == "a queue has faults already; `nfq-agent chaos off` ends them"
    assert agent.ask("confirm", keep=False, faults=True)["ok"]
    agent.ask("reload", confirm=60)
    assert break_traffic(agent, drop=0.5)["message"].startswith("a reload waits to be confirmed; `nfq-agent confirm` keeps it")


def test_a_reload_ends_faults_and_stays(agent: Agent) -> None:
    break_traffic(agent, drop=0.5)
    assert agent.ask("reload")["ok"]
    assert agent.port == 2000
    assert not faulty(agent)
    agent.pass_time(60)
    assert agent.port == 2000


def test_a_reload_on_trial_that_ended_faults_does_not_bring_them_back(agent: Agent) -> None:
    break_traffic(agent, drop=0.5)
    agent.ask("reload", confirm=60)
    assert agent.port == 2000
    agent.pass_time(61)
    assert agent.port == 1000
    assert not faulty(agent)


def test_faults_that_cannot_be_ended_are_ended_later(agent: Agent) -> None:
    break_traffic(agent, drop=0.5)
    agent.machine.trouble.fail["crew.replace worker of queue 1000"] = OSError("no")
    answer = agent.ask("confirm", keep=False, faults=True)
    assert not answer["ok"]
    assert "the faults stay, and it is tried again in 10 s" in answer["message"]
    assert faulty(agent)
    agent.pass_time(11)
    assert not faulty(agent)


def test_the_status_says_what_is_on_trial(agent: Agent) -> None:
    assert agent.ask("status")["trial"] is None
    break_traffic(agent, drop=0.5)
    told = agent.ask("status")["trial"]
    assert 29 <= told.pop("left") <= 30
    assert told == {"kind": "faults", "queue": "main", "faults": {"drop": 0.5}}
    agent.ask("reload", confirm=60)
    told = agent.ask("status")["trial"]
    assert 59 <= told.pop("left") <= 60
    assert told == {"kind": "reload", "queue": "", "faults": {}}
    agent.ask("confirm", keep=True)
    assert agent.ask("status")["trial"] is None


@pytest.mark.parametrize(
    ("queue", "odds", "said"),
    [
        ("other", {"drop": 0.5}, "no queue 'other'; allowed: main"),
        ("main", {}, "no fault is named"),
        ("main", {"drop": 2.0}, "drop: "),
        ("main", {"dorp": 0.5}, "dorp: "),
    ],
)
def test_faults_that_are_refused(agent: Agent, queue: str, odds: dict[str, Any], said: str) -> None:
    answer = agent.ask("chaos", queue=queue, odds=odds, seconds=30)
    assert not answer["ok"]
    assert answer["message"].startswith(said), answer
    assert not faulty(agent)


def test_a_drop_that_monitor_mode_would_let_pass_is_refused(agent: Agent) -> None:
    table = {"queue": {"main": {"num": 2000, "mode": "monitor"}}, "rules": {"main": {"queue": "main", "tcp_ports": [2000]}}}
    agent.file = restored(table)
    agent.ask("reload")
    answer = break_traffic(agent, drop=0.5, delay=0.5)
    assert answer["message"] == "drop: queue main is in monitor mode and drops nothing; allowed: delay, corrupt and duplicate"
    assert not faulty(agent)
    assert break_traffic(agent, delay=0.5)["ok"]
