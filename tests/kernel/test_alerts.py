"""Each alert rule as it is shipped, in a real Prometheus, raised by its real cause; and gone again where the cause is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import yaml
from agent import COMMAND, Agent, suspend, until
from log_traffic import BROKEN
from namespace import Namespace
from prometheus import ALERTS, Prometheus
from traffic import send

# An alert that waits for a minute takes that minute; what comes before it takes scrapes.
PATIENCE = 240.0
CONFIG = """
[queue.open]
num = 7
max_len = 16
[queue.closed]
num = 8
max_len = 16
fail_open = false
[queue.failing]
num = 9
elements = ["failing"]
[element.failing]
type = "broken_element:Broken"
[rules.open]
queue = "open"
hooks = ["output"]
udp_ports = [9000]
[rules.closed]
queue = "closed"
hooks = ["output"]
udp_ports = [9001]
[rules.failing]
queue = "failing"
hooks = ["output"]
udp_ports = [9002]
[tap.failing]
interfaces = ["lo"]
udp_ports = [9002]
elements = ["failing"]
[agent]
drift_check = "1s"
"""
# Nothing puts its rules back.
BY_HAND = """
[agent]
instance = "by-hand"
drift_check = 0
[queue.main]
num = 20
[rules.web]
queue = "main"
hooks = ["output"]
udp_ports = [9003]
"""
GONE = '[agent]\ninstance = "gone"\n[queue.main]\nnum = 21\n'
# Two scrapes of the same host: the second one ends.
FIRST, SECOND = "127.0.0.1:9749", "127.0.0.1:9750"


def shipped() -> set[str]:
    """The names of the alert rules."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"] for rule in group["rules"]}


def overrun(netns: Namespace, agent: Agent, queue: str, port: int) -> None:
    """More packets than a queue holds, while its worker is stopped for a moment."""
    (worker,) = agent.queue(queue)["workers"]
    suspend(worker["pid"])
    try:
        netns.call(send, port, 200)
    finally:
        os.kill(worker["pid"], signal.SIGCONT)


def kill_worker(agent: Agent, queue: str) -> None:
    """End a queue's worker as the kernel does when it is short of memory; another one serves then."""
    (worker,) = agent.queue(queue)["workers"]
    os.kill(worker["pid"], signal.SIGKILL)
    until(lambda: agent.queue(queue)["workers"][0]["pid"] not in (None, worker["pid"]), "another worker")


def test_each_alert_fires_from_its_cause(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "elements").mkdir()
    (tmp_path / "elements" / "broken_element.py").write_text(BROKEN)
    agent = Agent(netns, tmp_path, CONFIG).ready()
    by_hand, gone = (Agent(netns, tmp_path, text, instance=name).ready() for name, text in (("by-hand", BY_HAND), ("gone", GONE)))
    servers = [netns.start(*COMMAND, "metrics", "--listen", listen) for listen in (FIRST, SECOND)]
    prometheus = Prometheus(netns, tmp_path, [FIRST, SECOND], patient=True)
    value = prometheus.value

    def fires(*names: str, at: str = FIRST) -> bool:
        return {(at, name) for name in names} <= prometheus.firing()

    until(lambda: value("count(nfq_agent_up == 1)") == 6, "each agent is scraped at both", PATIENCE)
    assert prometheus.ask("ALERTS") == []
    # What has to last for a minute begins first.
    saved = netns.run("iptables-legacy-save", "-t", "mangle").stdout
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-F", "NFQA-by-hand-OUTPUT")
    gone.kill()
    servers[1].kill()
    # Each is counted from a number that was scraped before.
    overrun(netns, agent, "open", 9000)
    overrun(netns, agent, "closed", 9001)
    netns.call(send, 9002, 3)
    for number in range(1, 4):
        kill_worker(agent, "failing")
        netns.run("iptables-legacy", "-w", "-t", "mangle", "-F", "NFQA-default-OUTPUT")
        until(lambda number=number: agent.status()["drift"]["repairs"] == number, "the repair", PATIENCE)  # type: ignore[misc]  # bound early
    others = shipped() - {"NfqAgentTargetDown"}
    until(lambda: fires(*others) and fires("NfqAgentTargetDown", at=SECOND), "every alert", PATIENCE)
    assert {name for at, name in prometheus.firing() if at == FIRST} == others
    failing = [each["metric"] for each in prometheus.ask('ALERTS{alertname="NfqAgentElementErrors"}')]
    assert {metric.get("queue", metric.get("tap")) for metric in failing} == {"failing"}
    # What is mended is resolved.
    netns.run("iptables-legacy-restore", input=saved)
    gone.start()
    servers[1] = netns.start(*COMMAND, "metrics", "--listen", SECOND)
    mended = {"NfqAgentRulesWrong", "NfqAgentDown", "NfqAgentTargetDown"}
    until(lambda: not mended & {name for _, name in prometheus.firing()}, "the three that are over", PATIENCE)
    assert fires(*(others - mended)), "what was counted stays for its time"
    assert [each.stop() for each in (agent, by_hand, gone)] == [0, 0, 0]
