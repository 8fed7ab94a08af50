"""`top` and `trace` beside a running agent: what they show is what the agent did, with and without elements that follow flows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, until
from namespace import PATIENCE, Namespace

CONFIG = """
[queue.main]
num = 7
elements = [{elements}]
[rules.udp]
queue = "main"
udp_ports = [7000, 7001]
hooks = ["output"]
[element.ports]
type = "policy"
[[element.ports.rule]]
action = "drop"
name = "no-7001"
when = "dport = 7001"
"""
SEND = """
import socket, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("127.0.0.1", 6000))
# The second one is new each time: what is known of a flow for good is not traced.
for _ in range(6000):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        for each in (one, other):
            for port in (7000, 7001):
                try:
                    each.sendto(b"x", ("127.0.0.1", port))
                except OSError:
                    pass
    time.sleep(0.1)
"""


@pytest.mark.parametrize("elements", ['"ports"', '"dpi", "ports"'])
def test_what_is_shown_is_what_was_done(netns: Namespace, tmp_path: Path, elements: str) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(elements=elements)).ready()
    netns.start(sys.executable, "-c", SEND)

    def top() -> dict[int, dict[str, Any]]:
        said = agent.verb("top", "sport = 6000", "--for", "2", "--json").stdout
        return {flow["dport"]: flow for flow in json.loads(said)["flows"]}

    flows = until(lambda: found if len(found := top()) == 2 and found[7000]["packets"] > 5 else None, "both flows")
    assert {port: flow["verdict"] for port, flow in flows.items()} == {7000: "accept", 7001: "drop"}
    assert flows[7001]["reason"] == "ports: rule 1 (no-7001)"
    traced = until(lambda: agent.verb("trace", "verdict = drop", "--for", "2").stdout, "dropped packets are traced")
    assert re.search(r"udp 127\.0\.0\.1:\d+ -> 127\.0\.0\.1:7001 OUTPUT, 29 bytes", traced)
    assert "  ports: drop by rule 1 (no-7001)" in traced
    assert ":7000" not in traced
    counters = agent.status()["queues"][0]["workers"][0]
    assert counters["errors"] == 0
    refused = agent.verb("trace", "nam = x", check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == ["nfq-agent: nam = x", "           ^ character 1: 'nam' is not a field; like it: name"]
    until(lambda: agent.log.count("dropped udp 127.0.0.1:6000 ") == 1, "one line for the flow")
    assert agent.stop() == 0


def test_two_traces_and_top_do_not_disturb_each_other(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(elements='"ports"')).ready()
    netns.start(sys.executable, "-c", SEND)
    until(lambda: agent.totals()["received"] > 0, "the sender sends")
    verbs = (("trace", "dport = 7000"), ("trace", "verdict = drop"), ("top", "", "--json"))
    argv = [(*COMMAND, verb, "--config", str(agent.config), *more, "--for", "3") for verb, *more in verbs]
    started = [netns.start(*each, stdout=subprocess.PIPE, text=True) for each in argv]
    accepted, dropped, flows = (process.communicate(timeout=PATIENCE)[0] for process in started)
    assert accepted.count("-> 127.0.0.1:7000 ") > 2
    assert dropped.count("  ports: drop by rule 1 (no-7001)") > 2
    assert ":7001" not in accepted
    assert ":7000" not in dropped
    assert {flow["dport"] for flow in json.loads(flows)["flows"]} == {7000, 7001}
    assert agent.stop() == 0


NAMES = """
[queue.main]
num = 7
elements = ["dpi", "names"]
[rules.web]
queue = "main"
tcp_ports = [8080]
hooks = ["output"]
[element.names]
type = "policy"
default = "drop"
rule = [ { action = "accept", http_host = ["*.good.test"] } ]
"""
FETCH = """
import http.client, http.server, threading, time
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8080), http.server.BaseHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
for _ in range(1200):
    connection = http.client.HTTPConnection("127.0.0.1", 8080)
    connection.request("GET", "/", headers={"Host": "www.good.test"})
    connection.getresponse().read()
    connection.close()
    time.sleep(0.1)
"""


def test_connections_that_are_accepted_by_their_names_are_shown(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NAMES).ready()
    netns.start(sys.executable, "-c", FETCH)
    # Without a watcher they are judged without the elements.
    until(lambda: agent.status()["queues"][0]["workers"][0]["flows"] > 3, "requests pass")
    flows = json.loads(agent.verb("top", "name = www.good.test", "--for", "2", "--json").stdout)["flows"]
    assert len(flows) > 2
    assert {flow["verdict"] for flow in flows if "verdict" in flow} == {"accept"}
    assert agent.stop() == 0
