"""Verdicts: which are refused, what shares a message, and their number on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.verdict import ACCEPT, DROP, REJECT, REPEAT, RETAIN, WOULD_DROP, Action, Verdict


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"action": Action.QUEUE}, "a queue number goes with Action.QUEUE"),
        ({"action": Action.ACCEPT, "queue": 5}, "a queue number goes with Action.QUEUE"),
        ({"action": Action.QUEUE, "queue": -1}, "queue -1: a queue number is 0 to 65535"),
        ({"action": Action.QUEUE, "queue": 65536}, "queue 65536"),
        ({"action": Action.RETAIN, "mark": 1}, "a packet that is retained is not changed"),
        ({"action": Action.RETAIN, "payload": b""}, "a packet that is retained is not changed"),
        ({"action": Action.ACCEPT, "mark": -1}, "a mark has 32 bits"),
        ({"action": Action.ACCEPT, "mark": 1 << 32}, "mark 0x100000000: a mark has 32 bits"),
    ],
)
def test_a_verdict_that_cannot_be_given(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Verdict(**fields)


@pytest.mark.parametrize("mark", [0, 1, 0xFFFFFFFF])
@pytest.mark.parametrize("queue", [0, 1, 0xFFFF])
def test_the_ends_of_what_is_allowed(mark: int, queue: int) -> None:
    verdict = Verdict(Action.QUEUE, mark=mark, queue=queue)
    assert verdict.code == 3 + (queue << 16)
    assert (verdict.mark, verdict.queue) == (mark, queue)


def test_what_shares_a_message_with_its_neighbours() -> None:
    assert all(each.plain for each in (ACCEPT, DROP, REPEAT, REJECT, RETAIN, WOULD_DROP, Verdict(Action.ACCEPT, exact=True)))
    for fields in ({"mark": 0}, {"payload": b""}, {"delay": 0.1}, {"inject": (b"x",)}):
        assert not Verdict(Action.ACCEPT, **fields).plain
    assert not Verdict(Action.QUEUE, queue=0).plain


@pytest.mark.parametrize(
    ("verdict", "outcome", "word", "code"),
    [
        (ACCEPT, Action.ACCEPT, "accept", 1),
        (DROP, Action.DROP, "drop", 0),
        (REJECT, Action.DROP, "reject", 0),
        (REPEAT, Action.REPEAT, "repeat", 4),
        (Verdict(Action.REPEAT, mark=1, means=Action.DROP), Action.DROP, "drop", 4),
        (Verdict(Action.QUEUE, queue=7), Action.QUEUE, "queue", 0x70003),
    ],
)
def test_what_finally_happens(verdict: Verdict, outcome: Action, word: str, code: int) -> None:
    assert (verdict.outcome, verdict.word, verdict.code) == (outcome, word, code)
