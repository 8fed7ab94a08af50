"""What one agent costs for 1,000 new flows: processor time, lines in the log, series and bytes of a scrape. By hand, as root:
`python tests/bench/fleet.py`. Processor time is that of the agent's own processes, so that a busy machine changes it little."""

from __future__ import annotations

import os
import re
import socket
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from agent import Agent  # the path is set above
from namespace import Namespace

_FLOWS: Final = 1000
_ROUNDS: Final = 5
_CONFIG: Final = """
[log]
format = "json"
[queue.main]
num = 7
elements = ["dpi", "names"{more}]
[element.names]
type = "policy"
default = "accept"
rule = [
  {{ action = "drop", name = "evil", http_host = "evil.example.org" }},
  {{ action = "accept", name = "ours", http_host = "*.example.com" }},
]
[element.lines]
type = "log"
each = "flow"
[rules.web]
queue = "main"
tcp_ports = [8080]
"""
_KINDS: Final = {"policy alone": "", "policy, one line a flow": ', "lines"', "policy, record": ', "record"'}


def connections(count: int) -> None:
    """Connections with a request and an answer each, over the loopback."""
    server = socket.create_server(("127.0.0.1", 8080), backlog=128)

    def serve() -> None:
        for _ in range(count):
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(count):
        with socket.create_connection(("127.0.0.1", 8080)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: h%d.example.com\r\n\r\n" % (number % 50))
            while client.recv(65536):
                pass
    thread.join()
    server.close()


def spent(pids: list[int]) -> float:
    """Seconds of processor time of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pids: list[int]) -> float:
    """Megabytes, shared pages divided among those that share them."""
    kept = [re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[0] for pid in pids]
    return sum(map(int, kept)) / 1024


def measure(name: str, more: str) -> None:
    """Print the line of one kind."""
    with Namespace() as namespace, tempfile.TemporaryDirectory() as folder:
        agent = Agent(namespace, Path(folder), _CONFIG.format(more=more), LOG_FORMAT="json").ready()
        main = int(Path(f"/proc/{agent.process.pid}/stat").read_text().split()[0])
        pids = [main, *agent.workers()]
        namespace.call(connections, 100)
        idle = agent.verb("metrics").stdout
        cost, lines = [], []
        for _ in range(_ROUNDS):
            before, size = spent(pids), len(agent.log)
            namespace.call(connections, _FLOWS)
            cost.append(spent(pids) - before)
            lines.append(len(agent.log) - size)
        scrape = agent.verb("metrics").stdout
        series = [sum(not line.startswith("#") for line in text.splitlines()) for text in (idle, scrape)]
        print(
            f"{name}: {statistics.median(cost) * 1000:.0f} ms of CPU for {_FLOWS} connections "
            f"({min(cost) * 1000:.0f} to {max(cost) * 1000:.0f}), {statistics.median(lines) / 1000:.0f} kB of log, "
            f"{series[0]} series before and {series[1]} after, {len(scrape) / 1000:.1f} kB a scrape, {memory(pids):.0f} MB",
            flush=True,
        )
        agent.stop()


if __name__ == "__main__":
    for kind, added in _KINDS.items():
        measure(kind, added)
