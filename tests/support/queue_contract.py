"""What a queue does with its packets: the same functions (CONTRACT) on the real kernel and on the fake one of the unit tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Final

import pytest
from queue_program import AnyWire, serving
from queue_turns_contract import (
    a_loop_gets_each_packet_and_may_be_left,
    a_packet_that_a_loop_skips_gets_the_policy,
    a_workers_turns_answer_each_packet_once,
    an_asynchronous_loop_does_not_block_the_others,
)
from queued import NUMBER, until

from nfq_agent import (
    ACCEPT,
    DROP,
    RETAIN,
    Action,
    Packet,
    Queue,
    QueueBusyError,
    QueueError,
    QueueStateError,
    RewriteError,
    Verdict,
    VerdictError,
)
from nfq_agent.checksum import mend


def a_callback_accepts_and_drops(wire: AnyWire) -> None:
    for copy_range in (2000, 65535):
        with (
            Queue(NUMBER, copy_range=copy_range) as queue,
            serving(queue, lambda packet: DROP if packet.data == b"two" else ACCEPT),
        ):
            wire.send(b"one", b"two", b"three")
            assert wire.arrived(2) == [b"one", b"three"]
            wire.send(b"two", b"four")
            assert wire.arrived(1) == [b"four"]


def verdicts_come_in_another_order_than_the_packets(wire: AnyWire) -> None:
    kept: list[Packet] = []

    def reorder(packet: Packet) -> Verdict:
        if packet.data in (b"one", b"two"):
            kept.append(packet)
            return RETAIN
        if packet.data == b"four":
            # While older packets wait, this one's verdict must not answer them.
            kept[1].accept()
            kept[0].accept(payload=mend(kept[0].payload.replace(b"one", b"ONE")))
        return ACCEPT

    for copy_range in (2000, 65535):
        kept.clear()
        with Queue(NUMBER, copy_range=copy_range) as queue, serving(queue, reorder):
            wire.send(b"one", b"two", b"three", b"also", b"four")
            assert wire.arrived(5) == [b"three", b"also", b"two", b"ONE", b"four"]
            with pytest.raises(VerdictError, match="waits for no verdict"):
                kept[0].drop()


def rewritten_bytes_need_a_whole_packet(wire: AnyWire) -> None:
    with Queue(NUMBER, copy_range=40, on_unanswered=DROP) as queue:
        wire.send(b"x" * 200)
        (packet,) = queue.read()
        assert packet.truncated
        with pytest.raises(RewriteError, match="40 of its 228 bytes were copied"):
            packet.accept(payload=mend(packet.payload))
        for wrong in (b"", bytes(65536)):
            with pytest.raises(RewriteError, match="bytes; allowed: 1 to"):
                packet.accept(payload=wrong)
        packet.accept()
        assert wire.arrived(1) == [b"x" * 200]


def a_repeated_packet_comes_again_with_its_mark(wire: AnyWire) -> None:
    marks: list[int] = []

    def count_up(packet: Packet) -> Verdict:
        marks.append(packet.mark)
        return Verdict(Action.REPEAT, mark=packet.mark + 1) if packet.mark < 5 else ACCEPT

    with Queue(NUMBER) as queue, serving(queue, count_up):
        wire.send(b"again and again")
        wire.arrived(1)
    assert marks == [0, 1, 2, 3, 4, 5]


def a_packet_is_handed_on_to_another_queue(wire: AnyWire) -> None:
    seen: list[str] = []

    def hand_on(_packet: Packet) -> Verdict:
        seen.append("first")
        return Verdict(Action.QUEUE, queue=NUMBER + 1)

    def take(_packet: Packet) -> Verdict:
        seen.append("second")
        return ACCEPT

    with Queue(NUMBER) as first, Queue(NUMBER + 1) as second, serving(first, hand_on), serving(second, take):
        wire.send(b"by way of two")
        assert wire.arrived(1) == [b"by way of two"]
    assert seen == ["first", "second"]


def an_exception_of_the_callback_leaves_run_and_no_packet_is_lost(wire: AnyWire) -> None:
    for copy_range in (2000, 65535):

        def stumble(packet: Packet) -> Verdict:
            if packet.data == b"boom":
                raise LookupError("on purpose")
            if packet.data == b"last":
                queue.stop()
            return ACCEPT

        with Queue(NUMBER, copy_range=copy_range, on_unanswered=DROP) as queue:
            wire.send(b"one", b"boom", b"two", b"last")
            with pytest.raises(LookupError, match="on purpose"):
                queue.run(stumble)
            assert wire.arrived(1) == [b"one"]
            queue.run(stumble)
            assert wire.arrived(2) == [b"two", b"last"]
            assert queue.unanswered == 1
            assert wire.waiting() == 0


def a_callback_without_a_verdict_is_an_error(wire: AnyWire) -> None:
    with Queue(NUMBER) as queue:
        wire.send(b"one")
        with pytest.raises(VerdictError, match="None is not a Verdict"):
            queue.run(lambda packet: None)  # type: ignore[arg-type, return-value]  # that is the mistake
        assert wire.arrived(1) == [b"one"]
        wire.send(b"two")
        with pytest.raises(VerdictError, match="only the agent's worker delays verdicts"):
            queue.run(lambda packet: Verdict(Action.ACCEPT, delay=1.0))
        assert wire.arrived(1) == [b"two"]


def a_retained_packet_that_is_forgotten_gets_the_policy(wire: AnyWire) -> None:
    with Queue(NUMBER, unanswered_after=0.2) as queue, serving(queue, lambda packet: RETAIN):
        began = time.monotonic()
        wire.send(b"forgotten", b"too")
        assert wire.arrived(2) == [b"forgotten", b"too"]
        assert time.monotonic() - began > 0.15
        # It is counted a moment after the verdict is sent.
        until(lambda: queue.unanswered == 2)
    with Queue(NUMBER, unanswered_after=60, retain_limit=2) as queue, serving(queue, lambda packet: RETAIN):
        wire.send(b"1", b"2", b"3", b"4")
        # The two oldest are too many.
        assert wire.arrived(2) == [b"1", b"2"]
        assert wire.nothing_more()
    assert wire.arrived(2) == [b"3", b"4"]


def closing_answers_what_waits_read_or_not(wire: AnyWire) -> None:
    for policy, passed in ((ACCEPT, 20), (DROP, 0)):
        with Queue(NUMBER, on_unanswered=policy) as queue:
            wire.send(*[b"x"] * 20)
            assert wire.waiting() == 20
            read = queue.read(5)
            queue.answer([(packet, RETAIN) for packet in read[:3]])
        with pytest.raises(VerdictError):
            read[0].accept()
        assert wire.arrived(passed) == [b"x"] * passed
        assert wire.nothing_more()


def stop_works_from_a_thread_a_signal_and_before_the_run(wire: AnyWire) -> None:  # no packet is needed
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Queue(NUMBER) as queue:
            for stop_by in ("thread", "signal", "before"):
                if stop_by == "thread":
                    threading.Timer(0.1, queue.stop).start()
                elif stop_by == "signal":
                    signal.signal(signal.SIGUSR1, lambda *_: queue.stop())
                    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
                else:
                    queue.stop()
                queue.run(lambda packet: ACCEPT)
    finally:
        signal.signal(signal.SIGUSR1, before)


def calls_out_of_order_are_errors(wire: AnyWire) -> None:
    queue = Queue(NUMBER)
    for early in (queue.bind, queue.read, queue.fileno, queue.unbind):
        with pytest.raises(QueueStateError, match="not open"):
            early()
    queue.open()
    with pytest.raises(QueueStateError, match="already open"):
        queue.open()
    unbound: tuple[Callable[[], object], ...] = (
        queue.unbind,
        queue.read,
        lambda: queue.run(lambda packet: ACCEPT),
        lambda: queue.settings,
    )
    for each in unbound:
        with pytest.raises(QueueStateError, match="not bound"):
            each()
    with pytest.raises((QueueError, OSError), match=r"no such queue|nfnetlink_queue"):
        queue.statistics()
    queue.bind()
    with pytest.raises(QueueStateError, match="already bound"):
        queue.bind()
    with serving(queue, lambda packet: ACCEPT):
        until(lambda: queue.running)
        for during in (lambda: queue.run(lambda packet: ACCEPT), lambda: next(iter(queue)), queue.close):
            with pytest.raises(QueueStateError, match=r"runs it|already running"):
                during()
    wire.send(b"x")
    (packet,) = queue.read()
    queue.unbind()
    with pytest.raises(VerdictError, match="waits for no verdict"):
        packet.accept()
    for late in (queue.read, queue.unbind, lambda: queue.run(lambda packet: ACCEPT)):
        with pytest.raises(QueueStateError, match="not bound"):
            late()
    assert wire.arrived(1) == [b"x"]
    # Numbers begin at 1 again: a packet from before must not answer a new one.
    queue.bind()
    wire.send(b"y")
    (after,) = queue.read()
    assert after.id == packet.id
    with pytest.raises(VerdictError, match="waits for no verdict"):
        packet.accept()
    queue.answer([(packet, ACCEPT)])
    assert wire.waiting() == 1
    queue.close()
    queue.close()
    with pytest.raises(VerdictError, match="waits for no verdict"):
        after.accept()
    closed: tuple[Callable[[], object], ...] = (queue.read, lambda: queue.configure(gso=True), queue.wait)
    for each in closed:
        with pytest.raises(QueueStateError, match="not open"):
            each()
    with queue:
        assert queue.settings.copy == "packet"


def a_number_that_is_bound_is_busy(wire: AnyWire) -> None:  # no packet is needed
    with Queue(NUMBER) as first:
        with pytest.raises(QueueBusyError, match="queue 7: another process has already bound this queue"), Queue(NUMBER):
            pass
        # Nothing of the attempt is left, and the first works as before.
        assert first.configure(max_len=9).max_len == 9
    with Queue(NUMBER):
        pass


def settings_change_in_the_thread_that_runs(wire: AnyWire) -> None:
    with Queue(NUMBER) as queue, serving(queue, lambda packet: ACCEPT):
        for turn in range(20):
            on = turn % 2 == 0
            wire.send(b"x")
            threads = [
                threading.Thread(target=queue.configure, kwargs={name: value})
                for name, value in (("fail_open", on), ("gso", on), ("copy_range", 100 + turn), ("max_len", 100 + turn))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            settings = queue.settings
            assert (settings.fail_open, settings.gso) == (on, on)
            assert (settings.copy_range, settings.max_len) == (100 + turn, 100 + turn)
        assert wire.arrived(20) == [b"x"] * 20


CONTRACT: Final[tuple[Callable[[AnyWire], None], ...]] = (
    a_callback_accepts_and_drops,
    verdicts_come_in_another_order_than_the_packets,
    rewritten_bytes_need_a_whole_packet,
    a_repeated_packet_comes_again_with_its_mark,
    a_packet_is_handed_on_to_another_queue,
    an_exception_of_the_callback_leaves_run_and_no_packet_is_lost,
    a_callback_without_a_verdict_is_an_error,
    a_retained_packet_that_is_forgotten_gets_the_policy,
    closing_answers_what_waits_read_or_not,
    stop_works_from_a_thread_a_signal_and_before_the_run,
    calls_out_of_order_are_errors,
    a_number_that_is_bound_is_busy,
    settings_change_in_the_thread_that_runs,
    a_loop_gets_each_packet_and_may_be_left,
    a_packet_that_a_loop_skips_gets_the_policy,
    an_asynchronous_loop_does_not_block_the_others,
    a_workers_turns_answer_each_packet_once,
)
