"""The order of a stop, and what is left of an agent whose start did not come to its rules."""

from __future__ import annotations

from fake_system import FakeMachine
from supervised import config

from nfq_agent.rules.model import RuleError
from nfq_agent.rules.plan import plan
from nfq_agent.service.live_routes import LiveRoutes
from nfq_agent.service.live_rules import LiveRules
from nfq_agent.service.stop import Stop


def stop_of(machine: FakeMachine) -> Stop:
    return Stop("default", machine.crew, LiveRoutes("default", machine.system.route), None, machine.log)


def rules_of(machine: FakeMachine) -> LiveRules:
    rules = LiveRules(machine.system.choose(config(), None))
    rules.apply(plan(config(), 1234, True, ("inet", "inet6")))
    machine.trouble.done.clear()
    return rules


def test_rules_go_first_and_the_backend_is_closed_last() -> None:
    machine = FakeMachine()
    rules = rules_of(machine)
    assert machine.ours()
    assert stop_of(machine).run(lambda: rules, failed=False)
    assert not machine.ours()
    changes = [step for step in machine.trouble.done if "read" not in step]
    assert changes == ["rules.remove inet", "rules.remove inet6", "unroute", "crew.wait_for_leaving", "rules.close"]


def test_after_a_failure_the_rules_that_fail_closed_stay_and_are_named() -> None:
    machine = FakeMachine()
    rules = rules_of(machine)
    assert stop_of(machine).run(lambda: rules, failed=True)
    assert machine.ours()
    assert all("--queue-num 1" not in line for line in machine.ours())
    assert any("rules stay, for queues with bypass = false" in line for line in machine.lines)


def test_without_the_lock_no_rule_is_touched_and_the_workers_end() -> None:
    machine = FakeMachine()
    rules_of(machine)
    before = machine.ours()
    assert stop_of(machine).run(None, failed=True)
    assert machine.ours() == before
    assert machine.trouble.done == ["crew.wait_for_leaving"]


def test_a_backend_that_is_not_found_is_said_and_the_workers_end() -> None:
    machine = FakeMachine()

    def find() -> LiveRules:
        raise RuleError("no backend")

    assert not stop_of(machine).run(find, failed=False)
    assert machine.lines == ["first: error: rules could not be removed: no backend; run `nfq-agent remove`"]
    assert machine.trouble.done == ["crew.wait_for_leaving"]
