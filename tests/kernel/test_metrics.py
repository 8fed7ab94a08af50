"""The metrics and the alert rules with the real Prometheus: its tools, and a server that scrapes a running agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

from agent import COMMAND, Agent, until
from namespace import Namespace
from prometheus import ALERTS, Prometheus
from tcp_client import ask, server
from traffic import send

CONFIG = """
[queue.main]
num = 7
elements = ["allow"]
[element.allow]
type = "policy"
rule = [{ action = "accept", name = "web", dport = 9000 }]
[rules.web]
queue = "main"
udp_ports = [9000]
hooks = ["output"]
[agent]
drift_check = "1s"
"""
FLEET = """
[queue.main]
num = 7
max_len = 16
[rules.web]
queue = "main"
udp_ports = [9000]
hooks = ["output"]
[agent]
drift_check = "1s"
"""
# The compiled reader answers what it knows: connections to `a.test` and their openings are never shown to Python but once.
NAMES = """
[queue.main]
num = 7
elements = ["dpi", "names"]
[element.names]
type = "policy"
rule = [{ action = "accept", name = "a", http_host = "a.test" }, { action = "reject", name = "no", http_host = "no.test" }]
[rules.web]
queue = "main"
hooks = ["output"]
tcp_ports = [8080]
"""


def dashboard() -> Iterator[tuple[str, str]]:
    """The queries of the dashboard by the title of their panel, with its variables filled in."""
    for panel in json.loads((ALERTS.parent / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")


def test_promtool_takes_the_metrics_and_the_rules(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG).ready()
    text = agent.verb("metrics").stdout
    checked = netns.run("promtool", "check", "metrics", input=text, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).parent / "monitoring" / "alerts.test.yml", tmp_path)
    netns.run("promtool", "check", "rules", str(tmp_path / "alerts.yml"))
    netns.run("promtool", "test", "rules", str(tmp_path / "alerts.test.yml"))
    assert agent.stop() == 0


def test_decisions_and_latency_are_counted_and_a_reload_keeps_them(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NAMES).ready()
    netns.start(sys.executable, "-m", "http.server", "8080", "--bind", "127.0.0.1", stdout=DEVNULL, stderr=DEVNULL)
    until(lambda: ":8080" in netns.run("ss", "-Hltn").stdout, "the server listens")

    def ask(name: str) -> None:
        netns.run("curl", "-s", "-m", "60", "-o", "/dev/null", "-H", f"Host: {name}", "http://127.0.0.1:8080/", check=False)

    def decided() -> dict[str, int]:
        return {each["rule"]: each["count"] for each in agent.queue()["decisions"] if each["count"]}

    for name in ("a.test", "a.test", "a.test", "no.test", "other.test"):
        ask(name)
    assert decided() == {"rule 1 (a)": 3, "rule 2 (no)": 1, "no rule": 1}
    assert "3 names: rule 1 (a)" in agent.verb("status").stdout
    queue = json.loads(agent.verb("status", "--json").stdout)["queues"][0]
    samples = sum(queue["latency"]["buckets"].values())
    assert 0 < samples <= queue["workers"][0]["received"]
    assert 0 < queue["latency"]["total"] / samples < 1
    # Another rule behind them: they keep their numbers.
    agent.configure(NAMES.replace('"no.test" }]', '"no.test" }, { action = "accept", http_host = "b.test" }]'))
    assert agent.verb("reload").returncode == 0
    for name in ("a.test", "b.test"):
        ask(name)
    assert decided() == {"rule 1 (a)": 4, "rule 2 (no)": 1, "rule 3": 1, "no rule": 1}
    assert agent.stop() == 0


def many_names(count: int) -> None:
    """Requests for as many names, each from a port of its own."""
    for number in range(count):
        ask("127.0.0.1", 8080, b"GET / HTTP/1.0\r\nHost: name-%d.test\r\n\r\n" % number)


def test_traffic_makes_no_new_series(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NAMES).ready()
    server(netns, "echo", "127.0.0.1")

    def series() -> set[str]:
        return {line.rpartition(" ")[0] for line in agent.verb("metrics").stdout.splitlines() if not line.startswith("#")}

    netns.call(many_names, 1)
    before = series()
    netns.call(many_names, 60)
    assert agent.totals()["received"] > 60
    assert series() == before
    assert not [name for name in before if "test" in name or "127.0.0.1" in name]


def test_an_instance_without_an_agent_is_reported_as_down(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG.partition("[agent]")[0], instance="web").ready()
    assert 'nfq_agent_up{agent="web"} 1.0' in netns.run(*COMMAND, "metrics").stdout
    agent.kill()
    assert 'nfq_agent_up{agent="web"} 0.0' in netns.run(*COMMAND, "metrics").stdout


def test_prometheus_scrapes_an_agent_and_raises_alerts(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG).ready()
    netns.start(*COMMAND, "metrics", "--listen", "127.0.0.1:9749")
    prometheus = Prometheus(netns, tmp_path)

    def firing() -> set[str]:
        return {name for _, name in prometheus.firing()}

    ask, value = prometheus.ask, prometheus.value
    until(lambda: value("nfq_agent_up") == 1, "the first scrape")
    netns.call(send, 9000, 5)
    until(lambda: value('nfq_agent_verdicts_total{verdict="accept"}') == 5, "five verdicts are counted")
    assert value("sum(nfq_agent_policy_decisions_total{rule='web'})") >= 1
    assert value("sum(nfq_agent_verdict_latency_seconds_count)") >= 1
    assert value("sum(nfq_agent_rule_packets_total{rule='web',family='inet'})") == 5
    until(lambda: firing() == set(), "no alert")
    for title, query in dashboard():
        # A rate takes two scrapes. No proxy is configured here: of its queries only the syntax is tried.
        until(lambda query=query: "proxy" in query or ask(query), title)  # type: ignore[misc]  # its default is the type
    flush_until_repaired(netns, lambda: value("nfq_agent_rule_repairs_total"))
    until(lambda: "NfqAgentRulesRepaired" in firing(), "the alert of repairs")
    agent.kill()
    until(lambda: "NfqAgentDown" in firing(), "the alert of an agent that is gone")


def flush_until_repaired(host: Namespace, repairs: Callable[[], float]) -> None:
    """Another program flushes the agent's rules four times; each repair is counted."""
    for wanted in range(1, 5):
        host.shell("iptables-legacy -w -t mangle -F NFQA-default-OUTPUT")
        until(partial(lambda wanted: repairs() == wanted, wanted), "the repair is counted")


def test_a_fleet_raises_the_alerts_of_the_hosts_that_have_faults(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path
) -> None:
    """Three hosts with an agent each, and a Prometheus on the one in the middle."""
    hosts = dict(zip(("10.1.0.2:9749", "10.1.0.1:9749", "10.2.0.2:9749"), routed, strict=True))
    agents, servers = [], []
    for number, (address, host) in enumerate(hosts.items()):
        (tmp_path / str(number)).mkdir()
        agents.append(Agent(host, tmp_path / str(number), FLEET).ready())
        servers.append(host.start(*COMMAND, "metrics", "--listen", address))
    prometheus = Prometheus(routed[1], tmp_path, [*hosts], seconds=3)
    until(lambda: prometheus.value("count(nfq_agent_up == 1)") == 3, "all three are scraped")
    until(lambda: prometheus.firing() == set(), "no alert")
    uninspected, drift, gone = hosts

    # The worker of the first hangs for a moment, and its queue is full.
    (worker,) = agents[0].workers()
    first = f'nfq_agent_uninspected_packets_total{{instance="{uninspected}"}}'
    until(lambda: prometheus.value(first) == 0, "nothing is uninspected yet")
    os.kill(worker, signal.SIGSTOP)
    hosts[uninspected].call(send, 9000, 200)
    os.kill(worker, signal.SIGCONT)
    # A firewall of another program flushes the second's rules, again and again.
    flush_until_repaired(hosts[drift], lambda: agents[1].status()["drift"]["repairs"])
    # The third is killed.
    agents[2].kill()
    wanted = {(uninspected, "NfqAgentUninspected"), (drift, "NfqAgentRulesRepaired"), (gone, "NfqAgentDown")}
    until(lambda: prometheus.firing() == wanted, "these alerts and no other")
    # The third host is gone.
    servers[2].kill()
    wanted = {*wanted, (gone, "NfqAgentTargetDown")} - {(gone, "NfqAgentDown")}
    until(lambda: prometheus.firing() == wanted, "the alert of a host that cannot be scraped")
