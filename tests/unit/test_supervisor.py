"""Each step of start, reload and stop fails once: what is in force after it is named here. No kernel, no process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from supervised import FOREIGN, START, Agent, config

from nfq_agent.rules.model import RuleError
from nfq_agent.service.control import ControlError
from nfq_agent.service.worker import WorkerError

pytestmark = pytest.mark.usefixtures("kept_signals")


def test_a_life_in_order() -> None:
    agent = Agent()
    seen: list[Any] = []
    assert agent.run(lambda: seen.append(agent.in_force())) == 0
    (serving,) = seen
    assert len(serving["workers"]) == 3
    assert serving["serving"] == set(serving["workers"])
    assert any("--queue-num 1" in line for line in serving["rules"])
    assert serving["routes"]
    assert agent.in_force() == {"rules": [FOREIGN], "workers": [], "serving": set(), "routes": {}}
    assert [word for word in agent.machine.service.said if not word.startswith("STATUS=")] == ["READY=1", "STOPPING=1"]
    assert agent.machine.lines[-1] == "first: info: stopped: no rule of this instance is left"
    assert not agent.machine.locks[0].held
    assert not agent.machine.servers[0].open


class _Unreadable:
    """Tables of another backend that cannot be read, as with too few descriptors."""

    name = "legacy"

    def accepting(self, *_: Any) -> Any:
        raise RuleError("table mangle cannot be read: Too many open files")

    def sign(self) -> object:
        return None


def test_a_stop_does_not_say_that_nothing_is_left_where_it_could_not_look() -> None:
    agent = Agent()
    agent.machine.elsewhere = (_Unreadable(),)
    assert agent.run() == 0
    assert agent.in_force()["rules"] == [FOREIGN]
    assert agent.machine.lines[-1].startswith("first: warning: stopped: ")
    assert "is unknown: rules of this instance in legacy tables cannot be read" in agent.machine.lines[-1]
    assert not any("no rule of this instance is left" in line for line in agent.machine.lines)


def test_the_order_of_a_start_and_a_stop() -> None:
    agent = Agent()
    agent.run()
    done = agent.machine.trouble.done
    order = ["lock", "ensure_user", "advance", "crew.add proxy web", "choose", "route", "rules.apply inet", "listen"]
    assert [done.index(name) for name in order] == sorted(done.index(name) for name in order)
    # Connections of the proxy end before its rules go, rules are gone before a queue is closed.
    order = ["crew.retire proxy web", "rules.remove inet", "unroute", "crew.retire worker of queue 1", "rules.close"]
    assert [done.index(name) for name in order] == sorted(done.index(name) for name in order)


@pytest.mark.parametrize("step", START)
def test_a_step_of_the_start_that_fails_leaves_nothing(step: str) -> None:
    agent = Agent()
    agent.machine.trouble.fail[step] = START[step]
    assert agent.run() == 1
    assert agent.in_force() == {"rules": [FOREIGN], "workers": [], "serving": set(), "routes": {}}
    assert not any(lock.held for lock in agent.machine.locks)
    assert f"first: error: {START[step]}" in agent.machine.lines
    assert "READY=1" not in agent.machine.service.said
    assert not agent.machine.trouble.fail, "the step was never taken"


@pytest.mark.parametrize("step", [step for step in START if step not in ("lock", "ensure_user", "choose")])
def test_a_start_that_fails_removes_what_a_killed_agent_left(step: str) -> None:
    killed = Agent()
    killed.supervisor.start()
    assert killed.machine.ours()
    assert killed.machine.routes
    agent = Agent(config(queue={"open": {"num": 1}}, rules={"open": {"queue": "open", "tcp_ports": [1]}}, proxy=config().proxy))
    agent.machine.kernel, agent.machine.routes = killed.machine.kernel, killed.machine.routes
    agent.machine.trouble.fail[step] = START[step]
    assert agent.run() == (1 if step in agent.machine.trouble.done else 0)
    # Those that fail closed stay, as after any failure.
    assert all("--queue-num 2" in line for line in agent.machine.ours() if "NFQUEUE" in line)
    assert agent.machine.routes == {}


def test_routes_that_a_killed_agent_left_go_with_the_next_start() -> None:
    agent = Agent(config(proxy={}, rules={"open": {"queue": "open", "tcp_ports": [1]}}))
    agent.machine.routes = {"inet": set()}
    agent.supervisor.start()
    assert agent.machine.routes == {}


def test_without_the_capability_nothing_is_begun() -> None:
    agent = Agent()
    agent.machine.allowed = False
    assert agent.run() == 1
    assert [name for name in agent.machine.trouble.done if not name.startswith("crew.wait")] == []
    assert "CAP_NET_ADMIN is missing" in agent.machine.lines[0]


@pytest.mark.parametrize("error", [ControlError("no socket"), ZeroDivisionError("a fault of ours")])
def test_a_failure_with_rules_in_keeps_those_that_fail_closed(error: Exception) -> None:
    agent = Agent()
    agent.machine.trouble.fail["listen"] = error
    if isinstance(error, ControlError):
        assert agent.run() == 1
    else:
        with pytest.raises(ZeroDivisionError):
            agent.run()
    assert agent.machine.crew.workers == []
    assert [line for line in agent.machine.ours() if "NFQUEUE" in line]
    assert all("--queue-num 2" in line for line in agent.machine.ours() if "NFQUEUE" in line)
    assert any("rules stay, for queues with bypass = false" in line for line in agent.machine.lines)
    assert not agent.machine.locks[0].held


def test_a_stop_during_the_start_puts_no_rule_in() -> None:
    agent = Agent()
    add = agent.machine.crew.add

    def add_and_stop(workers: Any, meanwhile: Any = lambda: None) -> None:
        add(workers, meanwhile)
        os.kill(os.getpid(), signal.SIGTERM)

    agent.machine.crew.add = add_and_stop  # type: ignore[method-assign]  # the moment between two steps
    assert agent.run() == 0
    assert "rules.apply inet" not in agent.machine.trouble.done
    assert agent.in_force() == {"rules": [FOREIGN], "workers": [], "serving": set(), "routes": {}}


# Reload.


# Stop.


@pytest.mark.parametrize(
    ("step", "clean"),
    [("rules.apply inet", True), ("rules.remove inet", False), ("unroute", False), ("rules.close", False)],
)
def test_a_step_of_the_stop_that_fails(step: str, clean: bool) -> None:
    agent = Agent()

    def fail() -> None:
        agent.machine.trouble.fail[step] = RuleError("the lock is held")

    assert agent.run(fail) == (0 if clean else 1)
    assert not agent.machine.trouble.fail, "the step was never taken"
    # The workers end whatever the rules do, and the other family's rules go.
    assert agent.machine.crew.serving == set()
    assert not [line for line in agent.machine.kernel.save("inet6") if "nfq-agent:" in line]
    assert any("the lock is held; run `nfq-agent remove`" in line for line in agent.machine.lines) is not clean
    assert not agent.machine.locks[0].held


# While it serves.


def test_a_worker_that_died_too_often_ends_the_agent() -> None:
    agent = Agent()

    def die() -> None:
        raise WorkerError("worker of queue 1 died 5 times")

    assert agent.run(die) == 1
    assert "first: error: worker of queue 1 died 5 times" in agent.machine.lines
    assert all("--queue-num 2" in line for line in agent.machine.ours() if "NFQUEUE" in line)


def test_the_drift_check_repairs_and_counts() -> None:
    agent = Agent(config(agent={"drift_check": "5s"}))
    machine = agent.machine
    counts: list[int | None] = []

    def count(packets: int) -> Callable[[], None]:
        def set_counters() -> None:
            for table in machine.kernel.tables["inet"].values():
                for entries in table.chains.values():
                    for entry in entries:
                        if "--queue-num 1" in str(entry.rule) and "INPUT" in str(entry.rule.chain):
                            entry.packets = packets

        return set_counters

    def remove() -> None:
        machine.kernel.tables["inet"]["mangle"].chains["OUTPUT"].clear()
        for chain, entries in machine.kernel.tables["inet"]["mangle"].chains.items():
            if chain.startswith("NFQA-"):
                entries.clear()

    def look() -> None:
        counts.append(agent.supervisor._meter.hits(range(1, 2)))  # noqa: SLF001  # what the status would show as hits

    wait = [lambda: None] * 6
    before: list[str] = []
    assert agent.run(
        lambda: before.extend(machine.ours()), count(50), *wait, look, count(80), *wait, remove, *wait, look,
        lambda: before.extend(machine.ours()),
    ) == 0  # fmt: skip
    # What was counted before the rules were removed is not lost with them: only the drift check has read it.
    assert counts == [50, 80]
    half = len(before) // 2
    assert before[:half] == before[half:]
    assert sum("another program changed this agent's rules; repaired in " in line for line in machine.lines) == 1


def test_a_drift_check_that_fails_is_tried_again() -> None:
    agent = Agent(config(agent={"drift_check": "5s"}))
    wait = [lambda: None] * 6

    def fail() -> None:
        agent.machine.trouble.fail["rules.read inet"] = RuleError("the lock is held")

    assert agent.run(fail, *wait, lambda: None) == 0
    assert any("the rules could not be checked: the lock is held" in line for line in agent.machine.lines)


def test_with_a_watchdog_a_held_lock_is_not_waited_for() -> None:
    agent = Agent(watchdog=3.0)
    agent.supervisor.start()
    host = agent.supervisor._rules.host  # type: ignore[union-attr]  # noqa: SLF001  # the backend that it was given
    assert host.lock_seconds == 1.0
    agent.supervisor.turn()
    assert "WATCHDOG=1" in agent.machine.service.said
    agent.supervisor.stop(failed=False)
    assert host.lock_seconds > 1.0
