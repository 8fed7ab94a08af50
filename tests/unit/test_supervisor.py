"""Each step of start, reload and stop fails once: what is in force after it is named here. No kernel, no process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_system import FakeMachine
from store_contract import FakeKeeper

from nfq_agent.config.models import Config, ConfigError
from nfq_agent.host.users import UserError
from nfq_agent.queue.errors import QueueError
from nfq_agent.rules.model import RuleError
from nfq_agent.service.control import ControlError
from nfq_agent.service.store import Store
from nfq_agent.service.supervisor import Supervisor
from nfq_agent.service.worker import WorkerError

FOREIGN = "-A OUTPUT -p tcp -m tcp --dport 7 -j DROP"


def config(**changes: Any) -> Config:
    """A queue that fails open, one that fails closed, and a proxy by TPROXY. `changes` replaces whole tables."""
    tables: dict[str, Any] = {
        "queue": {"open": {"num": 1}, "closed": {"num": 2, "bypass": False}},
        "proxy": {"web": {"listen": ["127.0.0.1:15002"], "capture": "tproxy"}},
        "rules": {
            "open": {"queue": "open", "tcp_ports": [11000]},
            "closed": {"queue": "closed", "tcp_ports": [11001], "family": "inet"},
            "web": {"proxy": "web", "hooks": ["prerouting"], "tcp_ports": [8080], "family": "inet"},
        },
    }
    return Config.model_validate({**tables, **changes})


class Agent:
    """A supervisor on a fake machine with a foreign rule."""

    def __init__(self, first: Config | None = None, watchdog: float | None = None) -> None:
        self.machine = FakeMachine(watchdog)
        self.machine.kernel.restore("inet", f"*mangle\n{FOREIGN}\nCOMMIT")
        self.next: Config | ConfigError = first or config()
        assert isinstance(self.next, Config)
        self.supervisor = Supervisor(self._read, self.next, self.machine.log, self.machine.system)

    def _read(self) -> Config:
        if isinstance(self.next, ConfigError):
            raise self.next
        return self.next

    def begin_with(self, store: Store) -> None:
        """Have another supervisor, with this store."""
        self.machine.keep(store)
        self.supervisor = Supervisor(self._read, config(), self.machine.log, self.machine.system)

    def ask(self, verb: str) -> dict[str, Any]:
        """Ask it by its control socket."""
        return self.machine.servers[-1].ask({"verb": verb})

    def run(self, *turns: Callable[[], Any]) -> int:
        """Its whole life: `turns` are done one after the other while it serves, then it is stopped."""
        self.machine.turns = [*turns, lambda: os.kill(os.getpid(), signal.SIGTERM)]
        return self.supervisor.run()

    def in_force(self) -> dict[str, Any]:
        """All that a reload may change."""
        return {
            "rules": self.machine.rules(),
            "workers": self.machine.crew.workers,
            "serving": set(self.machine.crew.serving),
            "routes": self.machine.routes,
        }


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def test_the_order_of_a_start_and_a_stop() -> None:
    agent = Agent()
    agent.run()
    done = agent.machine.trouble.done
    order = ["lock", "ensure_user", "choose", "advance", "crew.add proxy web", "route", "rules.apply inet", "listen"]
    assert [done.index(name) for name in order] == sorted(done.index(name) for name in order)
    # Connections of the proxy end before its rules go, rules are gone before a queue is closed.
    order = ["crew.retire proxy web", "rules.remove inet", "unroute", "crew.retire worker of queue 1", "rules.close"]
    assert [done.index(name) for name in order] == sorted(done.index(name) for name in order)


START = {
    "lock": ControlError("taken"),
    "ensure_user": UserError("no user"),
    "choose": RuleError("no backend"),
    "advance": OSError("disk full"),
    "crew.add worker of queue 1": QueueError(1, "another process has already bound this queue"),
    "crew.add proxy web": OSError("address in use"),
    "route": RuleError("no route"),
    "rules.apply inet": RuleError("no rule"),
    "rules.apply inet6": RuleError("no rule"),
}


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

    def add_and_stop(workers: Any) -> None:
        add(workers)
        os.kill(os.getpid(), signal.SIGTERM)

    agent.machine.crew.add = add_and_stop  # type: ignore[method-assign]  # the moment between two steps
    assert agent.run() == 0
    assert "rules.apply inet" not in agent.machine.trouble.done
    assert agent.in_force() == {"rules": [FOREIGN], "workers": [], "serving": set(), "routes": {}}


# Reload.


def changed() -> Config:
    """Another queue number, other settings of the queue that fails closed and of the proxy, another mark, another log."""
    return config(
        queue={"open": {"num": 1}, "closed": {"num": 2, "bypass": False, "max_len": 77}, "more": {"num": 3}},
        proxy={"web": {"listen": ["127.0.0.1:15002"], "capture": "tproxy", "tproxy_mark": "0x8000/0x8000", "chunk": 77}},
        rules={
            "open": {"queue": "open", "tcp_ports": [11005]},
            "closed": {"queue": "closed", "tcp_ports": [11001], "family": "inet"},
            "web": {"proxy": "web", "hooks": ["prerouting"], "tcp_ports": [8080], "family": "inet"},
            "more": {"queue": "more", "tcp_ports": [11003], "family": "inet6"},
        },
        log={"level": "warning"},
    )


RELOAD: dict[str, Exception] = {
    "advance": OSError("disk full"),
    "open_log": OSError("no journal"),
    "crew.add worker of queue 3": QueueError(3, "another process has already bound this queue"),
    "crew.replace worker of queue 1": WorkerError("worker of queue 1 did not become ready within 10 s"),
    "crew.replace worker of queue 2": WorkerError("worker of queue 2 did not become ready within 10 s"),
    "crew.replace proxy web": OSError("too many open files"),
    "route": RuleError("no route"),
    "rules.apply inet": RuleError("no rule"),
    "rules.apply inet6": RuleError("no rule"),
}


@pytest.mark.parametrize("step", RELOAD)
def test_a_step_of_a_reload_that_fails_leaves_what_was_in_force(step: str) -> None:
    agent = Agent()
    agent.supervisor.start()
    before = agent.in_force()
    agent.machine.lines.clear()
    agent.next = changed()
    agent.machine.trouble.fail[step] = RELOAD[step]
    assert agent.supervisor.reload() == {"ok": False, "message": str(RELOAD[step])}
    assert not agent.machine.trouble.fail, "the step was never taken"
    assert agent.in_force() == before
    assert agent.machine.service.said[-2:] == ["RELOADING=1", "READY=1"]
    # The log is the one before, too.
    assert agent.machine.lines == [f"first: error: reload failed, the configuration in force stays: {RELOAD[step]}"]
    # And the same reload succeeds when nothing fails.
    answer = agent.supervisor.reload()
    assert answer["ok"], answer
    assert "workers: 1 new, 3 replaced, 0 ended" in answer["message"]
    assert any("11005" in line for line in agent.machine.rules())
    assert [worker.title for worker in agent.machine.crew.workers] == [
        "worker of queue 1", "worker of queue 2", "worker of queue 3", "proxy web"
    ]  # fmt: skip
    assert not set(before["workers"]) & agent.machine.crew.serving
    assert agent.supervisor.stop(failed=False)
    assert agent.machine.rules() == [FOREIGN]


def test_an_undo_that_fails_is_said_and_the_others_are_made() -> None:
    agent = Agent()
    agent.supervisor.start()
    agent.next = changed()
    first, second, proxy = agent.machine.crew.workers

    agent.machine.trouble.fail["rules.apply inet"] = RuleError("no rule")
    replace = agent.machine.crew.replace

    def failing(old: Any, successor: Any) -> None:
        if successor is second:
            raise WorkerError("it does not come back")
        replace(old, successor)

    agent.machine.crew.replace = failing  # type: ignore[method-assign]  # one undo of several
    assert agent.supervisor.reload()["message"] == "no rule"
    assert agent.machine.crew.queues[1] is first
    assert agent.machine.crew.queues[2] is not second
    assert agent.machine.crew.proxies["web"] is proxy
    assert 3 not in agent.machine.crew.queues
    assert any("the change of worker of queue 2 could not be undone" in line for line in agent.machine.lines)


def test_a_bad_file_is_refused_and_changes_nothing() -> None:
    agent = Agent()
    agent.supervisor.start()
    before = agent.in_force()
    agent.next = ConfigError(["a.toml: queue.x.num: 70000 is too large", "a.toml: another fault"])
    answer = agent.supervisor.reload()
    assert answer == {"ok": False, "config": True, "message": "a.toml: queue.x.num: 70000 is too large\na.toml: another fault"}
    assert agent.in_force() == before
    agent.next = config(agent={"user": "other"})
    assert "agent.user: cannot change while the agent runs" in agent.supervisor.reload()["message"]
    assert agent.in_force() == before


def test_a_reload_to_the_same_replaces_no_worker() -> None:
    agent = Agent()
    agent.supervisor.start()
    before = agent.in_force()
    assert agent.supervisor.reload()["message"] == ("reloaded: rules changed in 0 places; workers: 0 new, 0 replaced, 0 ended")
    assert agent.in_force() == before


def test_a_queue_that_goes_is_closed_after_its_rules() -> None:
    agent = Agent()
    agent.supervisor.start()
    agent.machine.trouble.done.clear()
    agent.next = config(queue={"open": {"num": 1}}, rules={"open": {"queue": "open", "tcp_ports": [1]}}, proxy={})
    assert agent.supervisor.reload()["message"].endswith("workers: 0 new, 0 replaced, 2 ended")
    done = agent.machine.trouble.done
    assert done.index("rules.apply inet") < done.index("crew.retire worker of queue 2")
    # Connections of the proxy keep their rules until they have ended.
    last = len(done) - 1 - done[::-1].index("rules.apply inet")
    assert done.index("crew.wait_for_leaving") < last < done.index("unroute")
    assert agent.machine.routes == {}
    assert not any("TPROXY" in line for line in agent.machine.rules())


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


def handed(agent: Agent) -> None:
    """Let an agent before this one have left something in the service manager's store."""
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
    agent = Agent()
    agent.begin_with(Store({}, FakeKeeper()))
    assert restarted(agent) == 0
    assert agent.machine.ours()
    assert agent.machine.crew.serving
    assert agent.machine.trouble.done[-1] == "crew.leave"
    assert "STOPPING=1" not in agent.machine.service.said


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


def test_once_it_serves_a_failure_ends_everything() -> None:
    agent = Agent()
    handed(agent)

    def fail() -> None:
        raise WorkerError("it died too often")

    assert agent.run(fail) == 1
    assert "STOPPING=1" in agent.machine.service.said
    assert agent.machine.crew.workers == []
