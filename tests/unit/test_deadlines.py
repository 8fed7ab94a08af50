"""The deadlines of connections, as scripts of times and what is to end then."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.proxy.deadlines import Deadlines, Expired, Timeouts


@dataclass(eq=False)
class Connection:
    opened: float = 100.0
    client_active: float = 100.0
    server_active: float = 100.0
    carried: bool = False
    waiting: bool = False


NONE = Timeouts(opening=0, idle=0, client=0, server=0, full=0)
ALL = Timeouts(opening=10, idle=60, client=40, server=50, full=5)


def deadlines(timeouts: Timeouts = ALL, *connections: Connection) -> Deadlines[Connection]:
    it: Deadlines[Connection] = Deadlines(timeouts)
    for each in connections:
        it.opened(each, each.opened)
    return it


def ended(it: Deadlines[Connection], now: float) -> list[str]:
    return [expired.reason for expired in it.woken(now)[1]]


class TestOpening:
    def test_one_that_carries_nothing_ends(self) -> None:
        it = deadlines(ALL, Connection())
        assert it.due == 110
        assert ended(it, 109.9) == []
        assert ended(it, 110) == ["no byte was carried within 10 s"]
        assert it.due is None
        assert len(it) == 0
        assert ended(it, 1000) == []

    def test_bytes_that_are_kept_back_are_not_carried(self) -> None:
        """A client that sends a byte now and then while an element waits for more."""
        slow = Connection(client_active=109.0)
        assert ended(deadlines(ALL, slow), 110) == ["no byte was carried within 10 s"]

    def test_one_that_carries_continues(self) -> None:
        it = deadlines(ALL, Connection(carried=True, client_active=109, server_active=109))
        assert ended(it, 110) == []
        assert it.due == 149

    def test_the_first_look_tells_which_connections_last(self) -> None:
        """What is done for lasting connections only is not done for short ones."""
        short, long = Connection(), Connection(carried=True)
        it = deadlines(ALL, short, long)
        it.gone(short)
        assert it.woken(110)[0] == [long]
        assert it.woken(120)[0] == []


class TestSilence:
    def test_idle(self) -> None:
        it = deadlines(Timeouts(opening=0, idle=60, client=0, server=0), quiet := Connection(carried=True))
        assert it.woken(160)[1] == [Expired(quiet, "no byte either way for 60 s")]

    def test_a_byte_puts_it_off(self) -> None:
        it = deadlines(Timeouts(opening=0, idle=60, client=0, server=0), talks := Connection(carried=True))
        talks.server_active = 159
        assert ended(it, 160) == []
        assert it.due == 219
        assert ended(it, 219) == ["no byte either way for 60 s"]

    def test_each_side_has_its_own(self) -> None:
        it = deadlines(ALL, one := Connection(carried=True), other := Connection(carried=True))
        it.woken(110)
        one.server_active = other.client_active = 139
        assert it.woken(140)[1] == [Expired(one, "the client sent and took no byte for 40 s")]
        assert it.woken(150)[1] == [Expired(other, "the server sent and took no byte for 50 s")]

    def test_what_an_element_holds_back_is_not_silence(self) -> None:
        it = deadlines(ALL, held := Connection(carried=False, waiting=True))
        for now in range(110, 500):
            assert ended(it, now) == []
        held.waiting = False
        assert ended(it, 501) == ["no byte was carried within 10 s"]

    def test_without_limits_nothing_is_watched(self) -> None:
        it = deadlines(NONE, Connection())
        assert (it.due, it.woken(1e9), it.crowded(1e9)) == (None, ([], []), [])

    def test_with_a_limit_for_openings_alone_one_that_carries_stays(self) -> None:
        it = deadlines(Timeouts(opening=10, idle=0, client=0, server=0), Connection(carried=True))
        assert ended(it, 110) == ended(it, 1e9) == []


class TestCrowded:
    def test_the_idle_ones_end(self) -> None:
        idle, held = Connection(carried=True), Connection(carried=True, waiting=True)
        busy = Connection(carried=True, client_active=103)
        it = deadlines(ALL, idle, busy, held)
        assert it.crowded(104.9) == []
        assert it.crowded(105) == [Expired(idle, "no byte either way for 5 s, while the proxy was full")]
        it.woken(110)
        assert {each.key for each in it.crowded(110)} == {idle, busy}


def test_what_has_ended_is_not_kept_by_a_look_far_ahead() -> None:
    it = deadlines(Timeouts(opening=1, idle=1e6, client=0, server=0))
    for number in range(10_000):
        one = Connection(opened=number, client_active=number, server_active=number, carried=True)
        it.opened(one, number)
        it.woken(number + 1)
        it.gone(one)
    assert len(it) == 0
    assert len(it._looks) <= 64  # noqa: SLF001  # what is kept shows nowhere else


@given(
    st.lists(st.tuples(st.sampled_from(["open", "byte", "end", "wait"]), st.integers(0, 4), st.integers(1, 30)), max_size=80),
)
def test_each_ends_exactly_when_it_is_silent(script: list[tuple[str, int, int]]) -> None:
    """Against the plain rule, looked at whenever the deadlines ask to be: none is ended early, late or twice."""
    timeouts = Timeouts(opening=10, idle=25, client=0, server=0)
    it = deadlines(timeouts)
    running: dict[int, Connection] = {}
    now = 0.0

    def wake() -> None:
        gone = {id(expired.key) for expired in it.woken(now)[1]}
        for name, each in list(running.items()):
            silent = now >= max(each.client_active, each.server_active) + 25 or (not each.carried and now >= each.opened + 10)
            assert (id(each) in gone) == silent
            if silent:
                del running[name]

    for event, name, seconds in script:
        if event == "open" and name not in running:
            running[name] = Connection(now, now, now)
            it.opened(running[name], now)
        elif event == "byte" and name in running:
            running[name].client_active = now
            running[name].carried = True
        elif event == "end" and name in running:
            it.gone(running.pop(name))
        elif event == "wait":
            until = now + seconds
            while (due := it.due) is not None and due <= until:
                now = due
                wake()
            now = until
        assert len(it) == len(running)
