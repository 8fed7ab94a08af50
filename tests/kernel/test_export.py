"""The flows of a running agent as other programs read them: nfcapd and tshark read the IPFIX messages, lines are JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, until
from captures import listening, recording, tshark
from namespace import PATIENCE, UNPRIVILEGED, Namespace

from nfq_agent.service import control
from nfq_agent.service.rights import FLOW_READERS, READERS

CONFIG = """
[queue.main]
num = 7
elements = ["dpi", "names"]
[rules.web]
queue = "main"
tcp_ports = [8080]
udp_ports = [7000]
hooks = ["output"]
[element.names]
type = "policy"
default = "drop"
[[element.names.rule]]
action = "accept"
http_host = "*.good.test"
[[element.names.rule]]
action = "accept"
dport = 7000
"""
FETCH = """
import http.client
for host in ("www.good.test", "evil.test"):
    client = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60 if "good" in host else 1)
    try:
        client.request("GET", "/a", headers={"Host": host})
        client.getresponse().read()
    except OSError:
        pass
    client.close()
"""
# The longest name, and a rule whose name is not ASCII.
LONGEST = ".".join(("a" * 63, "b" * 63, "c" * 63, "d" * 51, "good.test"))
RULE = "r\u00e8gle \u4e2d"
ODD = CONFIG.replace("[[element.names.rule]]", f'[[element.names.rule]]\nname = "{RULE}"', 1)
FETCH_ODD = """
import socket, sys
for host in sys.argv[1:]:
    with socket.create_connection(("::1", 8080), 60) as client:
        client.sendall(f"GET /a HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode())
        while client.recv(65536):
            pass
"""
# A collector on TCP that reads and keeps nothing.
COLLECT = """
import socket
server = socket.create_server(("127.0.0.1", 4739))
while True:
    connection, _ = server.accept()
    while connection.recv(65536):
        pass
"""
# Name and verdict of each.
FETCHED = [("evil.test", "drop"), ("www.good.test", "accept")]
EXPORT = (*COMMAND, "export")
PIPELINES = Path(__file__).parent.parent.parent / "examples/pipelines"
# Keeps what the first connection brings.
KEEP = """
import socket, sys
connection, _ = socket.create_server(("127.0.0.1", int(sys.argv[1]))).accept()
with open(sys.argv[2], "wb") as kept:
    while data := connection.recv(65536):
        kept.write(data)
        kept.flush()
"""
# A consumer with the broker that librdkafka has for tests, at a port of its choice: Kafka's protocol over TCP, one process.
BROKER = (
    "kcat -C -b 127.0.0.1 -t flows -o beginning -q -u -X test.mock.num.brokers=1 -X allow.auto.create.topics=true "
    "-X topic.metadata.refresh.interval.ms=200"
)


@pytest.fixture
def web(netns: Namespace, tmp_path: Path) -> Agent:
    """A server, and an agent in front of it."""
    (tmp_path / "a").write_bytes(b"x" * 3000)
    netns.start(sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "-d", str(tmp_path), "8080")
    until(lambda: listening(netns, 8080), "the server listens")
    return Agent(netns, tmp_path, CONFIG).ready()


class Exporter:
    """`nfq-agent export` beside an agent. `messages`: what it has said so far."""

    def __init__(self, agent: Agent, folder: Path, *argv: str, command: tuple[str, ...] = EXPORT) -> None:
        self._messages = folder / "export.log"
        self._output = folder / "export.out"
        with self._messages.open("wb") as messages, self._output.open("wb") as output:
            self.process = agent.namespace.start(*command, *argv, "--idle", "1s", stdout=output, stderr=messages)
        until(lambda: "the flows of instance default go to" in self.messages, "the exporter reads flows")

    @property
    def messages(self) -> str:
        return self._messages.read_text()

    def stop(self) -> str:
        """End it as systemd does; what it wrote to its standard output."""
        self.process.terminate()
        assert self.process.wait(timeout=PATIENCE) == 0, self.messages
        return self._output.read_text()


def fetch(netns: Namespace) -> None:
    """A request that is accepted and one that is dropped."""
    netns.run(sys.executable, "-c", FETCH)


def test_json_lines_have_the_figures_of_a_capture(web: Agent, netns: Namespace, tmp_path: Path) -> None:
    target = tmp_path / "flows.json"
    exporter = Exporter(web, tmp_path, "json", "dport = 8080", "--to", str(target))
    with recording(netns, tmp_path / "seen.pcap"):
        fetch(netns)
        until(lambda: target.exists() and target.read_text().count('"event": "flow"') >= 2, "both flows are written")
    exporter.stop()
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    sizes: dict[tuple[str, str], list[int]] = {}
    for packet in tshark(tmp_path / "seen.pcap", ["tcp.srcport", "tcp.dstport", "ip.len"], "tcp.port == 8080"):
        sizes.setdefault((packet["tcp.srcport"][0], packet["tcp.dstport"][0]), []).append(int(packet["ip.len"][0]))
    accepted = [line for line in lines if line.get("http_host") == "www.good.test"]
    there, back = sizes[str(accepted[0]["sport"]), "8080"], sizes["8080", str(accepted[0]["sport"])]
    assert sum(line["pkts_toserver"] for line in accepted) == len(there)
    assert sum(line["bytes_toserver"] for line in accepted) == sum(there)
    assert sum(line["pkts_toclient"] for line in accepted) == len(back)
    assert sum(line["bytes_toclient"] for line in accepted) == sum(back)
    assert accepted[0].items() >= {"verdict": "accept", "reason": "names: rule 1", "instance": "default", "queue": 7}.items()
    denied = [line for line in lines if line.get("http_host") == "evil.test"]
    assert denied
    assert denied[0].items() >= {"verdict": "drop", "reason": "names: default"}.items()
    assert lines[-1] == {"event": "statistics", "process": lines[-1]["process"], "exported": len(lines) - 1, "missed": 0}


def end_when_read(netns: Namespace, collector: subprocess.Popen[Any]) -> None:
    """End nfcapd once it has read all datagrams: those that wait in its socket it would leave there."""
    until(lambda: netns.run("ss", "-Hlun", "sport = :4739").stdout.split()[1] == "0", "no datagram waits")
    collector.terminate()
    collector.wait(PATIENCE)


def nfdump(folder: Path) -> list[dict[str, Any]]:
    """The flows that nfcapd has kept."""
    done = subprocess.run(["nfdump", "-R", str(folder), "-o", "json"], capture_output=True, check=True, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_nfdump_reads_datagrams(web: Agent, netns: Namespace, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    collector = netns.start("nfcapd", "-w", str(kept), "-b", "127.0.0.1", "-p", "4739", stderr=subprocess.DEVNULL)
    until(lambda: listening(netns, 4739, "-u"), "nfcapd listens")
    exporter = Exporter(web, tmp_path, "ipfix", "dport = 8080", "--to", "udp://127.0.0.1:4739")
    with recording(netns, tmp_path / "seen.pcap"):
        fetch(netns)
    exporter.stop()
    end_when_read(netns, collector)
    seen = tshark(tmp_path / "seen.pcap", ["tcp.srcport", "tcp.dstport", "ip.len"], "tcp.port == 8080")
    clients = {packet["tcp.srcport"][0] for packet in seen} - {"8080"}
    flows = nfdump(kept)
    assert {str(flow["src_port"]) for flow in flows} == clients
    for client in clients:
        mine = [flow for flow in flows if str(flow["src_port"]) == client]
        for side, field in (("in", "tcp.srcport"), ("out", "tcp.dstport")):
            sizes = [int(packet["ip.len"][0]) for packet in seen if packet[field] == [client]]
            # What the agent dropped on its way out was seen by it alone.
            assert sum(flow[f"{side}_packets"] for flow in mine) >= len(sizes)
            assert sum(flow[f"{side}_bytes"] for flow in mine) >= sum(sizes)
        assert all(flow["proto"] == 6 and flow["dst4_addr"] == "127.0.0.1" for flow in mine)


def shown(path: Path, *more: str) -> str:
    """The IPFIX messages of a capture, or of a file of messages, as tshark reads them."""
    done = subprocess.run(["tshark", "-r", str(path), *more, "-V"], capture_output=True, check=True, text=True)
    assert "Malformed" not in done.stdout
    return done.stdout


def read_whole(messages: str) -> None:
    """Both records are in what tshark read, with our fields and the figures of the exporter."""
    ours = ("www.good.test", "evil.test", "names: rule 1", "names: default", "accept", "drop", "http", "queue 7", "default")
    for text in ours:
        assert f"Value (hex bytes): {text.encode().hex(' ')}\n" in messages
    for line in ("SrcAddr: 127.0.0.1", "DstPort: 8080", "Protocol: TCP (6)", "ForwardingStatusDropCode: Drop ACL Deny (1)"):
        assert line in messages
    assert "ForwardingStatusForwardCode: Forwarded (Unknown) (0)" in messages
    assert "Reverse Type 1 BYTES" in messages
    assert "Not Sent Flows: 0" in messages


def test_tshark_reads_a_connection(web: Agent, netns: Namespace, tmp_path: Path) -> None:
    # A port that tshark takes for IPFIX.
    netns.start(sys.executable, "-c", COLLECT, stdout=subprocess.DEVNULL)
    until(lambda: listening(netns, 4739), "the collector listens")
    with recording(netns, tmp_path / "seen.pcap"):
        exporter = Exporter(web, tmp_path, "ipfix", "--to", "tcp://127.0.0.1:4739")
        fetch(netns)
        exporter.stop()
    read_whole(shown(tmp_path / "seen.pcap", "-Y", "cflow"))


def test_tshark_reads_a_file(web: Agent, netns: Namespace, tmp_path: Path) -> None:
    exporter = Exporter(web, tmp_path, "ipfix", "--to", str(tmp_path / "flows.ipfix"))
    fetch(netns)
    exporter.stop()
    read_whole(shown(tmp_path / "flows.ipfix"))


def named(lines: Path) -> set[str]:
    """The names of the flows in JSON lines."""
    return {json.loads(line).get("http_host", "") for line in lines.read_text().splitlines()} if lines.exists() else set()


def test_nfdump_and_tshark_read_odd_values(netns: Namespace, tmp_path: Path) -> None:
    """IPv6, the longest name, and a rule whose name is not ASCII."""
    (tmp_path / "a").write_bytes(b"x" * 3000)
    netns.start(sys.executable, "-m", "http.server", "--bind", "::1", "-d", str(tmp_path), "8080")
    until(lambda: listening(netns, 8080), "the server listens")
    agent = Agent(netns, tmp_path, ODD).ready()
    kept = tmp_path / "kept"
    kept.mkdir()
    collector = netns.start("nfcapd", "-w", str(kept), "-b", "127.0.0.1", "-p", "4739", stderr=subprocess.DEVNULL)
    until(lambda: listening(netns, 4739, "-u"), "nfcapd listens")
    with recording(netns, tmp_path / "seen.pcap"):
        exporter = Exporter(agent, tmp_path, "ipfix", "dport = 8080", "--to", "udp://127.0.0.1:4739")
        beside = tmp_path / "beside"
        beside.mkdir()
        Exporter(agent, beside, "json", "dport = 8080", "--to", str(beside / "flows"))
        netns.run(sys.executable, "-c", FETCH_ODD, LONGEST)
        # Once the agent has told another exporter, this one knows it too when it stops.
        until(lambda: LONGEST in named(beside / "flows"), "the agent has told the name")
        exporter.stop()
    end_when_read(netns, collector)
    flows = nfdump(kept)
    assert {(flow["src6_addr"], flow["dst6_addr"], flow["dst_port"]) for flow in flows} == {("::1", "::1", 8080)}
    assert sum(flow["in_packets"] for flow in flows) > 0
    messages = subprocess.run(
        ["tshark", "-r", str(tmp_path / "seen.pcap"), "-Y", "cflow", "-T", "pdml"], capture_output=True, check=True, text=True
    ).stdout
    assert "alformed" not in messages
    for text in (LONGEST, f"names: rule 1 ({RULE})"):
        assert f'value="{text.encode().hex()}"' in messages
    assert 'show="::1"' in messages


def accepted_and_dropped(text: str) -> list[tuple[str, str]]:
    """Name and verdict of the flows in JSON lines, each once."""
    flows = [json.loads(line) for line in text.splitlines()]
    return sorted({(flow["http_host"], flow["verdict"]) for flow in flows if flow["event"] == "flow" and "http_host" in flow})


def broker(netns: Namespace, folder: Path) -> tuple[Path, str]:
    """Start a broker and a consumer. Returns the file with what is in the topic, and the broker's address."""
    kept, messages = folder / "topic", folder / "broker"
    with kept.open("wb") as output, messages.open("wb") as errors:
        netns.start(*BROKER.split(), stdout=output, stderr=errors)
    (address,) = until(lambda: re.findall(r"replaced with (\S+)", messages.read_text()), "the broker listens")
    return kept, address


def wait_for_both(kept: Path) -> None:
    """Until the topic has both flows, each line whole."""
    until(
        lambda: kept.read_bytes().endswith(b"\n") and accepted_and_dropped(kept.read_text()) == FETCHED,
        "the topic has both flows",
    )


def test_kafka_has_the_flows_by_the_drop_in(web: Agent, netns: Namespace, tmp_path: Path) -> None:
    kept, address = broker(netns, tmp_path)
    (words,) = re.findall(r"^ExecStart=(.+)$", (PIPELINES / "kafka.conf").read_text(), re.MULTILINE)
    *shell, script = shlex.split(words)
    assert (shell, script.split()[0], "kafka.example.net:9092" in script) == (["/bin/sh", "-c"], "nfq-agent", True)
    script = (
        script.replace("nfq-agent", shlex.join(COMMAND), 1)
        .replace(" | ", " --idle 1s | ", 1)
        .replace("kafka.example.net:9092", address)
    )
    with (tmp_path / "said").open("wb") as said:
        pipe = netns.start(*shell, script, stdout=said, stderr=said)
    until(lambda: "the flows of instance default go to" in (tmp_path / "said").read_text(), "the exporter reads flows")
    fetch(netns)
    wait_for_both(kept)
    assert pipe.poll() is None, (tmp_path / "said").read_text()


@pytest.mark.parametrize("name", ["fluent-bit.conf", "vector.toml"])
def test_kafka_has_the_flows_by_a_pipeline(web: Agent, netns: Namespace, tmp_path: Path, name: str) -> None:
    program = shutil.which(name.partition(".")[0])
    if program is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed: Debian has no package of it")
    kept, address = broker(netns, tmp_path)
    config = tmp_path / name
    config.write_text((PIPELINES / name).read_text().replace("kafka.example.net:9092", address))
    with (tmp_path / "said").open("wb") as said:
        netns.start(program, "--config", str(config), stdout=said, stderr=said)
    until(lambda: listening(netns, 5170), "the program listens")
    exporter = Exporter(web, tmp_path, "json", "--to", "tcp://127.0.0.1:5170")
    fetch(netns)
    exporter.stop()
    wait_for_both(kept)
    assert {json.loads(line)["host"] for line in kept.read_text().splitlines()} == {os.uname().nodename}


@pytest.mark.parametrize("name", ["fluent-bit.conf", "vector.toml"])
def test_pipelines_get_json_lines_by_the_drop_in(web: Agent, netns: Namespace, tmp_path: Path, name: str) -> None:
    text = (PIPELINES / name).read_text()
    (words,) = re.findall(r"^#   ExecStart=(.+)$", text, re.MULTILINE)
    command, *argv = words.split()
    port = int(argv[-1].rpartition(":")[2])
    # Where the program listens: by a setting of its own, of the same port.
    if name == "vector.toml":
        assert tomllib.loads(text)["sources"]["flows"]["address"] == f"127.0.0.1:{port}"
    else:
        assert re.search(rf"^    Listen +127\.0\.0\.1\n    Port +{port}$", text, re.MULTILINE)
    assert (command, argv[0]) == ("/usr/bin/nfq-agent", "export")
    kept = tmp_path / "kept"
    netns.start(sys.executable, "-c", KEEP, str(port), str(kept))
    until(lambda: listening(netns, port), "the program listens")
    exporter = Exporter(web, tmp_path, *argv[1:])
    fetch(netns)
    exporter.stop()
    until(lambda: '"statistics"' in (text := kept.read_text()) and text.endswith("\n"), "the last line is there")
    assert accepted_and_dropped(kept.read_text()) == FETCHED


def test_what_no_collector_takes_is_counted(web: Agent, netns: Namespace, tmp_path: Path) -> None:
    exporter = Exporter(web, tmp_path, "json", "dport = 8080", "--to", "tcp://127.0.0.1:4740")
    fetch(netns)
    until(lambda: "Connection refused; records are lost until it is back" in exporter.messages, "it says so")
    exporter.stop()
    missed = exporter.messages.splitlines()[-1]
    assert missed.startswith("nfq-agent: ")
    assert missed.endswith(" in all)")
    assert int(missed.split()[1]) >= 2
    assert web.totals()["errors"] == 0


def test_a_member_of_the_group_may_read_flows_and_nothing_else(netns: Namespace, tmp_path: Path) -> None:
    for group in (READERS, FLOW_READERS):
        netns.run("groupadd", "--system", group, check=False)
    members = [int(netns.run("getent", "group", group).stdout.split(":")[2]) for group in (READERS, FLOW_READERS)]
    agent = Agent(netns, tmp_path, CONFIG).ready()

    def asked(verb: str, groups: list[int]) -> str:
        def inside() -> str:
            os.setgroups(groups)
            os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
            os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
            return str(control.ask("default", {"verb": verb}))

        return netns.call(inside)

    assert "'records': []" in asked("flows", members)
    assert f"'flows' is for root and members of group {FLOW_READERS}" in asked("flows", members[:1])
    assert "'reload' is for root" in asked("reload", members)
    assert agent.stop() == 0
