"""What something costs the processor, beside something else."""

from __future__ import annotations

from collections.abc import Callable

_ROUNDS = 5


def assert_cost_below(times: float, small: Callable[[], float], large: Callable[[], float]) -> None:
    """Fail unless `large` costs less than so many times what `small` costs. Both run something and give its seconds.

    They are run in turn. A loaded machine only adds, so the least of each counts, and rounds follow only while that is too much.
    """
    used: tuple[list[float], list[float]] = [], []
    for _ in range(_ROUNDS):
        for run, seconds in zip((small, large), used, strict=True):
            seconds.append(run())
        if min(used[1]) < times * min(used[0]):
            return
    raise AssertionError(used)
