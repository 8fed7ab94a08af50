"""When a worker polls by itself: a rule of counts and seconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.service.auto_poll import APART, ENOUGH, LONGEST, PAUSE, POLL, SAVED, SHARE, WINDOW, AutoPoll, Polled

# Packets of a window that come close enough together.
CLOSE = int(WINDOW / APART) + 1


class Clock:
    """A rule, and the time that passes for it in steps of a window."""

    def __init__(self) -> None:
        self.rule = AutoPoll()
        self.now = 100.0
        self.step(0)

    def step(self, packets: int, polled: Polled = Polled(), seconds: float = WINDOW) -> float:  # noqa: B008  # frozen
        """A turn of `seconds`; what it polls next."""
        self.now += seconds
        self.rule.report(packets, self.now, polled)
        return self.rule.seconds

    def fail(self) -> float:
        """Polls that find nothing; what it polls next."""
        return self.step(1, Polled(ENOUGH, 0, ENOUGH * POLL))


def trying() -> Clock:
    """A rule that has begun to try."""
    clock = Clock()
    assert clock.step(CLOSE) == POLL
    assert clock.rule.tries
    return clock


def test_it_does_not_poll_while_nothing_comes_or_packets_are_far_apart() -> None:
    clock = Clock()
    assert [clock.step(0) for _ in range(100)] == [0.0] * 100
    assert [clock.step(CLOSE // 2) for _ in range(100)] == [0.0] * 100


def test_packets_behind_a_long_silence_do_not_begin_it() -> None:
    clock = Clock()
    assert clock.step(CLOSE, seconds=5.0) == 0.0


def test_it_goes_on_while_half_of_the_polls_find_a_packet() -> None:
    clock = trying()
    for _ in range(100):
        assert clock.step(ENOUGH, Polled(ENOUGH, ENOUGH // 2, WINDOW / 4)) == POLL
        assert not clock.rule.tries
    assert clock.step(ENOUGH, Polled(ENOUGH, ENOUGH // 2 - 1, WINDOW / 4)) == 0.0


def test_few_polls_say_nothing_until_there_are_enough() -> None:
    clock = trying()
    for _ in range(ENOUGH - 1):
        assert clock.step(1, Polled(1, 0, POLL)) == POLL
    assert clock.step(1, Polled(1, 0, POLL)) == 0.0


def test_after_each_failure_it_waits_twice_as_long() -> None:
    clock = trying()
    waited = []
    for _ in range(10):
        assert clock.fail() == 0.0
        begin = clock.now
        while clock.step(CLOSE) == 0.0:
            pass
        waited.append(clock.now - begin)
    pauses = [min(PAUSE * 2**number, LONGEST) for number in range(10)]
    assert all(0 <= real - least <= 2 * WINDOW for real, least in zip(waited, pauses, strict=True)), waited
    # What paid makes the next pause short again.
    assert clock.step(ENOUGH, Polled(ENOUGH, ENOUGH, 0.0)) == POLL
    assert clock.fail() == 0.0
    begin = clock.now
    while clock.step(CLOSE) == 0.0:
        pass
    assert clock.now - begin <= PAUSE + 2 * WINDOW


Turns = st.lists(
    st.tuples(st.integers(0, 4096), st.sampled_from([1e-5, 1e-3, WINDOW, 0.05]), st.floats(0, 1), st.floats(0, 1)), max_size=100
)


@given(Turns)
def test_it_polls_for_no_more_than_its_share_of_the_time(turns: list[tuple[int, float, float, float]]) -> None:
    clock = Clock()
    begin, spent, longest = clock.now, 0.0, 0.0
    for packets, seconds, part, hits in turns:
        polled = Polled()
        if clock.rule.seconds:
            times = max(1, int(part * seconds / POLL))
            polled = Polled(times, int(hits * times), part * seconds)
        spent += polled.seconds
        longest = max(longest, polled.seconds)
        assert clock.step(packets, polled, seconds) in (0.0, POLL)
        # A turn that has begun is not cut short.
        assert spent <= SHARE * (clock.now - begin + SAVED) + longest + 1e-9


@given(Turns)
def test_it_ends_soon_when_polls_find_nothing(turns: list[tuple[int, float, float, float]]) -> None:
    clock = Clock()
    for packets, seconds, part, hits in turns:
        times = int(part * 100) if clock.rule.seconds else 0
        clock.step(packets, Polled(times, int(hits * times), part * seconds * (times > 0)), seconds)
    # Earlier polls may be counted with the first ones.
    for _ in range(20):
        if clock.rule.seconds:
            clock.fail()
    assert not (clock.rule.seconds and not clock.rule.tries)
