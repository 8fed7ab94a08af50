"""`top` and `trace` beside a running agent: what they show is what the agent did, with and without elements that follow flows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from namespace import Namespace

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
for _ in range(100):
    for port in (7000, 7001):
        try:
            one.sendto(b"x", ("127.0.0.1", port))
        except OSError:
            pass
    time.sleep(0.1)
"""


@pytest.mark.parametrize("elements", ['"ports"', '"dpi", "ports"'])
def test_what_is_shown_is_what_was_done(netns: Namespace, tmp_path: Path, elements: str) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(elements=elements)).ready()
    netns.start(sys.executable, "-c", SEND)
    shown: dict[str, str] = {}

    def ask(verb: str, what: str, *more: str) -> None:
        shown[verb] = agent.verb(verb, what, "--for", "2", *more).stdout

    ask("top", "src = 127.0.0.1", "--json")
    ask("trace", "verdict = drop")
    flows = {flow["dport"]: flow for flow in json.loads(shown["top"])["flows"]}
    assert {port: flow["verdict"] for port, flow in flows.items()} == {7000: "accept", 7001: "drop"}
    assert flows[7001]["reason"] == "ports: rule 1 (no-7001)"
    assert flows[7000]["packets"] > 5
    assert "udp 127.0.0.1:6000 -> 127.0.0.1:7001 OUTPUT, 29 bytes" in shown["trace"]
    assert "  ports: drop by rule 1 (no-7001)" in shown["trace"]
    assert ":7000" not in shown["trace"]
    counters = agent.status()["queues"][0]["workers"][0]
    assert counters["errors"] == 0
    refused = agent.verb("trace", "nam = x", check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[1].endswith("^ character 1: 'nam' is not a field; like it: name")
    until(lambda: agent.log.count("dropped udp") == 1, "one line for the flow")
    assert agent.stop() == 0


def test_two_traces_and_top_do_not_disturb_each_other(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(elements='"ports"')).ready()
    netns.start(sys.executable, "-c", SEND)
    verbs = (("trace", "dport = 7000"), ("trace", "verdict = drop"), ("top", "", "--json"))
    argv = [(*COMMAND, verb, "--config", str(agent.config), *more, "--for", "3") for verb, *more in verbs]
    started = [netns.start(*each, stdout=subprocess.PIPE, text=True) for each in argv]
    accepted, dropped, flows = (process.communicate(timeout=60)[0] for process in started)
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
for _ in range(100):
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
