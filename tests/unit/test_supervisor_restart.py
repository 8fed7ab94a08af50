"""Each step of a restart fails once: what is in force after it is named here. No kernel, no process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from store_contract import FakeKeeper
from supervised import START, Agent, config

from nfq_agent.config.models import ConfigError
from nfq_agent.service.inheritance import CONFIGURATION
from nfq_agent.service.store import Store
from nfq_agent.service.worker import WorkerError

pytestmark = pytest.mark.usefixtures("kept_signals")


def handed(agent: Agent) -> None:
    """Let a previous agent have left something in the service manager's store."""
    reader, writer = os.pipe()
    os.close(writer)
    agent.begin_with(Store({"queue-1": reader}, FakeKeeper()))


def restarted(agent: Agent, *turns: Callable[[], Any]) -> int | None:
    """Serve, then be told to restart. None if the program was started again in place."""
    agent.machine.turns = [*turns, lambda: os.kill(os.getpid(), signal.SIGUSR2)]
    try:
        return agent.supervisor.run()
    except SystemExit:
        return None


def test_a_restart_without_a_store_starts_again_in_place() -> None:
    agent = Agent()
    assert restarted(agent) is None
    assert agent.machine.ours()
    assert agent.machine.crew.serving
    assert agent.machine.trouble.done[-2:] == ["crew.leave", "start_again"]


def test_a_restart_with_a_store_leaves_everything_to_the_next_process() -> None:
    agent = Agent(config().made_of({"queue": {"open": {"num": 1}}}, outdated=False))
    store = Store({}, FakeKeeper())
    agent.begin_with(store)
    assert restarted(agent) == 0
    assert store.noted(CONFIGURATION) == {"queue": {"open": {"num": 1}}}
    assert agent.machine.ours()
    assert agent.machine.crew.serving
    assert agent.machine.trouble.done[-1] == "crew.leave"
    assert "STOPPING=1" not in agent.machine.service.said


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def test_a_signal_to_reload_starts_again_where_the_code_has_changed() -> None:
    agent = Agent()
    agent.machine.code_changed = True
    agent.machine.turns = [hang_up]
    with pytest.raises(SystemExit):
        agent.supervisor.run()
    assert agent.machine.trouble.done[-2:] == ["crew.leave", "start_again"]


def test_a_signal_to_reload_changes_nothing_where_the_new_code_would_not_start() -> None:
    agent = Agent()
    agent.machine.code_changed, agent.machine.rehearsal = True, "a.toml: a fault"
    agent.machine.turns = [hang_up, lambda: None, lambda: os.kill(os.getpid(), signal.SIGTERM)]
    assert agent.supervisor.run() == 0
    said = "\n".join(agent.machine.lines)
    assert "restart refused, this agent keeps serving: a.toml: a fault" in said
    assert "reloaded" not in said


def test_what_a_reload_puts_into_force_is_noted_at_once_and_a_refused_one_is_not() -> None:
    agent = Agent()
    store = Store({}, FakeKeeper())
    agent.begin_with(store)
    agent.supervisor.start()
    agent.next = config().made_of({"queue": {"more": {"num": 7}}}, outdated=False)
    assert agent.supervisor.reload()["ok"]
    assert store.noted(CONFIGURATION) == {"queue": {"more": {"num": 7}}}
    agent.next = ConfigError(["queue: a fault"])
    assert not agent.supervisor.reload()["ok"]
    assert store.noted(CONFIGURATION) == {"queue": {"more": {"num": 7}}}
    agent.supervisor.stop(failed=False)


def test_the_verb_starts_again_in_place_with_a_store_too() -> None:
    agent = Agent()
    agent.begin_with(Store({}, FakeKeeper()))
    with pytest.raises(SystemExit):
        agent.run(lambda: agent.ask("restart"))
    assert agent.machine.trouble.done[-1] == "start_again"


def test_code_that_would_not_start_is_not_started() -> None:
    agent = Agent()
    agent.machine.rehearsal = "ImportError: no module named x"
    answers: list[Any] = []
    assert agent.run(lambda: answers.append(agent.ask("restart"))) == 0
    assert answers[0]["ok"] is False
    assert "no module named x" in answers[0]["message"]
    assert "start_again" not in agent.machine.trouble.done


def test_a_program_that_cannot_be_started_again_ends_in_order() -> None:
    agent = Agent()
    agent.machine.trouble.fail["start_again"] = OSError("no such file")
    assert restarted(agent) == 1
    assert not [line for line in agent.machine.ours() if "--queue-num 1" in line]
    assert agent.machine.crew.workers == []


@pytest.mark.parametrize("step", START)
def test_a_start_that_fails_leaves_what_served_before_it(step: str) -> None:
    agent = Agent()
    handed(agent)
    agent.machine.trouble.fail[step] = START[step]
    assert agent.run() == 1
    assert agent.machine.trouble.done[-1] == "crew.leave"
    assert "what served before this start keeps serving" in agent.machine.lines[-1]
    assert "STOPPING=1" not in agent.machine.service.said


@pytest.mark.parametrize("takes_over", [True, False])
def test_what_waits_is_answered_before_the_rules_are_looked_for(takes_over: bool) -> None:
    agent = Agent()
    if takes_over:
        handed(agent)
    assert agent.run() == 0
    done = agent.machine.trouble.done
    # Else while the workers prepare.
    assert done.index("crew.add worker of queue 1") < done.index("choose")
    assert (done.index("crew.serves worker of queue 1") < done.index("choose")) == takes_over


def test_once_it_serves_a_failure_ends_everything() -> None:
    agent = Agent()
    handed(agent)

    def fail() -> None:
        raise WorkerError("it died too often")

    assert agent.run(fail) == 1
    assert "STOPPING=1" in agent.machine.service.said
    assert agent.machine.crew.workers == []


@pytest.mark.parametrize("step", [step for step in START if step != "lock"])
def test_a_restart_in_place_that_fails_leaves_no_rule_that_leads_nowhere(step: str) -> None:
    agent = Agent()
    assert restarted(agent) is None
    assert agent.machine.ours()
    reader, writer = os.pipe()
    os.close(writer)
    # Its process is the same one: there is no store that keeps anything when it ends.
    agent.begin_with(Store({"queue-1": reader}))
    agent.machine.trouble.fail[step] = START[step]
    assert agent.run() == 1
    assert all("--queue-num 2" in line for line in agent.machine.ours() if "NFQUEUE" in line)
    assert agent.machine.routes == {}
