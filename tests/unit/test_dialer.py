"""The dialer: where a connection goes, and by which address, as scripts of events and the commands that answer them."""

from __future__ import annotations

from socket import AF_INET, AF_INET6

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.host.sockets import Address
from nfq_agent.proxy.dialer import Abandon, Candidate, Connect, Dialer, GiveUp, Refused

WEB: Candidate = (AF_INET, ("192.0.2.1", 80))
WEB6: Candidate = (AF_INET6, ("2001:db8::1", 80, 0, 0))
OTHER: Candidate = (AF_INET, ("192.0.2.2", 80))
OURS: Candidate = (AF_INET, ("192.0.2.9", 15002))


def is_own(address: Address) -> bool:
    return address == OURS[1]


def dialer(*target: Candidate) -> Dialer[str]:
    it: Dialer[str] = Dialer(is_own, 10.0)
    it.aim_at(target)
    return it


class TestRoute:
    def test_where_it_was_going(self) -> None:
        assert dialer(OTHER).route(WEB) == (WEB,)

    def test_the_target_where_the_destination_is_not_known(self) -> None:
        assert dialer(OTHER, WEB6).route(None) == (OTHER, WEB6)

    def test_the_target_for_our_own_listener(self) -> None:
        assert dialer(OTHER).route(OURS) == (OTHER,)

    def test_refused_without_a_target(self) -> None:
        it = dialer()
        assert it.route(None) == Refused("its original destination is not known, and no target is configured")
        assert it.route(OURS) == Refused("it was sent to our own listener, and no target is configured")

    def test_our_own_listener_is_no_target(self) -> None:
        it = dialer()
        assert it.aim_at([OURS, WEB]) is True
        assert it.target == (WEB,)
        assert it.aim_at([OURS]) is False
        assert isinstance(it.route(None), Refused)


class TestAttempts:
    def test_the_first_address_answers(self) -> None:
        it = dialer()
        assert it.start("a", (WEB, OTHER), 100.0) == Connect("a", WEB)
        assert it.due == 110.0
        it.connected("a")
        assert it.due is None
        assert it.woken(1000.0) == []

    def test_the_next_address_gets_a_time_of_its_own(self) -> None:
        it = dialer()
        it.start("a", (WEB, OTHER), 100.0)
        assert it.failed("a", "Connection refused", 104.0) == Connect("a", OTHER)
        assert it.due == 114.0

    def test_given_up_after_the_last_with_its_reason(self) -> None:
        it = dialer()
        it.start("a", (WEB, OTHER), 100.0)
        it.failed("a", "Connection refused", 100.0)
        assert it.failed("a", "No route to host", 101.0) == GiveUp("a", "No route to host")
        assert len(it) == 0

    def test_no_address_at_all(self) -> None:
        assert dialer().start("a", (), 100.0) == GiveUp("a", "no address")

    def test_one_that_takes_too_long_is_abandoned_and_continues(self) -> None:
        it = dialer()
        it.start("a", (WEB, OTHER), 100.0)
        it.start("b", (WEB,), 101.0)
        assert it.woken(109.9) == []
        assert it.woken(110.0) == [Abandon("a", "no answer within 10 s")]
        assert it.failed("a", "no answer within 10 s", 110.0) == Connect("a", OTHER)
        assert it.woken(111.0) == [Abandon("b", "no answer within 10 s")]
        assert it.failed("b", "no answer within 10 s", 111.0) == GiveUp("b", "no answer within 10 s")
        assert it.due == 120.0

    def test_a_client_that_left_is_not_connected(self) -> None:
        it = dialer()
        it.start("a", (WEB, OTHER), 100.0)
        it.gone("a")
        it.gone("a")
        assert (len(it), it.due, it.woken(1000.0)) == (0, None, [])

    @pytest.mark.parametrize("event", ["connected", "failed"])
    def test_nothing_is_reported_twice(self, event: str) -> None:
        it = dialer()
        it.start("a", (WEB,), 100.0)
        it.connected("a")
        with pytest.raises(KeyError):
            it.connected("a") if event == "connected" else it.failed("a", "", 101.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["start", "fail", "connect", "gone", "wait"])), max_size=60))
def test_every_connection_ends_once_and_tries_each_address_in_turn(script: list[tuple[str, str]]) -> None:
    """Whatever the order of events: at most one attempt of a connection, never an address twice, deadlines in order."""
    it = dialer()
    left: dict[str, list[Candidate]] = {}
    now = 0.0

    def check(key: str, command: object) -> None:
        if left[key]:
            assert command == Connect(key, left[key].pop(0))
        else:
            assert isinstance(command, GiveUp)
            del left[key]

    for key, event in script:
        if event == "wait":
            now += 4.0
            for late in it.woken(now):
                check(late.key, it.failed(late.key, late.reason, now))
        elif event == "start" and key not in left:
            left[key] = [WEB, OTHER]
            check(key, it.start(key, (WEB, OTHER), now))
        elif event == "fail" and key in left:
            check(key, it.failed(key, "reset", now))
        elif event == "connect" and key in left:
            it.connected(key)
            del left[key]
        elif event == "gone":
            it.gone(key)
            left.pop(key, None)
        assert len(it) == len(left)
        assert it.due is None or now < it.due <= now + 10.0
