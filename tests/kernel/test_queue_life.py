"""A queue from open to close: stops, signals, calls out of order, forks, bursts, and nothing that leaks."""

from __future__ import annotations

import gc
import signal
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from typing import Any

import netfilterqueue
import pytest
from descriptors import open_descriptors
from namespace import Namespace
from queue_program import RANGES, serving
from queued import NUMBER, PORT, Wire, passed, queue_rule, until

from nfq_agent import (
    ACCEPT,
    RETAIN,
    Action,
    Packet,
    Queue,
    Verdict,
)
from nfq_agent.queue.bound import BUDGET

pytestmark = pytest.mark.kernel


def test_stop_under_a_flood(netns: Namespace) -> None:
    queue_rule(netns)
    script = f"import socket; s=socket.socket(2,2)\nwhile True: s.sendto(b'x', ('127.0.0.1', {PORT}))"
    flood = netns.start("python3", "-c", script)

    def inside() -> int:
        seen = stopped_at = 0

        def stop() -> None:
            nonlocal stopped_at
            # Until the flood is under way, however long its process takes to start.
            until(lambda: seen > 1000)
            queue.stop()
            stopped_at = seen

        def accept(packet: Packet) -> Verdict:
            nonlocal seen
            seen += 1
            return ACCEPT

        with Queue(NUMBER, copy_range=128) as queue:
            thread = threading.Thread(target=stop)
            thread.start()
            queue.run(accept)
            thread.join()
        return seen - stopped_at

    # The turn that was under way, and no other.
    assert netns.call(inside) <= BUDGET
    flood.kill()


def test_a_packet_that_netfilterqueue_takes_while_it_binds_is_answered(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the socket until the kernel has acknowledged. In a flood that met a packet in 15 of 300 binds."""
    queue_rule(netns)
    real = netfilterqueue.NetfilterQueue

    class InAFlood:
        """The real one; between its last two requests packets come, which it reads."""

        def __init__(self, **options: Any) -> None:
            self.real = real(**options)
            self.get_fd = self.real.get_fd
            self.unbind = self.real.unbind

        def bind(self, *arguments: Any, **options: Any) -> None:
            self.real.bind(*arguments, **options)
            with socket.socket(type=socket.SOCK_DGRAM) as sender:
                for data in (b"one", b"two"):
                    sender.sendto(data, ("127.0.0.1", PORT))
            self.real.run(block=False)

    def inside() -> None:
        monkeypatch.setattr(netfilterqueue, "NetfilterQueue", InAFlood)
        wire = Wire()
        with Queue(NUMBER) as queue:
            wire.send(b"three")
            assert queue.statistics().waiting == 3
            (packet,) = queue.read()
            assert packet.data == b"three"
            packet.accept()
            assert wire.arrived(3) == [b"one", b"two", b"three"]
            assert queue.statistics().waiting == 0

    netns.call(inside)


@RANGES
def test_signals_that_raise_lose_no_packet(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> int:
        class Interrupted(Exception):
            pass

        def interrupt(*_: object) -> None:
            raise Interrupted

        wire = Wire()
        total, interrupted = 20_000, 0
        with Queue(NUMBER, copy_range=copy_range, max_len=total) as queue:
            wire.send(*[b"x"] * total)

            def accept(packet: Packet) -> Verdict:
                if packet.id >= total:
                    queue.stop()
                return ACCEPT

            # What is raised while the collector calls back (hypothesis has it do so) is lost to the interpreter.
            gc.disable()
            signal.signal(signal.SIGALRM, interrupt)
            while queue.statistics().waiting:
                # It may come behind the end of a run, too.
                with suppress(Interrupted):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0.002)
                        queue.run(accept)
                    except Interrupted:
                        interrupted += 1
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
            assert interrupted > 0
        return passed()

    assert netns.call(inside) == 20_000


@pytest.mark.parametrize("iterated", [False, True])
def test_a_signal_that_raises_where_a_run_ends_leaves_none_running(netns: Namespace, iterated: bool) -> None:
    class Interrupted(Exception):
        pass

    class Raising(Queue):
        raises = True

        def _end(self, run: object) -> None:
            # As the interpreter does it: a signal's handler runs before the first line of a function.
            raises, self.raises = self.raises, False
            if raises:
                raise Interrupted
            super()._end(run)

    def inside() -> None:
        with Raising(NUMBER) as queue:
            for expected in (pytest.raises(Interrupted), nullcontext()):
                queue.stop()
                with expected:
                    list(queue) if iterated else queue.run(lambda packet: ACCEPT)
                assert not queue.running

    netns.call(inside)


@pytest.mark.parametrize("running", [True, False])
def test_settings_that_two_threads_change_both_hold(netns: Namespace, running: bool) -> None:
    def inside() -> None:
        with Queue(NUMBER) as queue, serving(queue, lambda packet: ACCEPT) if running else nullcontext():
            for turn in range(50):
                on = turn % 2 == 0
                threads = [
                    threading.Thread(target=queue.configure, kwargs={name: value})
                    for name, value in (("fail_open", on), ("gso", on), ("uid_gid", on), ("max_len", 100 + turn))
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                settings = queue.settings
                assert (settings.fail_open, settings.gso, settings.uid_gid, settings.max_len) == (on, on, on, 100 + turn)

    netns.call(inside)


def test_bursts_at_full_speed(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> int:
        wire = Wire()
        with Queue(NUMBER, copy_range=128) as queue, serving(queue, lambda packet: ACCEPT):
            for _ in range(20):
                wire.send(*[b"x" * 36] * 1000)
                # No more than fit into the queue, however little of the processor its thread gets.
                until(lambda: queue.statistics().waiting < 500)
            until(lambda: queue.statistics().waiting == 0)
            line = queue.statistics()
            assert (line.dropped, line.user_dropped, queue.drops()) == (0, 0, 0)
        return passed()

    assert netns.call(inside) == 20000


def test_nothing_leaks(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        for _ in range(60):
            with Queue(NUMBER):
                pass
        before = len(open_descriptors())
        for _ in range(60):
            with Queue(NUMBER):
                pass
        assert len(open_descriptors()) == before

        def pages() -> int:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1])

        def turn(packet: Packet) -> Verdict:
            assert packet.indev == 0
            if packet.id % 10 == 0:
                return Verdict(Action.ACCEPT, mark=1)
            return RETAIN if packet.id % 11 == 0 else ACCEPT

        for copy_range in (128, 65535):
            with (
                Queue(NUMBER, copy_range=copy_range, unanswered_after=0.01, max_len=20000) as queue,
                serving(queue, turn),
            ):
                used: list[int] = []
                for _ in range(6):
                    for _ in range(5):
                        wire.send(*[b"x" * 100] * 1000)
                        until(lambda: queue.statistics().waiting == 0)
                    gc.collect()
                    used.append(pages())
                # A leak of one packet each would be megabytes.
                assert used[-1] - used[1] < 128, used
            packets = sum(isinstance(thing, Packet) for thing in gc.get_objects())
            assert packets < 300

    netns.call(inside, timeout=120)


_FORKING = f"""
import os, sys
from nfq_agent import ACCEPT, Queue
queue = Queue({NUMBER}).open().bind()
if os.fork() == 0:
    if sys.argv[1] == "close":
        queue.close()
    sys.exit(0)
os.wait()
assert queue.statistics().number == {NUMBER}
print("bound", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["end", "close"])
def test_a_forked_child_that_ends_leaves_the_queue_alone(netns: Namespace, way: str) -> None:
    # A program of its own: its child takes the interpreter down, objects and all.
    program = netns.start(sys.executable, "-c", _FORKING, way, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == b"bound\n"
    assert f" {NUMBER} " in netns.shell("cat /proc/net/netfilter/nfnetlink_queue")
