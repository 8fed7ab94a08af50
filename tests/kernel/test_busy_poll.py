"""`busy_poll` on real packets: what is counted of it, and `auto`: none while nothing comes, and no more than its share."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from agent import Agent
from namespace import Namespace
from queued import NUMBER, Wire, queue_rule, until
from traffic import PYTHON
from worker_crew import ByText, counted, crew

from nfq_agent import ACCEPT, PacketElement
from nfq_agent.counters import Counters
from nfq_agent.element_chain import ElementChain
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service import auto_poll
from nfq_agent.service.auto_poll import AutoPoll, Polled
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop

pytestmark = pytest.mark.kernel

SHARE = 0.1
CONFIG = """
[queue.main]
num = 100
busy_poll = "auto"
[rules.app]
queue = "main"
family = "inet"
hooks = ["output"]
udp_ports = [11000]
role = "client"
"""
# Datagrams one behind the other, as close as they go.
EXCHANGES = """
import socket
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.bind(("127.0.0.1", 11000)); end.settimeout(60)
for _ in range(10_000):
    end.sendto(b"x", ("127.0.0.1", 11000))
    end.recv(100)
print("passed")
"""
ELEMENTS: list[tuple[type[PacketElement], ...]] = [(), (ByText,)]


def processor_seconds(pid: int) -> float:
    """What a process has used so far (schedstat, proc_pid(5): nanoseconds)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_polls_are_counted(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with WorkerQueue(NUMBER, copy_range=128) as queue:
            queue.be_patient(0.01)
            assert queue.skim_each(ACCEPT) == 0
            assert queue.polled == (0, 0, 0.0)
            queue.poll_for(0.02)
            # On a busy machine a turn may be over before its first look.
            until(lambda: queue.skim_each(ACCEPT) == 0 and queue.polled[0] > 0)
            times, found, seconds = queue.polled
            assert found == 0
            assert seconds >= 0.02 * times
            # Packets that come while it polls.
            queue.poll_for(10.0)
            ended = threading.Event()

            def send() -> None:
                while not ended.wait(0.001):
                    wire.send(b"x")

            sender = threading.Thread(target=send)
            sender.start()
            # Each turn takes all that wait, and polls then.
            until(lambda: queue.skim_each(ACCEPT) and queue.polled[1] > 0)
            ended.set()
            sender.join()

    netns.call(inside)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_auto_takes_no_processor_time_while_nothing_comes(netns: Namespace, elements: tuple[type[PacketElement], ...]) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(*elements, busy_poll="auto") as made:
            for _ in range(2000):
                wire.send(b"x")
                wire.arrived(1)
            until(lambda: counted(made.counters, received=2000))
            before = processor_seconds(made.pid)
            time.sleep(1.0)
            assert processor_seconds(made.pid) - before < 0.1

    netns.call(inside)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_auto_polls_for_no_more_than_its_share(
    netns: Namespace, monkeypatch: pytest.MonkeyPatch, elements: tuple[type[PacketElement], ...]
) -> None:
    """Packets that never come apart, and polls that are never weighed: the share alone limits it."""
    queue_rule(netns)
    monkeypatch.setattr(auto_poll, "APART", 10.0)
    monkeypatch.setattr(auto_poll, "ENOUGH", 1 << 30)
    monkeypatch.setattr(auto_poll, "POLL", 0.002)
    monkeypatch.setattr(auto_poll, "SHARE", SHARE)
    reports: list[tuple[float, Polled]] = []
    report = AutoPoll.report

    def noted(self: AutoPoll, packets: int, now: float, polled: Polled) -> None:
        reports.append((now, polled))
        report(self, packets, now, polled)

    monkeypatch.setattr(AutoPoll, "report", noted)

    def inside() -> None:
        wire = Wire()
        ours, theirs = socket.socketpair()
        with ours, theirs, WorkerQueue(NUMBER, copy_range=128) as queue:
            chain = ElementChain([element(element.__name__, None, print) for element in elements], ACCEPT)
            settings = WorkerSettings(NUMBER, ACCEPT, ACCEPT, monitor=False, busy_poll="auto")
            worker = threading.Thread(target=WorkerLoop(queue, chain, settings, Counters(), theirs, print).run)
            worker.start()
            assert ours.recv(100) == b"ready\n"

            def polled() -> float:
                wire.send(b"x")
                wire.arrived(1)
                return sum(each.seconds for _, each in reports)

            # So much that it was without time of its own again and again.
            until(lambda: polled() >= 5 * SHARE * auto_poll.SAVED)
            ours.send(b"stop\n")
            worker.join()
        begin, spent, longest = reports[0][0], 0.0, 0.0
        for now, each in reports:
            spent += each.seconds
            longest = max(longest, each.seconds)
            # A turn that has begun is not cut short.
            assert spent <= SHARE * (now - begin + auto_poll.SAVED) + longest + 1e-6

    netns.call(inside)


def test_auto_in_a_confined_worker(netns: Namespace, tmp_path: Path) -> None:
    """It changes its mind with the calls that a worker may make."""
    agent = Agent(netns, tmp_path, CONFIG).ready()
    workers = agent.workers()
    assert "passed" in netns.run(PYTHON, "-c", EXCHANGES, timeout=300).stdout
    assert agent.workers() == workers
    # A turn is counted when it has ended.
    until(lambda: agent.totals()["received"] == 10_000)
    assert agent.stop() == 0
