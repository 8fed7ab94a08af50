"""What `reload`, `apply`, `remove` and the guard of `apply --confirm` do with the answers that they get; no kernel, no root."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from answering import Answering
from fake_rules import FakeHost, FakeKernel

from nfq_agent.cli import demo, requests, rule_verbs
from nfq_agent.cli.confirm import Guard, typed_yes
from nfq_agent.cli.flags import Flags
from nfq_agent.rules.model import FAMILIES
from nfq_agent.service import control
from nfq_agent.service.live_rules import LiveRules

HERE = Flags(instance="default")


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        ({"ok": True, "message": "reloaded"}, 0, "reloaded"),
        ({"ok": False, "message": "no such key", "config": True}, 78, "no such key"),
        ({"ok": False, "message": "the kernel refused"}, 1, "the kernel refused"),
        ({"ok": False}, 1, "the agent gave no reason"),
    ],
)
def test_reload_says_what_the_agent_answered(
    agent: Answering, capfd: pytest.CaptureFixture[str], reply: dict[str, Any], code: int, said: str
) -> None:
    agent.reply = reply
    assert requests.reload(HERE, None) == code
    assert said in "".join(capfd.readouterr())
    assert agent.asked == [{"verb": "reload"}]


def test_a_reload_that_will_be_taken_back_with_an_earlier_one_is_a_warning(
    agent: Answering, capfd: pytest.CaptureFixture[str]
) -> None:
    agent.reply = {"ok": True, "message": "in force", "waits": "an earlier reload waits"}
    assert requests.reload(HERE, None) == 0
    assert capfd.readouterr() == ("in force\n", "warning: an earlier reload waits\n")


@pytest.mark.parametrize(("typed", "keep", "code", "said"), [("yes", True, 0, "Kept."), ("no\n", False, 1, "put back")])
def test_a_reload_is_confirmed_by_a_word(
    agent: Answering,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    keep: bool,
    code: int,
    said: str,
) -> None:
    agent.reply = {"ok": True, "message": "put back", "trial": 3}
    reader, writer = os.pipe()
    before = os.dup(0)
    os.dup2(reader, 0)
    try:
        os.write(writer, typed.encode() + b"\n")
        monkeypatch.setattr(requests, "typed_yes", lambda _: typed_yes(60 if keep else 1))
        assert requests.reload(HERE, 60) == code
    finally:
        os.dup2(before, 0)
        for each in (reader, writer, before):
            os.close(each)
    assert said in "".join(capfd.readouterr())
    # It names the reload that it answers: another one may be in force by then.
    assert agent.asked == [{"verb": "reload", "confirm": 60}, {"verb": "confirm", "keep": keep, "trial": 3}]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("keep", [True, False])
def test_a_reload_is_confirmed_by_another_command(
    agent: Answering, capfd: pytest.CaptureFixture[str], keep: bool, ok: bool, code: int
) -> None:
    agent.reply = {"ok": True, "message": "in force"}
    assert requests.reload(HERE, 60, wait=False) == 0
    assert "`nfq-agent confirm` within 60 s" in "".join(capfd.readouterr())
    agent.reply = {"ok": ok, "message": "what the agent says"}
    assert requests.confirm(HERE, keep) == code
    assert "what the agent says" in "".join(capfd.readouterr())
    assert agent.asked == [{"verb": "reload", "confirm": 60}, {"verb": "confirm", "keep": keep}]


@pytest.mark.parametrize("value", ["2020-01-01", "07:30:00", "nan", "-inf", "[" * 3000, "[2020-01-01]", "a\0b"])
def test_chaos_sends_a_value_that_json_does_not_have_as_text(agent: Answering, value: str) -> None:
    assert requests.chaos(HERE, "main", [f"drop={value}"], 30.0) == 1
    assert [question["odds"] for question in agent.asked] == [{"drop": value}]


def test_chaos_gives_the_agent_its_keys_and_time(agent: Answering) -> None:
    agent.reply = {"ok": True, "message": "queue main has faults"}
    assert requests.chaos(HERE, "main", ["drop=0.2", "delay_for=50ms", "seed=7"], 30.0) == 0
    assert agent.asked == [
        {"verb": "chaos", "queue": "main", "odds": {"drop": 0.2, "delay_for": "50ms", "seed": 7}, "seconds": 30.0}
    ]
    assert requests.chaos(HERE, None, [], 30.0) == 0
    assert agent.asked[-1] == {"verb": "confirm", "keep": False, "faults": True}
    agent.reply = {"ok": False, "config": True, "message": "no fault is named"}
    assert requests.chaos(HERE, "main", [], 30.0) == 2


def test_reload_without_an_agent(run_folder: Path) -> None:
    assert run_folder.is_dir()
    with pytest.raises(control.NotRunning):
        requests.reload(HERE, None)


def test_a_restart_whose_agent_ends_is_said_at_once(agent: Answering, capfd: pytest.CaptureFixture[str]) -> None:
    """It answers that it will start again, and then its process ends: its socket is closed."""
    agent.reply = {"ok": True, "began": 7.0}
    agent.answers = 1
    began = time.monotonic()
    assert requests.restart(HERE) == 1
    assert time.monotonic() - began < 10
    assert "ended while it was started again" in capfd.readouterr().err


def test_rules_are_not_removed_beside_an_agent_that_would_insert_them_again(agent: Answering) -> None:
    agent.reply = {"ok": True, "pid": 4711}
    with pytest.raises(control.ControlError, match=r"instance default is running \(pid 4711\).*stop it"):
        rule_verbs.remove(HERE, after_failure=False)


def test_the_demo_says_that_it_takes_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert demo.tell() == 1
    assert "takes root; run it with sudo" in capsys.readouterr().err


class Noted(FakeHost):
    """A backend in memory that notes in a file, which a child process shares, when rules are applied."""

    def __init__(self, note: Path) -> None:
        super().__init__(FakeKernel(), "default")
        self._note = note

    def apply_all(self, *arguments: Any, **options: Any) -> Any:
        self._note.write_text("taken back")
        return super().apply_all(*arguments, **options)


def guard(run_folder: Path, seconds: int) -> tuple[Guard, Path]:
    note = run_folder / "note"
    live = LiveRules(Noted(note))
    return Guard(seconds, live, live.read(), {family: {} for family in FAMILIES}), note


def test_a_dismissed_guard_takes_nothing_back(run_folder: Path) -> None:
    made, note = guard(run_folder, 60)
    made.dismiss()
    assert not note.exists()


@pytest.mark.parametrize(("typed", "code"), [(b"yes\n", 0), (b"no\nyes\n", 0), (b"no\n", 1), (b"", 1)])
def test_only_a_yes_keeps_the_rules(run_folder: Path, monkeypatch: pytest.MonkeyPatch, typed: bytes, code: int) -> None:
    made, note = guard(run_folder, 1 if code else 60)
    reader, writer = os.pipe()
    os.write(writer, typed)
    os.close(writer)
    before = os.dup(0)
    try:
        os.dup2(reader, 0)
        assert made.ask() == code
        assert note.exists() == (code != 0)
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reader)
