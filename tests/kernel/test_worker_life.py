"""A worker that is stopped, killed, or slower than its packets, in a process of its own on real packets."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from namespace import Namespace
from queued import PORT, Sender, Wire, passed, queue_rule, until
from worker_crew import ByText, Crew, counted, crew

from nfq_agent import ACCEPT, DROP, Packet, PacketElement, Verdict
from nfq_agent.flow import Flow
from nfq_agent.service import turn_policy
from nfq_agent.verdict import Action

pytestmark = pytest.mark.kernel


class Bland(PacketElement):
    """Says the same to everything."""

    pure = True

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return ACCEPT


class Killer(PacketElement):
    """Dies with packets in hand."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        if packet.data == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return None


def test_it_ends_when_its_supervisor_is_gone(netns: Namespace) -> None:
    def inside() -> None:
        made = Crew()
        made.start()
        made.control.shutdown(socket.SHUT_RDWR)
        assert made.wait() == 0
        made.end()

    netns.call(inside)


def test_it_does_not_start_where_its_answers_would_not_be_taken(netns: Namespace) -> None:
    def inside() -> None:
        made = Crew(keep=())
        made.start()
        assert made.ready == b""
        assert made.wait() == 1
        assert "QueuePermissionError" in made.lines[0]
        made.end()

    netns.call(inside)


@pytest.mark.parametrize("elements", [(), (ByText,)])
def test_killed_in_a_flood_no_packet_is_lost(netns: Namespace, elements: tuple[type[PacketElement], ...]) -> None:
    queue_rule(netns)

    def inside() -> tuple[int, int]:
        made = Crew(*elements, max_len=65536, receive_buffer=128 << 20)
        made.start()
        sender = Sender()
        for _ in range(8):
            before = made.counters.received
            sender.send(6000)
            until(lambda before=before: made.counters.received > before + 1000)  # type: ignore[misc]  # bound early
            # While the others are sent, or wait.
            made.start(lost_below=made.kill())
            assert made.ready == b"ready\n"
        total = sender.end()
        until(lambda: made.queue.statistics().waiting == 0)
        line = made.queue.statistics()
        assert (line.dropped, line.user_dropped, line.id_sequence) == (0, 0, total)
        assert made.stop() == 0
        counters = made.counters
        # Answered by the dead and not counted any more is counted as lost.
        assert counters.received + counters.lost >= total
        made.end()
        return passed(), total

    arrived, total = netns.call(inside)
    assert arrived == total == 48_000


def test_killed_with_packets_in_hand_and_no_later_ones(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        made = Crew(Killer)
        made.start()
        os.kill(made.pid, signal.SIGSTOP)
        wire.send(b"one", b"kill", b"three")
        os.kill(made.pid, signal.SIGCONT)
        sequence = 3
        assert made.wait() == -signal.SIGKILL
        assert made.queue.statistics().waiting == 3
        assert made.queue.statistics().id_sequence == sequence
        # The socket is empty: only the number tells that there was something.
        made.start(lost_below=sequence)
        assert wire.arrived(3) == [b"one", b"kill", b"three"]
        until(lambda: counted(made.counters, lost=3, last_id=3))
        wire.send(b"four")
        assert wire.arrived(1) == [b"four"]
        assert made.stop() == 0
        made.end()

    netns.call(inside)


def test_stopped_it_leaves_what_it_has_not_read_to_its_successor(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        made = Crew()
        made.start()
        assert made.stop() == 0
        wire.send(*[b"x"] * 100)
        # Settings changed by the supervisor in between: what it finds in the socket is passed on.
        made.queue.configure(max_len=2000)
        wire.send(*[b"y"] * 100)
        made.start()
        assert wire.arrived(200) == [b"x"] * 100 + [b"y"] * 100
        assert counted(made.counters, lost=0)
        assert made.stop() == 0
        made.end()

    netns.call(inside)


@pytest.mark.parametrize("elements", [(), (Bland,)])
@pytest.mark.parametrize(("short", "fewest", "most"), [(60.0, 1, 14), (0.0, 16, 24)])
def test_a_worker_that_falls_behind_takes_longer_turns(
    netns: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    elements: tuple[type[PacketElement], ...],
    short: float,
    fewest: int,
    most: int,
) -> None:
    # Turns of 256, 320, 384 and so on, if the one before was short enough; else of 256.
    monkeypatch.setattr(turn_policy, "SHORT", short)
    queue_rule(netns)

    def inside() -> int:
        wire = Wire()
        made = Crew(*elements)
        wire.send(*[b"x"] * 4000)
        made.start()
        until(lambda: counted(made.counters, received=4000, accepted=4000))
        assert made.queue.statistics().waiting == 0
        assert made.stop() == 0
        assert fewest <= made.counters.turns <= most
        made.end()
        return passed()

    assert netns.call(inside) == 4000


def test_a_full_buffer_is_counted_and_survived(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(receive_buffer=20000) as made:
            os.kill(made.pid, signal.SIGSTOP)
            wire.send(*[b"x" * 1000] * 500)
            lost = made.queue.statistics().user_dropped
            assert lost > 0
            os.kill(made.pid, signal.SIGCONT)
            assert len(wire.arrived(500 - lost)) == 500 - lost
            until(lambda: made.counters.enobufs >= lost)
            wire.send(b"y")
            assert wire.arrived(1) == [b"y"]

    netns.call(inside)


def test_stop_and_counters_under_an_endless_flood(netns: Namespace) -> None:
    queue_rule(netns)
    script = f"import socket; s=socket.socket(2,2)\nwhile True: s.sendto(b'x', ('127.0.0.1', {PORT}))"
    flood = netns.start("python3", "-c", script)

    def inside() -> float:
        made = Crew()
        made.start()
        until(lambda: made.counters.received > 20000)
        assert made.counters.turns > 20
        before = _processor_seconds(made.pid)
        assert made.stop() == 0
        made.end()
        # Of the processor, which a loaded machine gives it later.
        return made.used - before

    assert netns.call(inside) < 0.5
    flood.kill()


class Slow(PacketElement):
    """Every verdict much later."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict:
        return Verdict(Action.ACCEPT, delay=3600.0)


def test_a_stop_gives_delayed_verdicts(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        # The policy would drop them.
        made = Crew(Slow, on_error=DROP, unanswered_after=60.0)
        made.start()
        wire.send(b"one", b"two")
        until(lambda: counted(made.counters, received=2))
        assert wire.nothing_more()
        assert made.stop() == 0
        assert wire.arrived(2) == [b"one", b"two"]
        made.end()

    netns.call(inside)


def _processor_seconds(pid: int) -> float:
    """What a process has used so far (proc(5), utime and stime)."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("busy_poll", [0.0, 0.5])
@pytest.mark.parametrize("elements", [(), (ByText,)])
def test_busy_poll(netns: Namespace, elements: tuple[type[PacketElement], ...], busy_poll: float) -> None:
    """With it the worker uses the processor while it waits for the next packet; without it, it sleeps."""
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(*elements, busy_poll=busy_poll) as made:
            before = _processor_seconds(made.pid)

            def used() -> float:
                wire.send(b"x")
                wire.arrived(1)
                time.sleep(0.2)
                return _processor_seconds(made.pid) - before

            if busy_poll:
                until(lambda: used() >= 0.2)
            else:
                for _ in range(5):
                    assert used() < 0.1

    netns.call(inside)
