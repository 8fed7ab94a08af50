"""`nfq-agent restart`: the agent starts again in place, and no packet is lost or passes without a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent import Agent, ours, until
from namespace import Namespace
from numbered import CONFIG, Numbered, judged, write_down

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
