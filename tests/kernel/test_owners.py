"""A policy for units and containers, with processes in control groups of the real hierarchy."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from control_groups import joined
from namespace import Namespace

from nfq_agent.host.owners import HostOwners
from nfq_agent.host.users import CAP_NET_ADMIN, CAP_SYS_PTRACE
from nfq_agent.packet import Hook
from nfq_agent.testing import udp

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = """
[queue.main]
num = 7
elements = ["dpi", "allow", "log"]
[element.allow]
type = "policy"
default = "drop"
rule = [
  {{ name = "payments", action = "accept", unit = "payments-*.service", dport = 8443 }},
  {{ name = "web", action = "accept", container = "web-{tag}" }},
]
[element.log]
only = "drop"
each = "flow"
[rules.out]
queue = "main"
hooks = ["output"]
tcp_ports = ["8000:9000"]
udp_ports = ["8000:9000"]
role = "client"
"""
# Joins a control group, then sends one datagram or opens a connection.
PROGRAM = """
import os, socket, sys, time
group, kind, port, seconds = sys.argv[1:]
with open(group + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
if kind == "udp":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", int(port)))
        # Who has a socket that is closed already is not known.
        time.sleep(2)
else:
    with socket.create_connection(("127.0.0.1", int(port)), float(seconds)) as connection:
        connection.sendall(b"GET / HTTP/1.1\\r\\nHost: www.off.test\\r\\n\\r\\n")
"""

# The same, with datagrams from one socket, for a minute.
TALKER = """
import os, socket, sys, time
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for _ in range(600):
        sender.sendto(b"x", ("127.0.0.1", 8999))
        time.sleep(0.1)
"""
ANY = """
[queue.main]
num = 7
{queue}
[element.capture]
type = "pcap"
directory = "{folder}"
[rules.out]
queue = "main"
hooks = ["output"]
udp_ports = [8999]
"""


@pytest.mark.parametrize(
    "queue",
    ['elements = ["log"]', 'elements = ["dpi", "capture"]', 'elements = ["dpi"]\nlog_drops = false'],
    ids=["log", "capture", "no lines for drops"],
)
def test_top_says_whose_a_flow_is_beside_any_elements(
    netns: Namespace, tmp_path: Path, groups: tuple[Path, str], queue: str
) -> None:
    root, tag = groups
    folder = tmp_path / "captures"
    folder.mkdir()
    folder.chmod(0o777)
    agent = Agent(netns, tmp_path, ANY.format(queue=queue, folder=folder)).ready()
    netns.start("nc", "-luk", "127.0.0.1", "8999", stdout=subprocess.DEVNULL)
    until(lambda: "127.0.0.1:8999" in netns.run("ss", "-Hlnu").stdout, "the port is open")
    talker = netns.start(sys.executable, "-c", TALKER, str(root / f"payments-{tag}.service"))

    def units() -> set[str]:
        flows = json.loads(agent.verb("top", "dport = 8999", "--for", "1", "--json").stdout)["flows"]
        return {flow["unit"] for flow in flows if "unit" in flow}

    assert until(units, "the flow has its unit") == {f"payments-{tag}.service"}
    talker.kill()
    talker.wait(20)
    assert agent.stop() == 0


def test_what_a_unit_and_a_container_may_reach(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    agent = Agent(netns, tmp_path, CONFIG.format(tag=tag)).ready()
    for port in (8443, 8080):
        netns.start("nc", "-lk", "127.0.0.1", str(port), stdout=subprocess.DEVNULL)
        until(lambda port=port: f":{port:04X} " in netns.shell("cat /proc/net/tcp"), f"port {port} is open")  # type: ignore[misc]  # its default is the type

    def connects(group: str, port: int, kind: str = "tcp", seconds: float = 60) -> bool:
        words = (str(root / group), kind, str(port), str(seconds))
        return netns.run(sys.executable, "-c", PROGRAM, *words, check=False).returncode == 0

    assert connects(f"payments-{tag}.service", 8443)
    assert not connects(f"payments-{tag}.service", 8080, seconds=1.5)
    assert connects(f"machine-web\\x2d{tag}.scope", 8080)
    assert not connects(f"other-{tag}.service", 8443, seconds=1.5)
    connects(f"other-{tag}.service", 8999, "udp")
    # One line for each flow that was dropped, with who and why; none for what may go.
    until(lambda: agent.log.count(f"unit other-{tag}.service") == 2, "both flows of the other unit are in the log")
    (line,) = [line for line in agent.log.splitlines() if f"unit payments-{tag}.service" in line]
    assert "127.0.0.1:8080 OUTPUT drop" in line
    assert line.rstrip().endswith("by allow: default") or "by allow: default" in line
    assert "web-" not in agent.log
    assert agent.stop() == 0


def test_the_egress_list_by_service_runs_as_it_stands(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    shutil.copy(CONFIGS / "web-networks.txt", tmp_path)
    netns.shell("ip address add 10.20.0.1/16 dev lo")
    netns.start("nc", "-lk", "0.0.0.0", "9999", stdout=subprocess.DEVNULL)
    until(lambda: ":270F " in netns.shell("cat /proc/net/tcp"), "the port is open")
    agent = Agent(netns, tmp_path, (CONFIGS / "egress-by-service.toml").read_text()).ready()
    for group in (f"other-{tag}.service", f"machine-web\\x2d{tag}.scope"):
        for host in ("127.0.0.1", "10.20.0.1"):
            netns.run(sys.executable, "-c", PROGRAM.replace("127.0.0.1", host), str(root / group), "tcp", "9999", "60")
    until(lambda: agent.log.count("by allow: default") == 2, "both flows off the list are in the log")
    lines = [line for line in agent.log.splitlines() if "by allow: default" in line]
    assert all("127.0.0.1:9999 OUTPUT would drop" in line for line in lines)
    assert f"unit other-{tag}.service" in lines[0]
    assert f"container web-{tag}" in lines[1]
    assert agent.queue("egress")["would_drop"] >= 2
    assert agent.stop() == 0


PROGRAMS = """
[queue.main]
num = 7
elements = ["dpi", "allow", "record"]
[element.allow]
type = "policy"
default = "drop"
rule = [{{ action = "accept", when = "exe = {exe}" }}]
[element.record]
exe = true
events = "begin"
[rules.out]
queue = "main"
hooks = ["output"]
tcp_ports = [9999]
role = "client"
"""


def test_what_a_program_may_reach(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    group = root / f"other-{tag}.service"
    netns.start("nc", "-lk", "127.0.0.1", "9999", stdout=subprocess.DEVNULL)
    until(lambda: ":270F " in netns.shell("cat /proc/net/tcp"), "the port is open")
    python = str(Path(sys.executable).resolve())
    agent = Agent(netns, tmp_path, PROGRAMS.format(exe=python), LOG_FORMAT="json").ready()

    def connects(*argv: str) -> bool:
        return netns.run(*joined(group, *argv), check=False).returncode == 0

    dial = 'import socket; socket.create_connection(("127.0.0.1", 9999), 60).sendall(b"hello")'
    assert connects(python, "-c", dial)
    assert not connects("curl", "-s", "-m", "1.5", "http://127.0.0.1:9999/")
    until(lambda: "/curl" in agent.log, "the record of the other program")
    records = [line for line in map(json.loads, agent.log.splitlines()) if line.get("event") == "begin"]
    assert [(each["exe"], each["verdict"]) for each in records] == [
        (python, "accept"), (str(Path(shutil.which("curl") or "").resolve()), "drop"),
    ]  # fmt: skip
    # A worker keeps no right to look at processes: its finder does, and nothing else.
    (worker,) = agent.workers()
    (finder,) = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    assert effective(worker) == 1 << CAP_NET_ADMIN
    assert effective(int(finder)) == 1 << CAP_SYS_PTRACE
    assert agent.stop() == 0
    until(lambda: has_ended(int(finder)), "the finder ends with its worker")


def has_ended(process: int) -> bool:
    """Whether it is gone, or was not reaped yet by the first process."""
    status = Path(f"/proc/{process}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def effective(process: int) -> int:
    """The capabilities of a process."""
    (line,) = [each for each in Path(f"/proc/{process}/status").read_text().splitlines() if each.startswith("CapEff:")]
    return int(line.split()[1], 16)


# Binds a socket to an address and a port, and connects it elsewhere if it is told to.
HOLDER = """
import socket, sys
host, port, connects = sys.argv[1:]
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((host, int(port)))
    if connects == "yes":
        one.connect((host, 8))
    print(one.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(group: Path, host: str, port: int = 0, connects: str = "no") -> Iterator[int]:
    """The port of a UDP socket that a process in this group has."""
    argv = joined(group, sys.executable, "-c", HOLDER, host, str(port), connects)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.communicate()


@pytest.mark.parametrize(
    ("host", "connects"),
    [("127.0.0.2", "no"), ("::ffff:127.0.0.3", "no"), ("127.0.0.1", "yes")],
    ids=["at another address", "of IPv6", "connected elsewhere"],
)
def test_who_may_have_sent_a_datagram_is_not_guessed(groups: tuple[Path, str], host: str, connects: str) -> None:
    """By IP_PKTINFO a socket of the same port sends from any address of this host, and by sendto(2) a connected one to others."""
    root, tag = groups
    service, other = root / f"payments-{tag}.service", root / f"other-{tag}.service"

    def unit(port: int) -> object:
        packet = udp(f"127.0.0.1:{port}", "127.0.0.1:9", hook=Hook.OUTPUT, uid=os.geteuid())
        return owners.names(packet).get("unit", "unknown")

    with contextlib.closing(HostOwners()) as owners, holding(service, "127.0.0.1") as port:
        assert unit(port) == service.name
        with holding(service, host, port, connects):
            assert unit(port) == service.name
        with holding(other, host, port, connects):
            assert unit(port) == "unknown"
        assert unit(port) == service.name


RECORDED = """
[queue.main]
num = 7
elements = ["dpi", "allow", "capture"]
[element.allow]
type = "policy"
default = "drop"
rule = [ {{ action = "accept", unit = "payments-{tag}.service" }}, {{ action = "accept", uid = 1 }} ]
[element.capture]
type = "pcap"
directory = "/run/captured"
[rules.out]
queue = "main"
hooks = ["output"]
udp_ports = [8999]
"""


def test_a_replay_of_what_was_seen_knows_whose_it_was(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    netns.shell("mkdir -m 777 /run/captured")
    agent = Agent(netns, tmp_path, RECORDED.format(tag=tag)).ready()
    for group in (f"payments-{tag}.service", f"other-{tag}.service"):
        netns.run(sys.executable, "-c", PROGRAM, str(root / group), "udp", "8999", "60")
    assert agent.stop() == 0
    (capture,) = netns.shell("ls /run/captured/*.pcapng").split()
    done = netns.run(*COMMAND, "replay", capture, "--config", str(agent.config), "--json")
    told = json.loads(done.stdout)
    assert sorted((flow["before"], flow["after"]) for flow in told["flows"]) == [("accept", "accept"), ("drop", "drop")]
    assert told["untold"] == []
