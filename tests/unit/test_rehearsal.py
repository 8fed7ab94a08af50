"""The check before a restart: what it says, how long it may take, and that the watchdog is fed meanwhile."""

from __future__ import annotations

import sys

import pytest

from nfq_agent.host import reexec


def rehearsed(monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[str, int]:
    """What a check by this code says, and how many beats there were meanwhile."""
    monkeypatch.setattr(reexec, "command", lambda: [sys.executable, "-c", code, "run", "--instance", "a"])
    monkeypatch.setattr(reexec, "_BEAT", 0.05)
    beats: list[None] = []
    return reexec.rehearse(lambda: beats.append(None)), len(beats)


def test_a_good_one_says_nothing_and_feeds_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, time; time.sleep(0.5); sys.exit(sys.argv[1:] != ['check', '--code', '--instance', 'a'])"
    said, beats = rehearsed(monkeypatch, code)
    assert said == ""
    assert beats > 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('a fault', file=sys.stderr); sys.exit(78)", "a fault"),
        ("print('x' * 300_000); import sys; sys.exit('too much')", "too much"),
        ("import sys; sys.exit(3)", "ended with 3"),
    ],
)
def test_a_bad_one_says_why(monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    assert rehearsed(monkeypatch, code)[0].endswith(said)


def test_one_that_does_not_end_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reexec, "_REHEARSAL", 0.2)
    said, _ = rehearsed(monkeypatch, "import time; time.sleep(600)")
    assert said.startswith(
        "the check of its code and its configuration has not ended within 0.2 s; try again when this host is less busy"
    )
    assert "check --code --instance a` to see what it waits for" in said


def test_a_program_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reexec, "command", lambda: ["/nowhere/python", "run"])
    assert "/nowhere/python" in reexec.rehearse(lambda: None)
