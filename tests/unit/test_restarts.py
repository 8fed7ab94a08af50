"""When a worker that died is started again."""

from __future__ import annotations

from nfq_agent.service.restarts import MOST_DEATHS, WITHIN, Deaths


def test_the_first_death_is_answered_at_once_and_the_next_ones_later_and_later() -> None:
    deaths = Deaths()
    assert not deaths
    assert [deaths.add(float(second)) for second in range(4)] == [0.0, 0.1, 0.2, 0.4]
    assert deaths


def test_too_many_deaths_within_the_time_end_it() -> None:
    deaths = Deaths()
    pauses = [deaths.add(float(second)) for second in range(MOST_DEATHS)]
    assert pauses[-1] is None
    assert None not in pauses[:-1]
    assert deaths.recent(MOST_DEATHS - 1.0) == MOST_DEATHS


def test_deaths_of_long_ago_do_not_count() -> None:
    deaths = Deaths()
    for number in range(20):
        assert deaths.add(number * WITHIN) == 0.0
    assert deaths.recent(20 * WITHIN) == 0
