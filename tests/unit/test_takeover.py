"""Packets that a worker which died had read: which are its, what they get, and how they are counted."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.counters import Counters
from nfq_agent.packet import Packet
from nfq_agent.service.order import Order
from nfq_agent.service.takeover import Takeover
from nfq_agent.testing import udp
from nfq_agent.verdict import DROP, REPEAT, Verdict


class Lane:
    """One queue: the packets that wait in it, and up to which number others were answered."""

    def __init__(self, number: int, *waiting: int) -> None:
        self.number = number
        self.answered: list[tuple[int, Verdict]] = []
        self._waiting = [Packet(udp("192.0.2.1:1", "192.0.2.2:2").payload, id=number) for number in waiting]

    def read(self, budget: int) -> list[Packet]:
        read, self._waiting = self._waiting[:budget], self._waiting[budget:]
        return read

    def answer_lost(self, below: int, verdict: Verdict) -> None:
        self.answered.append((below, verdict))


class World:
    def __init__(self, order: Order, **counts: int) -> None:
        self.counters = Counters()
        for name, value in counts.items():
            setattr(self.counters, name, value)
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.judged: list[int] = []
        self.takeover = Takeover(order, DROP, self.counters, self._emit)

    def _emit(self, message: str, level: str = "info", **fields: Any) -> None:
        self.said.append((message, fields))

    def _judge(self, packets: list[Packet]) -> None:
        self.judged += [packet.id for packet in packets]

    def account_for(self, *lanes: Lane) -> int:
        return self.takeover.account_for(lanes, self._judge)


@pytest.mark.parametrize(("requeue", "verdict", "said"), [(True, REPEAT, "are queued again"), (False, DROP, "on_error")])
def test_lost_are_those_older_than_the_first_that_is_read(requeue: bool, verdict: Verdict, said: str) -> None:
    world, lane = World(Order(90, requeue), last_id=70), Lane(5, 78, 79)
    assert world.takeover.due
    assert world.account_for(lane) == 1
    assert not world.takeover.due
    assert lane.answered == [(77, verdict)]
    assert world.judged == [78]
    assert (world.counters.lost, world.counters.last_id) == (7, 78)
    (message, fields), *more = world.said
    assert not more
    assert message.startswith("queue 5: up to 7 packets")
    assert said in message
    assert fields["lost"] == 7


def test_where_none_waits_all_that_the_kernel_had_numbered_are_lost() -> None:
    world, lane = World(Order(90, requeue=True), last_id=70), Lane(5)
    assert world.account_for(lane) == 0
    assert lane.answered == [(90, REPEAT)]
    assert (world.counters.lost, world.counters.last_id, world.judged) == (20, 90, [])


@pytest.mark.parametrize("last", [77, 100])
def test_nothing_is_said_where_nothing_is_missing(last: int) -> None:
    # 100: its predecessor had counted packets of another life of the queue.
    world, lane = World(Order(77, requeue=True), last_id=last), Lane(5, 78)
    world.account_for(lane)
    assert lane.answered == [(77, REPEAT)]
    assert world.counters.lost == 0
    assert not world.said


def test_numbers_begin_again_after_the_last_of_32_bits() -> None:
    world, lane = World(Order(3, requeue=True), last_id=0xFFFFFFFE), Lane(5, 2)
    world.account_for(lane)
    assert lane.answered == [(1, REPEAT)]
    assert (world.counters.lost, world.counters.last_id) == (3, 2)


def test_the_queue_of_known_flows_has_counters_of_its_own() -> None:
    world = World(Order(10, True, known=20), last_id=8, known_last_id=15)
    new, known = Lane(5, 10), Lane(6, 19)
    assert world.account_for(new, known) == 2
    assert (new.answered, known.answered) == ([(9, REPEAT)], [(18, REPEAT)])
    counters = world.counters
    assert (counters.lost, counters.known_lost, counters.known_received) == (1 + 3, 3, 1)
    assert (counters.last_id, counters.known_last_id) == (10, 19)
    # Without an order for it, it is left alone.
    alone = World(Order(10, requeue=True), last_id=9)
    assert alone.account_for(Lane(5), untouched := Lane(6, 19)) == 0
    assert not untouched.answered
