"""A queue that a program reads in a loop: iteration, several queues, and asynchronous iteration."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest
from namespace import Namespace
from queued import NUMBER, PORT, Wire, queue_rule

from nfq_agent import (
    ACCEPT,
    Queue,
)

pytestmark = pytest.mark.kernel


def test_iteration(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER) as queue:
            wire.send(b"one", b"two", b"three")
            for packet in queue:
                if packet.data == b"two":
                    packet.drop()
                else:
                    packet.accept()
                if packet.data == b"three":
                    queue.stop()
            assert wire.arrived(2) == [b"one", b"three"]
            # Leaving the loop is enough; what was not yielded comes next time.
            wire.send(b"four", b"five")
            for packet in queue:
                packet.accept()
                break
            assert wire.arrived(1) == [b"four"]
            for packet in queue:
                packet.accept()
                break
            assert wire.arrived(1) == [b"five"]

    netns.call(inside)


def test_a_packet_that_a_loop_passes_over_gets_the_policy(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER, unanswered_after=0.1) as queue:
            wire.send(b"passed over", b"answered")
            threading.Timer(0.5, queue.stop).start()
            for packet in queue:
                if packet.data == b"answered":
                    packet.accept()
            assert sorted(wire.arrived(2)) == [b"answered", b"passed over"]
            assert queue.unanswered == 1

    netns.call(inside)


@pytest.mark.parametrize("by", ["thread", "signal"])
@pytest.mark.parametrize("way", ["plain", "asynchronous"])
def test_a_loop_that_waits_is_stopped(netns: Namespace, way: str, by: str) -> None:
    async def wait(queue: Queue) -> None:
        async for _ in queue:
            pass

    def inside() -> float:
        asked = 0.0

        def stop(*_: object) -> None:
            nonlocal asked
            asked = time.monotonic()
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
            return time.monotonic() - asked

    assert netns.call(inside) < 0.5


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
            for run in waits:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(InterruptedError, match="on purpose"):
                    run()
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


def test_asynchronous_iteration(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        async def serve(queue: Queue) -> list[bytes]:
            clock = asyncio.create_task(tick())
            asyncio.get_running_loop().call_later(0.2, wire.send, b"one", b"two")
            asyncio.get_running_loop().call_later(0.4, queue.stop)
            seen = []
            async for packet in queue:
                seen.append(packet.data)
                packet.accept()
            clock.cancel()
            return seen

        async def leave(queue: Queue) -> list[bytes]:
            wire.send(b"three", b"four", b"five")
            seen = []
            for _ in range(3):
                async for packet in queue:
                    seen.append(packet.data)
                    packet.accept()
                    break
            return seen

        with Queue(NUMBER) as queue:
            assert asyncio.run(serve(queue)) == [b"one", b"two"]
            assert wire.arrived(2) == [b"one", b"two"]
            assert ticks > 10
            # Leaving the loop is enough here too.
            assert asyncio.run(leave(queue)) == [b"three", b"four", b"five"]
            assert not queue.running
        wire.arrived(3)

    netns.call(inside)
