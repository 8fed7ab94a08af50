"""The ledger against a kernel of numbers: every packet gets exactly one verdict, by moves of the table alone."""

from __future__ import annotations

from typing import Final

import pytest
from examples import EXAMPLES
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nfq_agent.packet import Packet
from nfq_agent.queue.ledger import LONGEST_WAIT, MOVES, Bond, Ledger, State
from nfq_agent.verdict import ACCEPT, DROP, REPEAT, RETAIN, Verdict, VerdictError

# The policy's verdict, and those that a program gives: so that they can be told apart.
POLICY: Final = REPEAT
AFTER: Final = 5.0
LIMIT: Final = 6
MASK: Final = 0xFFFFFFFF

verdicts = st.sampled_from([ACCEPT, DROP, RETAIN])


class _Nobody:
    def verdict(self, packet: Packet, verdict: Verdict) -> None:
        raise AssertionError


class Ledgers(RuleBasedStateMachine):
    """The queue of the kernel, a program that does what it likes, and exceptions anywhere."""

    @initialize(start=st.sampled_from([0, MASK - 20, (1 << 31) - 10]), passed_over=st.integers(0, 3))
    def bind(self, start: int, passed_over: int) -> None:
        self.now = 100.0
        self.sequence = 0
        # Numbers that wait in the kernel, and the verdicts that it got.
        self.unread: list[int] = []
        self.waiting: dict[int, None] = {}
        self.verdicts: dict[int, Verdict] = {}
        # What the program wanted for a packet, where it said.
        self.wanted: dict[int, Verdict] = {}
        self.packets: dict[int, Packet] = {}
        self.states: dict[int, State] = {}
        self.taken: int | None = None
        self.ledger = Ledger(AFTER, LIMIT)
        if start:
            # A queue that has been bound for long: the numbers are about to begin again.
            self.sequence = start
            self.ledger.begin(Bond(_Nobody()), 0)
            self.ledger.took_and_answered(start)
        else:
            self.arrive(passed_over)
            self.unread.clear()
            self.ledger.begin(Bond(_Nobody()), self.sequence)

    # The kernel.

    @rule(count=st.integers(1, 5))
    def arrive(self, count: int) -> None:
        for _ in range(count):
            self.sequence = (self.sequence + 1) & MASK
            self.unread.append(self.sequence)
            self.waiting[self.sequence] = None

    def send(self, number: int, verdict: Verdict) -> None:
        """One verdict; the kernel ignores it if it knows no such packet."""
        if number in self.waiting:
            del self.waiting[number]
            self.verdicts[number] = verdict

    def send_all(self, given: list[tuple[int, Verdict]]) -> None:
        """As BoundQueue.answer does; a batch answers every packet up to its number."""
        if len(given) < 2 or self.ledger.must_answer_each:
            for number, verdict in given:
                assert number in self.waiting, "answered twice"
                self.send(number, verdict)
            return
        for number, verdict in given:
            assert number in self.waiting, "answered twice"
            for older in [other for other in self.waiting if (number - other) & MASK < 1 << 31]:
                assert older == number or older not in self.packets or not self.ledger.owes(self.packets[older]), "swept along"
                self.send(older, verdict)

    def take(self, count: int) -> list[int]:
        numbers, self.unread = self.unread[:count], self.unread[count:]
        self.taken = numbers[-1] if numbers else None
        return numbers

    def answer_lost(self, first: int | None) -> None:
        while numbers := self.ledger.lost(first):
            for number in self.ledger.to_policy(numbers):
                self.send(number, POLICY)
            self.ledger.answered_lost(numbers)

    # Reading.

    def read(self, count: int) -> list[Packet]:
        if self.ledger.read_ahead:
            return self.ledger.take_read_ahead()
        self.ledger.begin_turn(self.taken)
        numbers = self.take(count)
        self.answer_lost(numbers[0] if numbers else None)
        packets = [Packet(b"", id=number) for number in numbers]
        if packets:
            self.ledger.took(packets)
            self.packets.update((packet.id, packet) for packet in packets)
        return packets

    @rule(count=st.integers(1, 5), each=st.lists(verdicts, min_size=20, max_size=20))
    def turn(self, count: int, each: list[Verdict]) -> None:
        answers = list(zip(self.read(count), each, strict=False))
        self.answer(answers + [(packet, POLICY) for packet in self.ledger.take_read_ahead()])

    def answer(self, answers: list[tuple[Packet, Verdict]]) -> None:
        for packet, verdict in answers:
            if self.ledger.owes(packet) and verdict is not RETAIN:
                self.wanted[packet.id] = verdict
        self.send_all(self.ledger.answer(answers, self.now))

    @rule(count=st.integers(1, 5))
    def read_ahead(self, count: int) -> None:
        if not self.ledger.read_ahead:
            self.ledger.keep(self.read(count))

    @rule(count=st.integers(1, 4))
    def a_turn_is_interrupted(self, count: int) -> None:
        """An exception comes after packets were taken, and before they are known."""
        if not self.ledger.read_ahead:
            self.ledger.begin_turn(self.taken)
            self.take(count)
            self.ledger.interrupted = True

    @precondition(lambda self: not self.ledger.read_ahead and not self.ledger.has_decided)
    @rule(verdict=st.sampled_from([ACCEPT, DROP]), count=st.integers(1, 5))
    def turn_without_looking(self, verdict: Verdict, count: int) -> None:
        """As WorkerQueue.skim_each does: one verdict each if a batch would answer others."""
        together = not self.ledger.must_answer_each
        if self.ledger.interrupted:
            self.ledger.begin_turn(self.taken)
        numbers = self.take(count)
        for number in numbers:
            assert not together or all(other in self.unread or other in numbers for other in self.waiting), "swept along"
            self.wanted[number] = verdict
            self.send(number, verdict)
        if numbers:
            if self.ledger.interrupted:
                self.answer_lost(numbers[0])
            self.ledger.took_and_answered(numbers[-1])

    # A callback.

    @rule(verdict=verdicts, itself=st.booleans())
    def ask(self, verdict: Verdict, itself: bool) -> None:
        packet = self.ledger.ask()
        if packet is None:
            return
        self.watch()
        if itself:
            self.answer_itself(packet, ACCEPT)
            if verdict is not RETAIN:
                with pytest.raises(VerdictError, match="has its verdict already"):
                    self.ledger.decide(verdict)
                assert self.ledger.abandon(POLICY) == 1
                return
        elif verdict is not RETAIN:
            self.wanted[packet.id] = verdict
        self.ledger.decide(verdict)

    @rule()
    def the_callback_raises(self) -> None:
        packet = self.ledger.ask()
        if packet is not None:
            self.watch()
            self.wanted[packet.id] = POLICY
            assert self.ledger.abandon(POLICY) == 1
        assert self.ledger.abandon(POLICY) == 0

    @rule()
    def send_decided(self) -> None:
        self.send_all(self.ledger.answer(self.ledger.take_decided(), self.now))

    @rule()
    def a_run_ends(self) -> None:
        unsent = self.ledger.has_decided
        self.ledger.end_run()
        assert self.ledger.interrupted or not unsent
        # The next run begins with them.
        self.send_decided()

    # Held packets.

    @precondition(lambda self: self.ledger.read_ahead)
    @rule()
    def hold(self) -> None:
        packet = self.ledger.hold(self.now)
        if self.ledger.owes(packet):
            assert self.ledger.state(packet) is State.HELD

    @rule(data=st.data(), verdict=st.sampled_from([ACCEPT, DROP]))
    def a_packet_answers_itself(self, data: st.DataObject, verdict: Verdict) -> None:
        owed = [packet for packet in self.packets.values() if self.ledger.owes(packet)]
        if owed:
            self.answer_itself(data.draw(st.sampled_from(owed)), verdict)

    def answer_itself(self, packet: Packet, verdict: Verdict) -> None:
        self.wanted[packet.id] = verdict
        self.send_all([(packet.id, verdict)])
        self.ledger.answered(packet)

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late, left = self.ledger.late(self.now)
        for packet in late:
            self.wanted[packet.id] = POLICY
            self.send_all([(packet.id, POLICY)])
            self.ledger.answered(packet)
        again, _ = self.ledger.late(self.now)
        assert again == []
        assert 0 < left <= LONGEST_WAIT
        assert sum(self.ledger.state(packet) is State.HELD for packet in self.packets.values()) <= LIMIT

    # What always holds.

    @invariant()
    def watch(self) -> None:
        """Every move is in the table; who has a verdict has the one that was wanted, who has none is still owed one."""
        for number, packet in self.packets.items():
            state, before = self.ledger.state(packet), self.states.get(number, State.READ)
            assert state is before or self.reaches(before, state), f"{before.name} to {state.name}"
            self.states[number] = state
            if number in self.verdicts:
                assert self.verdicts[number] is self.wanted.get(number, POLICY)
            else:
                assert state is not State.ANSWERED, "answered, and no verdict was sent"

    def reaches(self, before: State, state: State) -> bool:
        """In one move, or by several in one rule."""
        return state in MOVES[before] or any(self.reaches(between, state) for between in MOVES[before])

    def teardown(self) -> None:
        """The queue is closed: nothing waits any more."""
        if not hasattr(self, "ledger"):
            return
        for packet in self.ledger.waiting:
            self.wanted.setdefault(packet.id, POLICY)
        self.send_decided()
        for packet in self.ledger.waiting:
            if self.ledger.owes(packet):
                self.send(packet.id, POLICY)
                self.ledger.answered(packet)
        self.ledger.take_read_ahead()
        # One more read settles what an interrupted turn lost.
        self.ledger.begin_turn(self.taken)
        self.answer_lost(None)
        for packet in self.packets.values():
            assert not self.ledger.owes(packet)
        assert set(self.waiting) <= set(self.unread), "lost"


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(max_examples=EXAMPLES * 3 // 2, stateful_step_count=30, deadline=None)


def test_every_state_has_a_way_to_its_end() -> None:
    assert set(MOVES) == set(State)
    reached = {State.ANSWERED}
    for _ in State:
        reached |= {state for state, after in MOVES.items() if after & reached}
    assert reached == set(State)
    assert MOVES[State.ANSWERED] == frozenset()


def test_a_held_packet_is_late_or_one_too_many() -> None:
    ledger = Ledger(after=2.0, limit=2)
    ledger.begin(Bond(_Nobody()), 0)
    packets = [Packet(b"", id=number) for number in (1, 2, 3)]
    ledger.took(packets)
    assert ledger.late(0.0) == ([], LONGEST_WAIT)
    assert ledger.answer([(packet, RETAIN) for packet in packets[:2]], now=10.0) == []
    assert ledger.late(11.5) == ([], 0.5)
    assert ledger.late(12.0) == (packets[:2], LONGEST_WAIT)
    ledger.answer([(packets[2], RETAIN)], now=11.0)
    assert ledger.late(11.5) == (packets[:1], 0.5)


def test_the_numbers_of_lost_packets_begin_again() -> None:
    ledger = Ledger(after=1.0, limit=1)
    ledger.begin(Bond(_Nobody()), 0)
    ledger.took_and_answered(MASK - 1)
    ledger.interrupted = True
    numbers = ledger.lost(before=2)
    assert numbers == [MASK, 0, 1]
    ledger.answered_lost(numbers)
    assert ledger.lost(before=2) == []
    assert not ledger.interrupted


def test_a_packet_of_a_queue_that_was_unbound_answers_nothing() -> None:
    bond = Bond(_Nobody())
    packet = Packet(b"", id=3)
    bond.end()
    with pytest.raises(VerdictError, match="was unbound"):
        bond.verdict(packet, ACCEPT)


def test_a_packet_that_answered_itself_before_it_was_held_is_not_late() -> None:
    ledgers = Ledgers()
    ledgers.bind(start=0, passed_over=0)
    ledgers.arrive(count=2)
    ledgers.read_ahead(count=2)
    ledgers.answer_itself(ledgers.packets[1], ACCEPT)
    ledgers.hold()
    ledgers.time_passes(seconds=6.0)


def test_a_batch_does_not_answer_a_packet_whose_verdict_is_decided_and_not_sent() -> None:
    """Found by the machine above."""
    machine = Ledgers()
    machine.bind(start=0, passed_over=0)
    machine.arrive(count=3)
    machine.read_ahead(count=1)
    machine.the_callback_raises()
    machine.turn(count=2, each=[ACCEPT] * 20)
    machine.watch()
    machine.send_decided()
    machine.watch()
    assert machine.verdicts == {1: POLICY, 2: ACCEPT, 3: ACCEPT}
    machine.teardown()


def test_a_packet_that_is_in_the_ledger_is_not_lost() -> None:
    """Found by the machine above: an interrupted run, then a read before the next run."""
    ledger = Ledger(after=1.0, limit=9)
    ledger.begin(Bond(_Nobody()), 0)
    packets = [Packet(b"", id=number) for number in range(1, 6)]
    ledger.took(packets)
    ledger.keep(packets[:4])
    ledger.hold(now=0.0)
    assert ledger.ask() is packets[1]
    ledger.decide(ACCEPT)
    assert ledger.ask() is packets[2]
    ledger.interrupted = True
    numbers = ledger.lost(before=None)
    assert numbers == [1, 2, 3, 4, 5]
    # One is held, one decided, one asked about, one read ahead. Only the last one was read and is nowhere.
    assert ledger.to_policy(numbers) == [5]
