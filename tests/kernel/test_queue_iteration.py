"""A queue that a program reads in a loop: iteration, several queues, and asynchronous iteration."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import threading
from collections.abc import Callable

import pytest
from namespace import Namespace
from queued import NUMBER, PORT, Wire, queue_rule

from nfq_agent import (
    ACCEPT,
    Queue,
)

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("by", ["thread", "signal"])
@pytest.mark.parametrize("way", ["plain", "asynchronous"])
def test_a_loop_that_waits_is_stopped(netns: Namespace, way: str, by: str) -> None:
    async def wait(queue: Queue) -> None:
        async for _ in queue:
            pass

    def inside() -> None:
        def stop(*_: object) -> None:
            queue.stop()

        with Queue(NUMBER) as queue:
            if by == "thread":
                threading.Timer(0.1, stop).start()
            else:
                signal.signal(signal.SIGALRM, stop)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
            if way == "plain":
                assert list(queue) == []
            else:
                asyncio.run(wait(queue))
            assert not queue.running

    # It would wait without end.
    netns.call(inside)


def test_a_signal_that_raises_while_it_waits_comes_out(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        def interrupt(*_: object) -> None:
            raise InterruptedError("on purpose")

        wire = Wire()
        signal.signal(signal.SIGALRM, interrupt)
        with Queue(NUMBER) as queue:
            waits: tuple[Callable[[], object], ...] = (
                lambda: queue.run(lambda packet: ACCEPT),
                lambda: next(iter(queue)).accept(),
            )

            def interrupted(run: Callable[[], object]) -> None:
                # On a busy machine the signal comes before the wait.
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                run()

            for run in waits:
                with pytest.raises(InterruptedError, match="on purpose"):
                    interrupted(run)
            # It is as it was.
            wire.send(b"x")
            next(iter(queue)).accept()
            assert wire.arrived(1) == [b"x"]

    netns.call(inside)


def test_several_queues_in_one_loop(netns: Namespace) -> None:
    """Each port has its queue; one thread serves all by their descriptors, without `run`."""
    for number in range(4):
        netns.shell(f"iptables-legacy -w -t mangle -A OUTPUT -p udp --dport {PORT + number} -j NFQUEUE --queue-num {number}")

    def inside() -> None:
        queues = {queue.fileno(): queue for queue in (Queue(number).open().bind() for number in range(4))}
        poller = select.poll()
        for descriptor in queues:
            poller.register(descriptor, select.POLLIN)
        sender = socket.socket(type=socket.SOCK_DGRAM)
        for turn in range(50):
            for number in range(4):
                sender.sendto(b"%d" % turn, ("127.0.0.1", PORT + number))
        seen: dict[int, list[bytes]] = {number: [] for number in range(4)}
        while sum(map(len, seen.values())) < 200:
            for descriptor, _ in poller.poll(5000):
                queue = queues[descriptor]
                packets = queue.read(16)
                queue.answer([(packet, ACCEPT) for packet in packets])
                seen[queue.number] += [packet.data for packet in packets]
        assert all(each == [b"%d" % turn for turn in range(50)] for each in seen.values())
        assert [queue.statistics().waiting for queue in queues.values()] == [0] * 4
        for queue in queues.values():
            queue.close()

    netns.call(inside)
