"""The journal of a host, sent by systemd to another host and queried there by the agent's fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from booted.container import Container, Layer
from booted.nspawn import checked, until
from booted.packages import TOP
from booted.roots import RELEASES, Release

# One release is enough: the agent's part is the fields.
pytestmark = pytest.mark.parametrize("release", RELEASES[1:], ids=lambda release: release.name, indirect=True)
_CONFIG = """
[queue.main]
num = 7
elements = ["gate"]
[element.gate]
type = "policy"
default = "accept"
rule = [{ action = "drop", name = "closed", dport = 8081 }]
[rules.web]
queue = "main"
tcp_ports = [8081]
hooks = ["output"]
"""
_FIELDS = ("NFQ_SRC", "NFQ_SPORT", "NFQ_DPORT", "NFQ_REASON", "_SYSTEMD_UNIT", "_MACHINE_ID", "__REALTIME_TIMESTAMP")
_KNOCK = """
import contextlib, socket
with contextlib.suppress(TimeoutError):
    socket.create_connection(("127.0.0.1", 8081), 0.2)
"""


@pytest.fixture
def hosts(release: Release, with_journal_remote: tuple[Path, ...]) -> Iterator[tuple[Container, Container]]:
    """A host with the agent and one that collects journals, on one link."""
    with (
        Layer(*with_journal_remote) as layer, Container(layer) as host,
        Layer(*with_journal_remote) as other, Container(other) as collector,
    ):  # fmt: skip
        enter = ["nsenter", f"--target={host.pid}", "--net"]
        checked([*enter, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", str(collector.pid)])
        for number, each in enumerate((collector, host), 1):
            each.shell(
                f"ip address add 192.0.2.{number}/24 dev up0; ip link set up0 up; echo 192.0.2.1 logs.example.net >>/etc/hosts"
            )
        yield host, collector


def certificates(folder: Path, *names: str) -> None:
    """An authority `ca.pem`, and for each name a key and a certificate by it."""
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    checked([*make, "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem"], cwd=folder)
    for name in names:
        words = ["-CA", "ca.pem", "-CAkey", "ca.key", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        words += ["-addext", "basicConstraints=critical,CA:FALSE"]
        checked([*make, *words, "-keyout", f"{name}.key", "-out", f"{name}.pem"], cwd=folder)


def configure(host: Container, folder: Path, name: str, file: str) -> None:
    """Lay a file that docs/fleet.md shows, with the keys and certificates that it names."""
    page = (TOP / "docs/fleet.md").read_text()
    (text,) = re.findall(rf"```\n# ({re.escape(file)}\n.*?)```", page, re.DOTALL)
    host.write(file, f"# {text}")
    for key, source in (
        ("ServerKeyFile", f"{name}.key"),
        ("ServerCertificateFile", f"{name}.pem"),
        ("TrustedCertificateFile", "ca.pem"),
    ):
        (target,) = re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)
        host.write(target, (folder / source).read_text())


def drops(host: Container, *words: str) -> list[tuple[str, ...]]:
    """The fields of what the agent dropped, as the journal has them. Nothing where there is no journal yet."""
    host.run("journalctl", "--sync")
    query = ["journalctl", "--no-pager", *words, "--output=json", "NFQ_EVENT=drop", "NFQ_DPORT=8081"]
    found = host.run(*query, check=False).stdout
    return sorted(tuple(str(entry[field]) for field in _FIELDS) for entry in map(json.loads, found.splitlines()))


def test_drops_of_a_host_are_found_on_the_collector(hosts: tuple[Container, Container], tmp_path: Path) -> None:
    host, collector = hosts
    certificates(tmp_path, "logs.example.net", "web1.example.net")
    configure(collector, tmp_path, "logs.example.net", "/etc/systemd/journal-remote.conf")
    configure(host, tmp_path, "web1.example.net", "/etc/systemd/journal-upload.conf")
    collector.shell("chgrp systemd-journal-remote /etc/ssl/private; chmod 750 /etc/ssl/private")
    host.shell("chgrp systemd-journal /etc/ssl/private; chmod 750 /etc/ssl/private")
    collector.shell("systemctl start systemd-journal-remote.socket")
    host.write("/etc/nfq-agent/nfq-agent.toml", _CONFIG)
    host.shell("systemctl restart nfq-agent")
    host.run("python3", "-c", _KNOCK)
    host.shell("systemctl start systemd-journal-upload")
    there = "--directory=/var/log/journal/remote"

    def all_there() -> bool:
        mine = drops(host)
        return bool(mine) and drops(collector, there) == mine

    until(all_there, "the collector has what the host dropped")
    first = drops(collector, there)
    assert {entry[2:5] for entry in first} == {("8081", "gate: rule 1 (closed)", "nfq-agent.service")}
    # While the collector is away the host's journal keeps what is written; it is sent once, from where it stopped.
    collector.shell("systemctl stop systemd-journal-remote.socket systemd-journal-remote.service")
    host.run("python3", "-c", _KNOCK)
    collector.shell("systemctl start systemd-journal-remote.socket")
    host.shell("systemctl reset-failed systemd-journal-upload; systemctl restart systemd-journal-upload")
    until(lambda: len(drops(host)) > len(first) and all_there(), "the collector has the rest")
