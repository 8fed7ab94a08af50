"""The hand-over of queues to workers that are prepared: every order of events, without a process."""

from __future__ import annotations

import itertools

import pytest

from nfq_agent.service.succession import Command, Happening, Stage, Succession

READY, FAILED, DONE, ENDED, LATE = (
    Happening.READY, Happening.FAILED, Happening.DONE, Happening.ENDED, Happening.LATE,
)  # fmt: skip


def test_a_predecessor_stops_before_its_successor_begins() -> None:
    succession = Succession({1: True})
    assert succession.on(1, READY) == [(1, Command.KEEP_BESIDE), (1, Command.STOP)]
    assert not succession.over
    assert succession.on(1, DONE) == [(1, Command.BEGIN), (1, Command.KEEP)]
    assert succession.over


def test_nothing_is_stopped_before_all_successors_are_ready() -> None:
    succession = Succession({1: True, 2: True, 3: False})
    assert succession.on(2, READY) == []
    assert succession.on(3, READY) == []
    assert succession.on(1, READY) == [
        (1, Command.KEEP_BESIDE), (1, Command.STOP), (2, Command.KEEP_BESIDE), (2, Command.STOP),
        (3, Command.KEEP_BESIDE), (3, Command.TAKE_LOST), (3, Command.KEEP),
    ]  # fmt: skip


def test_one_that_cannot_be_prepared_leaves_every_predecessor_serving() -> None:
    succession = Succession({1: True, 2: True, 3: True})
    assert succession.on(1, READY) == []
    assert succession.on(2, FAILED) == [(2, Command.END_NEW), (1, Command.END_NEW), (3, Command.END_NEW)]
    assert succession.over
    assert set(succession.stages.values()) == {Stage.REFUSED}


def test_what_a_dead_predecessor_had_read_is_taken_over() -> None:
    succession = Succession({1: True})
    succession.on(1, READY)
    assert succession.on(1, ENDED) == [(1, Command.TAKE_LOST), (1, Command.KEEP)]


def test_a_predecessor_that_hangs_is_killed_before_its_packets_are_taken_over() -> None:
    succession = Succession({1: True})
    succession.on(1, READY)
    assert succession.on(1, LATE) == [(1, Command.KILL)]
    assert succession.on(1, ENDED) == [(1, Command.TAKE_LOST), (1, Command.KEEP)]


def test_no_place_is_without_anything_to_do() -> None:
    assert Succession({}).over


@pytest.mark.parametrize("served", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_no_order_of_events_lets_two_serve_one_place(served: tuple[bool, bool], order: tuple[int, int]) -> None:
    for endings in itertools.product((DONE, ENDED, LATE), repeat=2):
        succession = Succession({1: served[0], 2: served[1]})
        serving = {place for place, old in zip((1, 2), served, strict=True) if old}
        begun: set[int] = set()
        kept: set[int] = set()

        def do(
            commands: list[tuple[int, Command]],
            serving: set[int] = serving,
            begun: set[int] = begun,
            kept: set[int] = kept,
        ) -> None:
            for place, command in commands:
                if command is Command.KEEP_BESIDE:
                    kept.add(place)
                if command in (Command.BEGIN, Command.TAKE_LOST):
                    assert place in kept, "the next agent would not know of it"
                    assert place not in serving, "its predecessor reads still"
                    assert place not in begun
                    begun.add(place)

        for place in order:
            do(succession.on(place, READY))
        for place, ending in zip((1, 2), endings, strict=True):
            if succession.stages[place] is not Stage.HANDING:
                continue
            if ending is LATE:
                assert succession.on(place, LATE) == [(place, Command.KILL)]
                ending = ENDED
            serving.discard(place)
            do(succession.on(place, ending))
        assert succession.over
        assert begun == {1, 2}
