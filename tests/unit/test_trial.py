"""A reload on trial: what ends it, and what is in force then. A supervisor on a fake machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_system import FakeMachine
from on_trial import Agent, break_traffic, config, restored
from store_contract import FakeKeeper

from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.queue.errors import QueueError
from nfq_agent.service.inheritance import TRIAL
from nfq_agent.service.store import Store
from nfq_agent.service.supervisor import Supervisor
from nfq_agent.service.trial import Trial, was_taken_back


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.supervisor.stop(failed=False)


def test_without_a_confirmation_the_configuration_before_comes_back(agent: Agent) -> None:
    assert agent.ask("reload", confirm=60)["ok"]
    assert agent.port == 2000
    agent.pass_time(59)
    assert agent.port == 2000
    agent.pass_time(2)
    assert agent.port == 1000
    assert any(
        "not confirmed in time: the configuration before the reload is in force again" in line for line in agent.machine.lines
    )
    # Who answers too late reads what has happened.
    answer = agent.ask("confirm", keep=True)
    assert not answer["ok"]
    assert answer["message"].startswith("not confirmed in time")


def test_a_confirmation_ends_the_trial(agent: Agent) -> None:
    agent.ask("reload", confirm=60)
    assert agent.ask("confirm", keep=True) == {"ok": True, "message": "the reload is confirmed"}
    agent.pass_time(120)
    assert agent.port == 2000


def test_a_refusal_ends_it_at_once(agent: Agent) -> None:
    agent.ask("reload", confirm=60)
    assert agent.ask("confirm", keep=False)["ok"]
    assert agent.port == 1000


def test_a_reload_without_a_trial_asks_for_nothing(agent: Agent) -> None:
    assert agent.ask("reload")["ok"]
    assert agent.ask("confirm", keep=True) == {"ok": False, "message": "no reload waits for a confirmation"}
    agent.pass_time(120)
    assert agent.port == 2000


@pytest.mark.parametrize("seconds", [None, 30])
def test_another_reload_meanwhile_is_part_of_the_trial(agent: Agent, seconds: int | None) -> None:
    agent.ask("reload", confirm=60)
    agent.file = config(3000)
    assert agent.ask("reload", **({} if seconds is None else {"confirm": seconds}))["ok"]
    assert agent.port == 3000
    agent.pass_time(61)
    # What was confirmed last, and not what lay between.
    assert agent.port == 1000


def test_a_reload_that_will_be_taken_back_with_an_earlier_one_says_so(agent: Agent) -> None:
    agent.ask("reload", confirm=60)
    agent.pass_time(20)
    answer = agent.ask("reload")
    assert answer["ok"]
    # A reload takes a second of this machine's time, at most.
    assert re.fullmatch(
        "an earlier reload waits for its confirmation, and takes this one back with it in (39|40) s; "
        "`nfq-agent confirm` keeps both",
        answer["waits"],
    )
    agent.ask("confirm", keep=True)
    assert "waits" not in agent.ask("reload")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("confirm", [None, 600])
def test_an_answer_to_an_earlier_reload_is_none_to_a_later_one(agent: Agent, keep: bool, confirm: int | None) -> None:
    first = agent.ask("reload", confirm=60)["trial"]
    agent.file = config(3000)
    second = agent.ask("reload", **({} if confirm is None else {"confirm": confirm})).get("trial")
    answer = agent.ask("confirm", keep=keep, trial=first)
    assert not answer["ok"]
    assert "another change came since" in answer["message"]
    assert agent.port == 3000
    assert agent.ask("confirm", keep=keep, trial=second)["ok"]
    assert agent.port == (3000 if keep else 1000)


def test_what_is_said_where_nothing_waits_is_about_the_last_reload(agent: Agent) -> None:
    nothing = {"ok": False, "message": "no reload waits for a confirmation"}
    agent.ask("reload", confirm=60)
    agent.pass_time(61)
    assert agent.ask("confirm", keep=True)["message"].startswith("not confirmed in time")
    # The next reload is in force, confirmed or without a trial.
    agent.ask("reload")
    assert agent.ask("confirm", keep=True) == nothing
    agent.ask("reload", confirm=60)
    agent.pass_time(61)
    agent.ask("reload", confirm=60)
    agent.ask("confirm", keep=True)
    assert agent.ask("confirm", keep=True) == nothing


def test_a_refused_reload_begins_no_trial(agent: Agent) -> None:
    agent.file = ConfigError(["queue: a fault"])
    assert not agent.ask("reload", confirm=60)["ok"]
    assert agent.ask("confirm", keep=False) == {"ok": False, "message": "no reload waits for a confirmation"}
    assert agent.port == 1000


def test_what_cannot_be_put_back_is_said_and_tried_again(agent: Agent) -> None:
    agent.ask("reload", confirm=60)
    agent.machine.trouble.fail["crew.add worker of queue 1000"] = QueueError(1000, "another process has already bound this queue")
    answer = agent.ask("confirm", keep=False)
    assert not answer["ok"]
    assert "could not be restored" in answer["message"]
    assert "the new one is in force, and it is tried again in 10 s" in answer["message"]
    assert agent.port == 2000
    agent.pass_time(11)
    assert agent.port == 1000


@pytest.mark.parametrize("faults", [False, True], ids=["alone", "faults behind it"])
def test_changed_files_do_not_bring_in_a_file_that_was_taken_back(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, faults: bool
) -> None:
    monkeypatch.setattr(Config, "changed_files", lambda _: ["blocklist.txt"])
    agent.ask("reload", confirm=60)
    agent.ask("confirm", keep=False)
    if faults:
        break_traffic(agent, drop=0.5)
        agent.ask("confirm", keep=False, faults=True)
    agent.pass_time(5)
    agent.pass_time(5)
    assert agent.port == 1000
    # Until a person reloads again.
    agent.ask("reload")
    assert agent.port == 2000


@pytest.fixture
def blocklist(agent: Agent, tmp_path: Path) -> Path:
    """A list that the file names from now on."""
    path = tmp_path / "blocklist.txt"
    path.write_text("192.0.2.1\n")
    lookups = HostLookups(tmp_path)
    lookups.lines(path.name)
    agent.file = config(2000).with_lookups(lookups)
    return path


@pytest.mark.parametrize("faults", [True, False], ids=["faults", "reload"])
def test_a_list_that_changes_during_a_trial_is_read_after_it(agent: Agent, blocklist: Path, faults: bool) -> None:
    agent.ask("reload", confirm=None if faults else 60)
    if faults:
        break_traffic(agent, drop=0.5)
    agent.file = config(3000)
    blocklist.write_text("192.0.2.1\n192.0.2.2\n")
    agent.pass_time(2)
    agent.pass_time(2)
    assert agent.port == 2000, "the file is not read during a trial"
    if faults:
        agent.pass_time(31)
    else:
        agent.ask("confirm", keep=True)
    agent.pass_time(2)
    agent.pass_time(2)
    assert agent.port == 3000
    assert any(f"reloading: {blocklist} changed" in line for line in agent.machine.lines)


def test_a_list_that_changes_before_a_trial_is_no_part_of_it(agent: Agent, blocklist: Path) -> None:
    agent.ask("reload")
    blocklist.write_text("192.0.2.1\n192.0.2.2\n")
    agent.pass_time(2)
    agent.pass_time(2)
    assert any(f"reloading: {blocklist} changed" in line for line in agent.machine.lines)
    number = agent.ask("reload", confirm=60)["trial"]
    agent.pass_time(2)
    assert agent.ask("confirm", keep=True, trial=number)["ok"]


def test_no_restart_while_a_reload_waits(agent: Agent) -> None:
    agent.ask("reload", confirm=60)
    answer = agent.ask("restart")
    assert not answer["ok"]
    assert "on trial" in answer["message"]
    agent.ask("confirm", keep=True)
    assert agent.ask("restart")["ok"]


@pytest.fixture
def kept() -> Iterator[Agent]:
    made = Agent(FakeKeeper())
    yield made
    made.supervisor.stop(failed=False)


def test_a_crash_does_not_confirm_a_reload(kept: Agent) -> None:
    agent = kept
    number = agent.ask("reload", confirm=60)["trial"]
    agent.pass_time(30)
    agent.crash()
    # The file holds it, and it still waits.
    assert agent.port == 2000
    assert any("a reload from before this start still waits for its confirmation" in line for line in agent.machine.lines)
    assert not agent.ask("restart")["ok"]
    agent.pass_time(20)
    assert agent.port == 2000
    agent.pass_time(20)
    assert agent.port == 1000
    # Nor does a second one begin it again.
    agent.file = config(1000)
    agent.crash()
    assert agent.ask("confirm", keep=True, trial=number)["message"] == "no reload waits for a confirmation"


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("at", ["crew.add worker of queue 2000", "rules.apply inet", "crew.retire worker of queue 1000", "begin"])
def test_a_crash_within_a_reload_on_trial_does_not_confirm_it(kept: Agent, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    agent = kept
    with monkeypatch.context() as broken:
        if at == "begin":
            broken.setattr(Trial, "begin", kill)
        else:
            agent.machine.trouble.fail[at] = Killed()
        with pytest.raises(Killed):
            agent.ask("reload", confirm=60)
    agent.crash()
    # The file holds it.
    assert agent.port == 2000
    agent.pass_time(61)
    assert agent.port == 1000


def kill(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("refused", [ConfigError(["queue: a fault"]), OSError("no")])
def test_a_reload_that_is_not_made_leaves_no_trial_to_the_next_process(kept: Agent, refused: Exception) -> None:
    agent = kept
    if isinstance(refused, ConfigError):
        good, agent.file = agent.file, refused
    else:
        good = agent.file
        agent.machine.trouble.fail["crew.add worker of queue 2000"] = refused
    assert not agent.ask("reload", confirm=60)["ok"]
    agent.file = good
    agent.crash()
    assert agent.ask("confirm", keep=False) == {"ok": False, "message": "no reload waits for a confirmation"}
    agent.pass_time(61)
    assert agent.port == 2000


def test_a_crash_while_the_configuration_before_is_put_back_is_made_good(kept: Agent) -> None:
    agent = kept
    agent.ask("reload", confirm=60)
    agent.machine.trouble.fail["crew.add worker of queue 1000"] = Killed()
    with pytest.raises(Killed):
        agent.pass_time(61)
    agent.crash()
    agent.pass_time(1)
    assert agent.port == 1000


def test_a_crash_does_not_forget_that_the_file_was_taken_back(kept: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = kept
    agent.ask("reload", confirm=60)
    agent.ask("confirm", keep=False)
    # As `run` begins then (test_serve.py).
    assert was_taken_back(agent.machine.system.store.noted(TRIAL))
    bad, agent.file = agent.file, config(1000)
    agent.crash()
    agent.file = bad
    with monkeypatch.context() as changed:
        changed.setattr(Config, "changed_files", lambda _: ["blocklist.txt"])
        agent.pass_time(5)
        agent.pass_time(5)
    assert agent.port == 1000
    # A person's reload brings it in, and a person's restart reads the file.
    agent.ask("reload", confirm=60)
    agent.ask("confirm", keep=False)
    assert was_taken_back(agent.machine.system.store.noted(TRIAL))
    agent.ask("reload")
    assert agent.port == 2000
    assert not was_taken_back(agent.machine.system.store.noted(TRIAL))


def test_a_restart_that_a_person_asks_for_reads_the_file() -> None:
    machine, store = FakeMachine(None), Store({}, FakeKeeper())
    machine.keep(store)
    noted = []

    def ask(verb: str, **more: Any) -> None:
        assert machine.servers[-1].ask({"verb": verb, **more})["ok"]
        noted.append(was_taken_back(store.noted(TRIAL)))

    machine.turns += [partial(ask, "reload", confirm=60), partial(ask, "confirm", keep=False), partial(ask, "restart")]
    with pytest.raises(SystemExit):
        Supervisor(lambda: config(2000), config(1000), machine.log, machine.system, restored).run()
    assert noted == [False, True, True]
    assert not was_taken_back(store.noted(TRIAL))


@pytest.mark.parametrize("keep", [True, False])
def test_a_reload_is_answered_after_a_crash(kept: Agent, keep: bool) -> None:
    agent = kept
    number = agent.ask("reload", confirm=60)["trial"]
    agent.crash()
    agent.crash()
    assert agent.ask("confirm", keep=keep, trial=number)["ok"]
    assert agent.port == (2000 if keep else 1000)
    agent.pass_time(120)
    assert agent.port == (2000 if keep else 1000)


@pytest.mark.parametrize(
    ("seconds", "port"),
    # Long ago, as by an earlier version that does not know of it, and did not take it back: it is forgotten.
    [(90, 1000), (3600, 2000)],
)
def test_a_time_that_is_over_when_the_agent_starts_again_takes_the_reload_back(kept: Agent, seconds: int, port: int) -> None:
    kept.ask("reload", confirm=60)
    kept.machine.now += seconds
    kept.crash()
    kept.pass_time(1)
    assert kept.port == port


def test_what_the_agent_does_with_packets_can_be_asked_for(agent: Agent) -> None:
    assert agent.ask("policies")["queues"]["main"]["default"] == "accept"
