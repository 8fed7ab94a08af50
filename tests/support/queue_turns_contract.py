"""What a loop over a queue and the turns of a worker do with their packets; a part of queue_contract.py."""

from __future__ import annotations

import asyncio
import threading

import pytest
from queue_program import AnyWire
from queued import NUMBER, in_turns, until

from nfq_agent import (
    ACCEPT,
    DROP,
    RETAIN,
    Packet,
    Queue,
    QueueStateError,
    Verdict,
)
from nfq_agent.queue.turns import WorkerQueue


def a_loop_gets_each_packet_and_may_be_left(wire: AnyWire) -> None:
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
        # A packet that was read and not yielded comes first in the next loop.
        wire.send(b"four", b"five")
        for expected in (b"four", b"five"):
            for packet in queue:
                packet.accept()
                break
            assert wire.arrived(1) == [expected]


def a_packet_that_a_loop_skips_gets_the_policy(wire: AnyWire) -> None:
    with Queue(NUMBER, unanswered_after=0.1) as queue:
        wire.send(b"skipped", b"answered")

        def stop() -> None:
            until(lambda: queue.unanswered == 1)
            queue.stop()

        thread = threading.Thread(target=stop)
        thread.start()
        for packet in queue:
            if packet.data == b"answered":
                packet.accept()
        thread.join()
        assert sorted(wire.arrived(2)) == [b"answered", b"skipped"]
        assert queue.unanswered == 1


def an_asynchronous_loop_does_not_block_the_others(wire: AnyWire) -> None:
    ticks = 0

    async def tick() -> None:
        """What else the program does while the queue waits; in the end, what it waits for."""
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)
            if ticks == 20:
                wire.send(b"one", b"two")

    async def serve(queue: Queue) -> list[bytes]:
        clock = asyncio.create_task(tick())
        seen = []
        async for packet in queue:
            seen.append(packet.data)
            packet.accept()
            if len(seen) == 2:
                asyncio.get_running_loop().call_later(0.1, queue.stop)
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
        assert ticks >= 20
        assert asyncio.run(leave(queue)) == [b"three", b"four", b"five"]
        assert not queue.running
    wire.arrived(3)


def a_workers_turns_answer_each_packet_once(wire: AnyWire) -> None:
    asked: list[bytes] = []
    known: dict[bytes, Verdict] = {}

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        asked.append(packet.data)
        verdict = DROP if packet.data == b"bad" else ACCEPT
        if key is not None:
            known[key] = verdict
        return verdict

    with WorkerQueue(NUMBER).open().bind() as queue:
        queue.confirm()
        queue.be_patient(0.05)
        wire.send(*[b"x"] * 5)
        assert queue.skim(ACCEPT, 3) == 3
        assert in_turns(lambda budget: queue.skim_each(DROP, budget), 100, 2) == 2
        assert wire.arrived(3) == [b"x"] * 3
        wire.send(b"good", b"good")
        count, runs = queue.sort(known, decide)
        # The second has the verdict of the first: they are of one flow.
        assert (count, asked, [number for _, number, _ in runs]) == (2, [b"good"], [2])
        assert wire.arrived(2) == [b"good"] * 2
        wire.send(b"good")
        assert queue.sort({}, decide, each=True)[0] == 1
        assert wire.arrived(1) == [b"good"]
        wire.send(b"kept", b"lost")
        (kept, _) = queue.read()
        queue.answer([(kept, RETAIN)])
        with pytest.raises(QueueStateError, match="packets are retained"):
            queue.answer_lost(1000, DROP)
        queue.finish()
        assert wire.arrived(1) == [b"kept"]
        queue.answer_lost(queue.last, DROP)
        assert wire.waiting() == 0
        assert wire.nothing_more()
