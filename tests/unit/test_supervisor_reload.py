"""Each step of a reload fails once: what is in force after it is named here. No kernel, no process."""

from __future__ import annotations

from typing import Any

import pytest
from supervised import FOREIGN, Agent, config

from nfq_agent.config.models import Config, ConfigError
from nfq_agent.queue.errors import QueueError
from nfq_agent.rules.model import RuleError
from nfq_agent.service.worker import WorkerError

pytestmark = pytest.mark.usefixtures("kept_signals")


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


def test_routes_that_a_reload_could_not_remove_go_with_the_stop() -> None:
    agent = Agent()

    def lose_the_proxy() -> None:
        agent.next = config(proxy={}, rules={"open": {"queue": "open", "tcp_ports": [1]}})
        agent.machine.trouble.fail["unroute"] = RuleError("ip was killed")
        assert agent.supervisor.reload()["ok"]
        assert agent.machine.routes

    assert agent.run(lose_the_proxy) == 0
    assert agent.machine.routes == {}
    assert any("could not be removed: ip was killed" in line for line in agent.machine.lines)
