"""`nfq-agent restart`: the agent starts again in place, and no packet is lost or passes without a verdict."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from agent import Agent, ours, until
from namespace import Namespace
from numbered import CONFIG, Connections, Numbered, judged, write_down

from nfq_agent.host.nfqueue.statistics import statistics

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_restart_loses_no_packet_and_lets_none_pass(netns: Namespace, tmp_path: Path, backend: str) -> None:
    write_down(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(backend=backend)).ready()
    pid, workers = agent.status()["pid"], agent.workers()
    traffic = Numbered(netns, 1500)
    for _ in range(2):
        agent.verb("restart")
    flow = traffic.end()
    assert flow.arrived == flow.sent
    assert sorted(judged(netns)) == list(range(flow.sent))
    queue = agent.queue()
    assert queue["uninspected"] == 0
    assert agent.totals()["received"] == flow.sent
    assert agent.status()["pid"] == pid
    assert agent.workers() != workers
    print(flow)
    assert agent.stop() == 0
    assert ours(netns) == []
    until(lambda: netns.processes() == [], "no process is left")


PROXY = """
[proxy.tcp]
listen = ["127.0.0.1:15002"]
drain = "2s"
[rules.redirect]
proxy = "tcp"
hooks = ["output"]
family = "inet"
tcp_ports = [8080]
"""


def test_a_restart_breaks_no_connection_of_a_proxy(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, PROXY).ready()
    connections = Connections(netns, 8080, 20)
    until(lambda: agent.status()["proxies"][0]["counters"]["active"] >= 20, "the connections are there")
    first = agent.status()["proxies"][0]["pid"]
    for _ in range(2):
        agent.verb("restart")
    status = agent.status()["proxies"][0]
    assert status["pid"] != first
    assert Path(f"/proc/{first}").exists(), "it has connections"
    assert status["counters"]["active"] >= 20
    time.sleep(3)
    talk = connections.end()
    print(talk)
    assert talk.unbroken == 20, "they last longer than the drain time"
    assert talk.failed == 0
    counters = until(lambda: _when_idle(agent), "all connections are closed")
    assert counters["connections"] == 20 + talk.others
    assert counters["reset"] == 0
    until(lambda: not Path(f"/proc/{first}").exists(), "a process without a connection ends")
    assert agent.stop() == 0
    assert ours(netns) == []


def _when_idle(agent: Agent) -> dict[str, int] | None:
    counters: dict[str, int] = agent.status()["proxies"][0]["counters"]
    return counters if counters["active"] == 0 else None


def test_connections_from_before_a_restart_end_with_the_drain_time_of_a_stop(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, PROXY).ready()
    connections = Connections(netns, 8080, 3)
    until(lambda: agent.status()["proxies"][0]["counters"]["active"] >= 3, "the connections are there")
    agent.verb("restart")
    began = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - began < 60
    assert connections.end().unbroken == 0
    assert ours(netns) == []


def test_what_is_not_wanted_any_more_after_a_restart_ends(netns: Namespace, tmp_path: Path) -> None:
    write_down(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(backend="legacy") + PROXY).ready()
    workers = [*agent.workers(), agent.status()["proxies"][0]["pid"]]
    agent.configure(CONFIG.format(backend="legacy").replace("num = 100", "num = 101"))
    agent.verb("restart")
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the earlier processes end")
    assert list(statistics(netns.pid)) == [101]
    traffic = Numbered(netns, 500)
    flow = traffic.end()
    assert sorted(judged(netns)) == list(range(flow.sent))
    assert agent.stop() == 0
    assert ours(netns) == []


def test_settings_that_change_with_a_restart_are_in_force_and_lose_nothing(netns: Namespace, tmp_path: Path) -> None:
    write_down(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(backend="legacy")).ready()
    traffic = Numbered(netns, 1000)
    agent.configure(CONFIG.format(backend="legacy").replace("16384", "8192"))
    agent.verb("restart")
    flow = traffic.end()
    assert flow.arrived == flow.sent
    assert sorted(judged(netns)) == list(range(flow.sent))
    assert agent.queue()["in_force"]["max_len"] == 8192
    assert agent.queue()["uninspected"] == 0


def test_code_that_would_not_start_is_refused(netns: Namespace, tmp_path: Path) -> None:
    write_down(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(backend="legacy")).ready()
    workers = agent.workers()
    (tmp_path / "elements" / "book.py").write_text("def broken(:\n")
    refused = agent.verb("restart", check=False)
    assert refused.returncode == 1
    assert "the running agent keeps serving" in refused.stderr
    assert "book.py" in refused.stderr
    assert agent.workers() == workers


def test_the_signal_of_a_restart_is_refused_where_the_program_would_not_start(netns: Namespace, tmp_path: Path) -> None:
    write_down(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(backend="legacy")).ready()
    workers = agent.workers()
    agent.configure("[queue.main]\nnumber = 1\n")
    agent.process.send_signal(signal.SIGUSR2)
    until(lambda: "restart refused, this agent keeps serving" in agent.log or agent.process.poll() is not None, "it is refused")
    assert "queue.main" in agent.log
    assert agent.process.poll() is None
    agent.configure(CONFIG.format(backend="legacy"))
    assert agent.workers() == workers
    asked = 0

    def restarted() -> bool:
        nonlocal asked
        # With a high load all code may not be loaded in the time that it is given: that is a refusal too.
        if asked == agent.log.count("timed out"):
            asked += 1
            agent.process.send_signal(signal.SIGUSR2)
        return agent.log.count("is serving") == 2

    until(restarted, "it is restarted")
    assert agent.workers() != workers
    assert agent.stop() == 0
    assert ours(netns) == []


def test_a_restart_after_a_reload_that_took_a_queue_out(netns: Namespace, tmp_path: Path) -> None:
    text = '[queue.main]\nnum = {num}\n[rules.app]\nqueue = "main"\ntcp_ports = [80]\n'
    agent = Agent(netns, tmp_path, text.format(num=100)).ready()
    agent.configure(text.format(num=101))
    agent.verb("reload")
    agent.verb("restart")
    assert [worker["number"] for worker in agent.queue()["workers"]] == [101]
    assert agent.stop() == 0
