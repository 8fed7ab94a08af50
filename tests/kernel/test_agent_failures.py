"""The agent when a worker dies or hangs, and when it is stopped or reloaded in a flood."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, ours, until
from agent_flood import another_than, count_passed, flood, udp
from namespace import PATIENCE, Namespace
from traffic import Flood

from nfq_agent.host.nfqueue.statistics import statistics

pytestmark = pytest.mark.kernel


@pytest.fixture
def flooded(netns: Namespace, tmp_path: Path) -> Iterator[tuple[Namespace, Agent, Callable[[], int]]]:
    passed = count_passed(netns)
    agent = Agent(netns, tmp_path, udp()).ready()
    yield netns, agent, passed
    if agent.process.poll() is None:
        agent.stop()
    assert ours(netns) == []


def all_pass(stream: Flood, passed: Callable[[], int]) -> None:
    """The flood, still under way, ends, and each of its packets came through."""
    count = stream.end()
    until(lambda: passed() == count, f"{count} packets pass")


def reached(passed: Callable[[], int], floor: int) -> None:
    """So many packets have passed."""
    until(lambda: passed() > floor, f"more than {floor} packets pass")


def test_a_stop_in_a_flood_loses_nothing(flooded: tuple[Namespace, Agent, Callable[[], int]]) -> None:
    namespace, agent, passed = flooded
    stream = Flood(namespace)
    reached(passed, 50_000)
    assert agent.stop() == 0
    all_pass(stream, passed)


def test_a_reload_in_a_flood_loses_nothing(flooded: tuple[Namespace, Agent, Callable[[], int]]) -> None:
    namespace, agent, passed = flooded
    stream = Flood(namespace, 40_000)
    reached(passed, 20_000)
    # A rule more; another worker with other settings; another queue number.
    agent.configure(udp(more="[rules.more]\nqueue = 'main'\nudp_ports = [11002]\n"))
    agent.verb("reload")
    agent.configure(udp(max_len=8192).replace("[rules.app]", 'elements = ["log"]\n[element.log]\nper_second = 1\n[rules.app]'))
    agent.verb("reload")
    agent.configure(udp().replace("num = 100", "num = 101"))
    agent.verb("reload")
    received = agent.totals()["received"]
    until(lambda: agent.totals()["received"] > received, "the last worker judges, too")
    all_pass(stream, passed)
    assert agent.queue()["workers"][0]["number"] == 101


def test_a_workers_death_in_a_flood_loses_nothing(flooded: tuple[Namespace, Agent, Callable[[], int]]) -> None:
    namespace, agent, passed = flooded
    stream = Flood(namespace, 40_000)
    for floor in (20_000, 80_000):
        reached(passed, floor)
        (worker,) = agent.workers()
        os.kill(worker, signal.SIGKILL)
        until(partial(another_than, agent, worker), "another worker serves")
    reached(passed, passed() + 1000)
    all_pass(stream, passed)
    assert agent.log.count("died: SIGKILL") == 2


def test_a_worker_that_keeps_dying_ends_the_agent_with_its_rules_removed(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp()).ready()
    kill_workers(agent)
    assert agent.process.wait(timeout=PATIENCE) == 1
    assert "died 5 times within 30 s" in agent.log
    assert ours(netns) == []


def kill_workers(agent: Agent) -> None:
    """Kill every worker that the agent starts, until it gives up."""
    while agent.process.poll() is None:
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
        try:
            pids = [int(pid) for pid in children.read_text().split()]
        except OSError:
            return
        for pid in pids:
            # Those that write rules are root's; a worker is proxyuser's.
            with contextlib.suppress(OSError):
                if "Uid:\t0" not in Path(f"/proc/{pid}/status").read_text():
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def test_a_queue_that_fails_closed_stays_closed_until_it_is_removed(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    agent = Agent(netns, tmp_path, udp(bypass=False, fail_open=False)).ready()
    mine = ours(netns)
    kill_workers(agent)
    assert agent.process.wait(timeout=PATIENCE) == 1
    assert ours(netns) == mine
    assert "rules stay, for queues with bypass = false" in agent.log
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    assert passed() == 0
    # A start opens it again, and a clean stop leaves nothing.
    agent.start()
    agent.ready()
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    until(lambda: passed() == 10, "it is open again")
    assert agent.stop() == 0
    assert ours(netns) == []


def test_the_rules_that_a_kill_left_are_taken_up_by_the_next_start(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    agent = Agent(
        netns, tmp_path, udp(more="[rules.raw]\nqueue = 'main'\ntable = 'raw'\nhooks = ['output']\nudp_ports = [11005]\n")
    ).ready()
    workers = agent.workers()
    agent.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "its workers end by themselves")
    assert ours(netns) != []
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    assert passed() == 10, "bypass lets traffic pass while no process serves"
    agent.configure(udp().replace("11000", "11003").replace("num = 100", "num = 7"))
    agent.start()
    agent.ready()
    assert not [line for line in ours(netns) if "11000" in line or "11005" in line]
    assert [line for line in ours(netns) if "11003" in line]
    assert agent.stop() == 0
    assert ours(netns) == []


def test_a_worker_that_hangs_is_replaced(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp()).ready()
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGSTOP)
    until(lambda: "made no progress" in agent.log, "the hang is seen")
    until(lambda: agent.workers() not in ([worker], [None]), "another worker serves")
    passed = count_passed(netns)
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    until(lambda: passed() == 10, "packets pass again")


def test_what_a_worker_held_that_had_to_be_killed_is_judged_by_its_successor(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(
        "import time\nfrom nfq_agent import PacketElement\n"
        "class Hang(PacketElement):\n    def decide(self, packet, flow):\n        time.sleep(60)\n"
    )
    passed = count_passed(netns)
    hanging = udp().replace("[rules.app]", 'elements = ["hanging:Hang"]\non_error = "accept"\n[rules.app]')
    agent = Agent(netns, tmp_path, hanging, PYTHONPATH=str(tmp_path)).ready()
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
    until(lambda: statistics(netns.pid)[100].waiting == 1, "it holds the packet")
    agent.configure(udp().replace("[rules.app]", 'default = "drop"\non_error = "accept"\n[rules.app]'))
    agent.verb("reload")
    # By the reload or, if that takes long, by the watchdog before it.
    assert "did not stop within" in agent.log or "made no progress" in agent.log
    assert flood(netns, 5).wait(timeout=PATIENCE) == 0
    until(lambda: agent.totals()["dropped"] == 6, "its successor judges these and the one that was held")
    assert passed() == 0
    # If the watchdog is first, the reload finds the packet in the hands of a second worker that hangs.
    requeued = agent.log.count("up to 1 packets that the previous worker had read are queued again")
    assert agent.totals()["lost"] == requeued in (1, 2)
    assert agent.queue()["uninspected"] == 0
    assert agent.stop() == 0


def test_a_packet_that_ends_every_worker_is_queued_again_once(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "poisoned.py").write_text(
        "import os\nfrom nfq_agent import PacketElement\n"
        "class Ends(PacketElement):\n    def decide(self, packet, flow):\n        os._exit(9)\n"
    )
    passed = count_passed(netns)
    poisoned = udp().replace("[rules.app]", 'elements = ["poisoned:Ends"]\non_error = "accept"\n[rules.app]')
    agent = Agent(netns, tmp_path, poisoned, PYTHONPATH=str(tmp_path)).ready()
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
    until(lambda: passed() == 1, "it gets the verdict on_error in the end")
    assert agent.log.count("are queued again") == 1
    assert agent.log.count("got the verdict on_error") == 1
    assert agent.stop() == 0
