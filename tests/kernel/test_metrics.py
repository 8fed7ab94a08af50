"""The metrics and the alert rules with the real Prometheus: its tools, and a server that scrapes a running agent."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from agent import COMMAND, Agent, until
from namespace import ROOT, Namespace
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
ALERTS = ROOT / "packaging" / "monitoring" / "alerts.yml"
SCRAPES = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [alerts.yml]
scrape_configs:
  - job_name: nfq-agent
    static_configs: [{targets: ["127.0.0.1:9749"]}]
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
        netns.run("curl", "-s", "-m", "5", "-o", "/dev/null", "-H", f"Host: {name}", "http://127.0.0.1:8080/", check=False)

    def decided() -> dict[str, int]:
        found = json.loads(agent.verb("status", "--json").stdout)["queues"][0]["decisions"]
        return {each["rule"]: each["count"] for each in found if each["count"]}

    for name in ("a.test", "a.test", "a.test", "no.test", "other.test"):
        ask(name)
    assert decided() == {"rule 1 (a)": 3, "rule 2 (no)": 1, "default": 1}
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
    assert decided() == {"rule 1 (a)": 4, "rule 2 (no)": 1, "rule 3": 1, "default": 1}
    assert agent.stop() == 0


def test_an_instance_without_an_agent_is_reported_as_down(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG.partition("[agent]")[0], instance="web").ready()
    assert 'nfq_agent_up{agent="web"} 1.0' in netns.run(*COMMAND, "metrics").stdout
    agent.kill()
    assert 'nfq_agent_up{agent="web"} 0.0' in netns.run(*COMMAND, "metrics").stdout


def test_prometheus_scrapes_an_agent_and_raises_alerts(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG).ready()
    netns.start(*COMMAND, "metrics", "--listen", "127.0.0.1:9749")
    # As shipped, but for how long a fault has to last.
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text().replace("for: 1m", "for: 0s"))
    (tmp_path / "prometheus.yml").write_text(SCRAPES)
    with (tmp_path / "prometheus.log").open("wb") as log:
        netns.start(
            "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
            "--web.listen-address=127.0.0.1:9090", stdout=log, stderr=log,
        )  # fmt: skip

    def ask(query: str) -> list[dict[str, Any]]:
        url = "http://127.0.0.1:9090/api/v1/query?query=" + urllib.parse.quote(query)
        answer = netns.run("curl", "-s", "--max-time", "5", url, check=False).stdout
        # Until it has read its files it answers "Service Unavailable".
        if not answer.startswith("{"):
            return []
        told = json.loads(answer)
        assert told["status"] == "success", told
        found: list[dict[str, Any]] = told["data"]["result"]
        return found

    def value(query: str) -> float:
        found = ask(query)
        return float(found[0]["value"][1]) if found else -1.0

    def firing() -> set[str]:
        return {each["metric"]["alertname"] for each in ask('ALERTS{alertstate="firing"}')}

    until(lambda: value("nfq_agent_up") == 1, "the first scrape", 60)
    netns.call(send, 9000, 5)
    until(lambda: value('nfq_agent_verdicts_total{verdict="accept"}') == 5, "five verdicts are counted", 60)
    assert value("sum(nfq_agent_policy_decisions_total{rule='web'})") >= 1
    assert value("sum(nfq_agent_verdict_latency_seconds_count)") >= 1
    assert value("sum(nfq_agent_rule_packets_total{rule='web',family='inet'})") == 5
    assert firing() == set()
    for title, query in dashboard():
        # A rate takes two scrapes. No proxy is configured here: of its queries only the syntax is tried.
        until(lambda query=query: "proxy" in query or ask(query), title, 60)  # type: ignore[misc]  # its default is the type
    for repair in range(1, 5):
        netns.shell("iptables-legacy -w -t mangle -F NFQA-default-OUTPUT")
        until(lambda repair=repair: value("nfq_agent_rule_repairs_total") == repair, "the repair is counted", 60)  # type: ignore[misc]  # its default is the type
    until(lambda: "NfqAgentRulesRepaired" in firing(), "the alert of repairs", 60)
    agent.kill()
    until(lambda: "NfqAgentDown" in firing(), "the alert of an agent that is gone", 60)
