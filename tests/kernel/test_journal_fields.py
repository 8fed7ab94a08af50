"""What a real journald keeps of the agent's lines, and journalctl reads back: each field as it is documented, and no other."""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from agent import Agent, until
from control_groups import joined
from journald import Journald
from log_fields import documented, fields_of
from log_traffic import BROKEN, CLIENT, CONFIG, DATAGRAMS, PEERS, send_all, serve
from namespace import Namespace

from nfq_agent.elements.dpi import Dpi

# Whose flows they are; limits that are exceeded; a folder that cannot be written to; rules that another program removes.
MORE = """
[queue.owned]
num = 13
elements = ["dpi", "allow", "owners"]
[element.owners]
type = "record"
exe = true
[rules.owned]
queue = "owned"
hooks = ["output"]
tcp_ports = [8080]

[queue.limited]
num = 14
elements = ["slow", "few", "capture"]
[element.slow]
type = "rate-limit"
rate = "1/h"
burst = 3
[element.few]
type = "log"
per_second = 1
only = "drop"
[element.capture]
type = "pcap"
directory = "FOLDER"
[rules.limited]
queue = "limited"
hooks = ["output"]
role = "client"
udp_ports = [7020]

[agent]
drift_check = "200ms"
"""
MARKED = """
import socket
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.setsockopt(socket.SOL_SOCKET, 36, 0x10)
one.sendto(b"x", ("10.2.0.2", 7003))
"""
# Fields that this traffic does not make, besides facts of protocols that it does not speak: a packet that cannot be read and one
# that a worker has when it dies, a proxy without room, a flow from one container to another.
_ELSEWHERE = {"malformed", "lost", "active", "waiting", "container_to"}


class Kept:
    """The agent's entries: each is checked when it is read."""

    def __init__(self, journald: Journald) -> None:
        self._journald = journald

    def where(self, **fields: Any) -> list[dict[str, Any]]:
        """The entries with these fields."""
        matches = (f"NFQ_{name.upper()}={value}" for name, value in fields.items())
        return [fields_of(entry) for entry in self._journald.entries("SYSLOG_IDENTIFIER=nfq-agent", *matches)]

    def wait(self, **fields: Any) -> None:
        """Wait for such an entry."""
        until(lambda: self.where(**fields), f"an entry with {fields}")


def test_each_field_of_a_real_journal_is_documented(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path, groups: tuple[Path, str]
) -> None:
    client, router, server = routed
    root, tag = groups
    serve(server)
    serve(router)
    kept = Kept(Journald(router))
    (tmp_path / "elements").mkdir()
    (tmp_path / "elements" / "broken_element.py").write_text(BROKEN)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    agent = Agent(router, tmp_path, CONFIG + MORE.replace("FOLDER", str(closed)), LOG_FORMAT="journal")
    until(lambda: agent.verb("status", check=False).returncode == 0, "it serves")
    send_all(client, router)
    for group in (f"payments-{tag}.service", f"machine-web\\x2d{tag}.scope"):
        argv = [sys.executable, "-c", CLIENT, "127.0.0.1", "8080", "closed", "a.free.test"]
        router.run(*joined(root / group, *argv))
    router.run(sys.executable, "-c", DATAGRAMS, "10.2.0.2", "10", *["7020"] * 6)
    router.run(sys.executable, "-c", MARKED)
    ends: list[dict[str, Any]] = [
        *({where: name, "dst": address, "end": end} for where, name in (("queue", 7), ("tap", "web"), ("inline", "web"))
          for address in PEERS.values() for end in ("closed", "reset")),
        {"proxy": "web", "event": "closed"},
        {"queue": 10, "event": "drop", "would": "drop", "src": "fd01::2"},
        {"unit": f"payments-{tag}.service", "end": "closed", "exe": os.path.realpath(sys.executable), "uid": 0},
        {"container": f"web-{tag}", "end": "closed"},
        {"queue": 12, "event": "begin", "mark": "0x10"},
        {"element": "broken", "queue": 9},
        {"queue": 14, "verdict": "drop"},
    ]  # fmt: skip
    for wanted in ends:
        kept.wait(**wanted)
    os.kill(agent.queue("owned")["workers"][0]["pid"], signal.SIGKILL)
    kept.wait(worker="worker of queue 13")
    router.run("iptables-legacy", "-w", "-t", "mangle", "-F", "NFQA-default-FORWARD")
    kept.wait(repairs=1)
    assert agent.stop() == 0
    values: dict[str, set[Any]] = defaultdict(set)
    for entry in kept.where():
        for name, value in entry.items():
            values[name].add(value)
    assert not values.keys() - documented().keys()
    assert values.keys() >= {"protocol", "http_host", "http_method", "http_path", "http_version"}
    assert documented().keys() - values.keys() <= _ELSEWHERE | set(Dpi.keeps_facts)
    assert values["verdict"] == {"accept", "drop", "reject"}
    assert values["hook"] == {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
    assert values["proto"] == {"tcp", "udp", "icmp", "icmpv6"}
    assert values["would"] == {"drop"}
    assert values["end"] == {"closed", "reset", "stopped"}
    # Packets may pass while the rules of a hook are away.
    assert values["event"] - {"bypass"} == {"begin", "change", "end", "drop", "opened", "closed"}
    assert values["element"] == {"allow", "ports", "broken"}
    assert values["rule"] == {"default", "undecided", "rule 1", "rule 2 (refuse)", "rule 3"}
    assert values["instance"] == {"default"}
