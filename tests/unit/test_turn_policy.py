"""How long turns are and whether they wait: a policy of counts and seconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.service.turn_policy import AWAITED, BUDGET, FEW, FIRST, LONGEST, REMEMBERED, SHORT, STEP, Turn, TurnPolicy, forgets

USUAL = Turn(BUDGET, waits=False)
AWAIT = Turn(AWAITED, waits=True)


def settled(may_wait: bool, busy_poll: float) -> TurnPolicy:
    """A policy behind the short turns of a new process."""
    policy = TurnPolicy(may_wait, busy_poll)
    while policy.next.budget < BUDGET:
        policy.ended(policy.next, policy.next.budget, 0.0)
    return policy


def after(policy: TurnPolicy, count: int, seconds: float = 0.0) -> Turn:
    """The turn that follows one with `count` packets."""
    policy.ended(policy.next, count, seconds)
    return policy.next


def test_a_new_process_begins_with_short_turns() -> None:
    policy = TurnPolicy(may_wait=True, busy_poll=0.0)
    assert FIRST > FEW, "a full turn does not wait for more"
    assert policy.next == Turn(FIRST, waits=False)
    assert [after(policy, policy.next.budget, SHORT).budget for _ in range(3)] == [2 * FIRST, BUDGET, BUDGET]


def test_a_worker_that_falls_behind_takes_longer_turns() -> None:
    policy = settled(may_wait=True, busy_poll=0.0)
    assert policy.next == USUAL
    budgets = [after(policy, policy.next.budget).budget for _ in range(100)]
    assert budgets[:3] == [BUDGET + STEP, BUDGET + 2 * STEP, BUDGET + 3 * STEP]
    assert budgets[-1] == max(budgets) == LONGEST


def test_a_slow_turn_or_one_that_empties_the_queue_makes_them_short_again() -> None:
    policy = settled(may_wait=True, busy_poll=0.0)
    assert after(policy, BUDGET).budget == BUDGET + STEP
    assert after(policy, policy.next.budget, SHORT).budget == BUDGET
    after(policy, BUDGET)
    assert after(policy, policy.next.budget - 1).budget == BUDGET


def test_few_packets_are_waited_for_and_many_are_not() -> None:
    policy = settled(may_wait=True, busy_poll=0.0)
    assert after(policy, FEW + 1) == USUAL
    assert after(policy, 0) == USUAL
    assert policy.sleeps(0)
    assert after(policy, FEW) == AWAIT
    assert not policy.sleeps(0)
    # After a turn that waited comes one that looks.
    assert after(policy, 5) == USUAL
    # Packets came while it waited: it waits again, although none is there now.
    assert after(policy, 0) == AWAIT
    # None came: the loop sleeps.
    assert after(policy, 0) == USUAL
    assert policy.sleeps(0)
    assert after(policy, 0) == USUAL


def test_with_busy_polling_it_polls_after_any_packet() -> None:
    policy = settled(may_wait=True, busy_poll=0.001)
    assert after(policy, 100) == USUAL
    assert after(policy, 0) == AWAIT
    assert policy.polls == 0.0


def test_where_no_turn_waits_the_loop_polls() -> None:
    policy = settled(may_wait=False, busy_poll=0.25)
    assert policy.polls == 0.25
    for count in (0, 1, FEW, 0):
        assert not after(policy, count).waits
        assert policy.sleeps(count) is (count == 0)


@given(
    st.booleans(), st.sampled_from([0.0, 0.001]), st.lists(st.tuples(st.integers(0, LONGEST), st.sampled_from([0.0, SHORT, 1.0])))
)
def test_no_turn_is_too_long_and_none_waits_twice(may_wait: bool, busy_poll: float, ends: list[tuple[int, float]]) -> None:
    policy = settled(may_wait, busy_poll)
    waited = False
    for count, seconds in ends:
        turn = policy.next
        assert BUDGET <= turn.budget <= LONGEST
        assert not (turn.waits and (waited or not may_wait))
        waited = turn.waits
        policy.ended(turn, min(count, turn.budget), seconds)


def test_remembered_verdicts_are_bounded() -> None:
    assert not forgets(REMEMBERED - 1)
    assert forgets(REMEMBERED)
