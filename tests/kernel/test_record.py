"""The records of flows beside a capture of the same packets, and their owners."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from captures import frames, listening, recording, tshark
from log_lines import lines
from namespace import Namespace

CONFIG = """
[queue.main]
num = 7
elements = ["dpi", "allow", "record"]
mode = "{mode}"
[rules.web]
queue = "main"
tcp_ports = [8080]
hooks = ["output"]
[element.allow]
type = "policy"
default = "drop"
[[element.allow.rule]]
action = "accept"
http_host = "*.free.test"
"""
# Several requests on one connection, from a control group: [GROUP] SECONDS HOST...
CLIENT = """
import http.client, os, sys
group, seconds, *hosts = sys.argv[1:]
if group:
    with open(group + "/cgroup.procs", "w") as procs:
        procs.write(str(os.getpid()))
client = http.client.HTTPConnection("127.0.0.1", 8080, timeout=float(seconds))
for host in hosts:
    client.request("GET", "/a", headers={"Host": host})
    client.getresponse().read()
client.close()
"""
TAP = '[tap.web]\ninterfaces = ["lo"]\ntcp_ports = [8080]\n'
QUEUE = '[rules.web]\nqueue = "main"\nhooks = ["output"]\ntcp_ports = [8080]\n[queue.main]\n'
# Answers ten milliseconds after it was asked.
SLOW = """
import socket, time
listener = socket.create_server(("127.0.0.1", 8080))
one, _ = listener.accept()
one.recv(1)
time.sleep(0.01)
one.sendall(b"y")
one.recv(1)
one.close()
"""


def records(agent: Agent) -> list[dict[str, Any]]:
    """All records so far; each fits the schema, as every line does."""
    return [line for line in lines(agent.log) if line.get("event") in ("begin", "change", "end")]


def serve(netns: Namespace, folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * 3000)
    netns.start(sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "-d", str(folder), "8080")
    until(lambda: listening(netns, 8080), "the server listens")


def test_the_figures_are_those_of_a_capture(netns: Namespace, tmp_path: Path) -> None:
    serve(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(mode="enforce"), LOG_FORMAT="json").ready()
    with recording(netns, tmp_path / "seen.pcap"):
        for hosts in (["a.free.test"], ["b.free.test"] * 20, ["c.free.test", "d.free.test"]):
            netns.run(sys.executable, "-c", CLIENT, "", "60", *hosts)
        until(lambda: sum(each["event"] == "end" for each in records(agent)) == 3, "the connections have ended")
    seen: dict[tuple[str, str], Counter[str]] = {}
    for packet in tshark(tmp_path / "seen.pcap", ["tcp.srcport", "tcp.dstport", "ip.len"], "tcp.port == 8080"):
        (source,), (target,), (length,) = packet["tcp.srcport"], packet["tcp.dstport"], packet["ip.len"]
        seen.setdefault((source, target), Counter()).update(packets=1, bytes=int(length))
    for record in [each for each in records(agent) if each["event"] == "end"]:
        there, back = seen[str(record["sport"]), "8080"], seen["8080", str(record["sport"])]
        assert (record["pkts_toserver"], record["bytes_toserver"]) == (there["packets"], there["bytes"])
        assert (record["pkts_toclient"], record["bytes_toclient"]) == (back["packets"], back["bytes"])
        assert (record["verdict"], record["end"], record["rule"], record["queue"]) == ("accept", "closed", "rule 1", 7)
    assert [each["http_host"] for each in records(agent) if each["event"] == "begin"] == [
        "a.free.test",
        "b.free.test",
        "c.free.test",
    ]
    assert agent.stop() == 0


@pytest.mark.parametrize("where", [TAP, QUEUE], ids=["tap", "queue"])
def test_the_record_of_a_short_connection_has_its_duration(netns: Namespace, tmp_path: Path, where: str) -> None:
    """A tap is handed its packets together, and the turn of a worker may begin before the packet comes that it waits for."""
    netns.start(sys.executable, "-c", SLOW)
    until(lambda: listening(netns, 8080), "the server listens")
    agent = Agent(netns, tmp_path, f'{where}elements = ["record"]\n', LOG_FORMAT="json").ready()
    with recording(netns, tmp_path / "seen.pcap"):
        netns.run("nc", "-N", "127.0.0.1", "8080", input="x")
        until(lambda: any(each.get("end") == "closed" for each in records(agent)), "the connection has ended")
    times = [seconds for seconds, packet in frames(tmp_path / "seen.pcap") if packet[9] == 6]
    (end,) = [each for each in records(agent) if each["event"] == "end"]
    assert end["duration"] >= 0.01
    assert end["duration"] == pytest.approx(max(times) - min(times), abs=0.1)
    assert agent.stop() == 0


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_a_denied_flow_has_its_owner_and_reason(netns: Namespace, tmp_path: Path, groups: tuple[Path, str], mode: str) -> None:
    root, tag = groups
    serve(netns, tmp_path)
    agent = Agent(netns, tmp_path, CONFIG.format(mode=mode), LOG_FORMAT="json").ready()
    words = (str(root / f"payments-{tag}.service"), "60" if mode == "monitor" else "2", "bad.test")
    done = netns.run(sys.executable, "-c", CLIENT, *words, check=False)
    assert (done.returncode == 0) == (mode == "monitor")
    until(lambda: records(agent), "the flow has its record")
    record = records(agent)[0]
    expected = {"event": "begin", "unit": f"payments-{tag}.service", "http_host": "bad.test", "reason": "allow: default"}
    assert record.items() >= expected.items()
    assert (record["verdict"], record.get("would")) == (("drop", None) if mode == "enforce" else ("accept", "drop"))
    assert agent.stop() == 0
    assert '"drops"' not in agent.log, "no line says that drops are not logged"
    # The worker's end is the flow's, where it had none.
    assert {each["event"] for each in records(agent)} == {"begin", "end"}
