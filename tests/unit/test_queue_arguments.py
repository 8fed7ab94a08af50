"""What the queue refuses before it opens anything."""

from __future__ import annotations

import pytest

from nfq_agent import (
    RETAIN,
    Action,
    Queue,
    Verdict,
)


def test_arguments_are_checked() -> None:
    for bad in (
        {"number": 70000},
        {"number": -1},
        {"family": "ipx"},
        {"copy_range": 0},
        {"copy_range": 65536},
        {"max_len": 0},
        {"on_unanswered": RETAIN},
        {"on_unanswered": Verdict(Action.ACCEPT, mark=1)},
    ):
        with pytest.raises(ValueError, match=r"."):
            Queue(**{"number": 1, **bad})  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(ValueError, match="loses every packet"):
        Queue(1, copy="none")  # type: ignore[arg-type]  # that is the mistake
