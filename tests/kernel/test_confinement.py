"""A worker that is taken over can give verdicts, and nothing else. Tried for real, against what SECURITY.md promises."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from agent import Agent, saved, until
from containers import bridged, traces
from namespace import Namespace
from traffic import PYTHON

pytestmark = pytest.mark.kernel

REFUSED = ("EPERM", "EACCES")
SUPPORT = str(Path(__file__).parent.parent / "support")
QUEUE = """
[agent]
confinement = "{confinement}"
[queue.main]
num = 100
elements = [{elements}]
[element.evil]
type = "taken_over:TakenOver"
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [11000]
"""
REJECT = """
[element.rules]
type = "policy"
[[element.rules.rule]]
dport = 11001
action = "reject"
"""
SEND = """
import socket
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.bind(("127.0.0.1", 11000)); end.settimeout(5)
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for data in {payloads!r}:
    out.sendto(data, ("127.0.0.1", 11000))
    assert end.recv(100) == data
print("passed")
"""


def attack(namespace: Namespace, agent: Agent, *more: bytes) -> dict[str, str]:
    """Send the packet that starts it; what came of each attempt. Packets before and after pass."""
    script = SEND.format(payloads=[b"before", b"attack", b"after", *more])
    assert "passed" in namespace.run(PYTHON, "-c", script).stdout
    ended(agent)
    return dict(re.findall(r"attempt (.+): (\w+)\s*$", agent.log, re.MULTILINE))


def ended(agent: Agent) -> None:
    """Wait until all was tried; fails with the log."""
    try:
        until(lambda: "attempts end" in agent.log, "the attempts end", 20)
    except AssertionError as error:
        raise AssertionError(agent.log[-5000:]) from error


def tables(namespace: Namespace) -> str:
    """The nftables of a namespace."""
    return str(namespace.run("nft", "list", "tables").stdout)


def started(namespace: Namespace, folder: Path, config: str) -> Agent:
    return Agent(namespace, folder, config, PYTHONPATH=SUPPORT).ready()


@pytest.mark.parametrize("more", ["", REJECT], ids=["queue", "queue that rejects"])
def test_a_worker_that_is_taken_over(netns: Namespace, tmp_path: Path, more: str) -> None:
    elements = '"evil", "rules"' if more else '"evil"'
    agent = started(netns, tmp_path, QUEUE.format(confinement="required", elements=elements) + more)
    before, nft = saved(netns), tables(netns)
    found = attack(netns, agent)
    assert len(found) > 70
    assert {name: how for name, how in found.items() if how not in REFUSED} == {}
    assert (saved(netns), tables(netns)) == (before, nft)
    assert netns.run("ip", "-o", "link", "show", "lo").stdout.count(",UP") == 1
    # The same process still judges, and the supervisor lives.
    agent.status()
    assert agent.totals()["received"] == 3
    assert agent.stop() == 0


def test_a_worker_that_may_write_files_does_not_end_the_supervisor(netns: Namespace, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="captures-"))
    folder.chmod(0o777)
    config = QUEUE.format(confinement="required", elements='"evil", "files"')
    agent = started(netns, tmp_path, config + f'[element.files]\ntype = "pcap"\ndirectory = "{folder}"\n')
    worker = agent.workers()
    found = attack(netns, agent)
    cut = {name: how for name, how in found.items() if name.startswith("truncate ")}
    # Its own are the files that it opened with the first packet.
    opened = {os.readlink(f"/proc/{worker[0]}/fd/{name.split()[1]}") for name, how in cut.items() if how != "EPERM"}
    assert {str(Path(path).parent) for path in opened} == {str(folder)}
    assert list(cut.values()).count("EPERM") > 5
    # The memory that it shares with the supervisor is whole: both live.
    assert (agent.workers(), agent.totals()["received"]) == (worker, 3)
    assert agent.stop() == 0
    shutil.rmtree(folder)


def test_without_confinement_the_same_attempts_succeed(netns: Namespace, tmp_path: Path) -> None:
    agent = started(netns, tmp_path, QUEUE.format(confinement="off", elements='"evil"'))
    script = SEND.format(payloads=[b"attack"])
    netns.run(PYTHON, "-c", script, check=False)
    until(lambda: "evil" in tables(netns), "a table of nftables is made over the queue's socket")
    agent.kill()


def test_no_descriptor_of_siblings_and_no_group(netns: Namespace, tmp_path: Path) -> None:
    config = QUEUE.format(confinement="required", elements="").replace("num = 100", 'balance = "100:102"')
    agent = started(netns, tmp_path, config)
    workers = agent.workers()
    assert len(workers) == 3
    held = [{os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")} for pid in workers]
    sockets = [{each for each in one if each.startswith("socket:")} for one in held]
    # Each has its queue's socket, and its control socket.
    common = sockets[0] & sockets[1] & sockets[2]
    assert common == set()
    assert [len(each) for each in sockets] == [2, 2, 2], sockets
    for pid in workers:
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
        assert not re.search(r"^Gid:.*\b0\b", status, re.MULTILINE)
    assert agent.stop() == 0


INTERFACES = """
[agent]
confinement = "required"
[{kind}.pods]
interfaces = ["veth*"]
elements = ["evil"]
{more}
[element.evil]
type = "taken_over:TakenOver"
"""
TO_THE_OTHER = """
import socket
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for data in (b"before", b"attack", b"after"):
    end.sendto(data, ("10.5.0.2", 7))
"""


@pytest.mark.parametrize(("kind", "more"), [("tap", ""), ("inline", "udp_ports = [7]")], ids=["tap", "inline"])
def test_a_worker_at_interfaces_that_is_taken_over(netns: Namespace, tmp_path: Path, kind: str, more: str) -> None:
    first, _ = bridged(netns)
    agent = started(netns, tmp_path, INTERFACES.format(kind=kind, more=more))
    before, nft = traces(netns), tables(netns)
    first.run(PYTHON, "-c", TO_THE_OTHER)
    ended(agent)
    found = dict(re.findall(r"attempt (.+): (\w+)\s*$", agent.log, re.MULTILINE))
    assert sum(name.startswith("frame on ") for name in found) >= 10
    done = {name for name, how in found.items() if how not in (*REFUSED, "ENOENT")}
    assert "close what is open" in found
    # An inline worker judges by sending frames, on its own pair alone.
    sockets = {name.split()[2] for name in done if name.startswith("frame on ")}
    assert {name for name in done if kind == "tap" or not name.startswith(("frame on ", "close "))} == set()
    assert len(sockets) == (1 if kind == "inline" else 0)
    assert (traces(netns), tables(netns)) == (before, nft)
    agent.status()
    assert agent.stop() == 0


PROXY = """
[agent]
confinement = "required"
[proxy.main]
listen = ["127.0.0.1:15002"]
elements = ["evil"]
{more}
[element.evil]
type = "taken_over:TakenOverStream"
[rules.app]
proxy = "main"
hooks = ["output"]
tcp_ports = [11000]
"""
CONNECT = """
import socket
server = socket.create_server(("127.0.0.1", 11000))
client = socket.create_connection(("127.0.0.1", 11000))
end, _ = server.accept()
for data in (b"before", b"attack", b"after"):
    client.sendall(data)
    got = b""
    while len(got) < len(data):
        got += end.recv(100)
    assert got == data
again = socket.create_connection(("127.0.0.1", 11000))
again.sendall(b"again")
end, _ = server.accept()
assert end.recv(100) == b"again"
print("passed")
"""


@pytest.mark.parametrize("more", ["", "processes = 2", 'target = "localhost:11000"'], ids=["one", "two", "named target"])
def test_a_proxy_that_is_taken_over(netns: Namespace, tmp_path: Path, more: str) -> None:
    agent = started(netns, tmp_path, PROXY.format(more=more))
    before, nft = saved(netns), tables(netns)
    assert "passed" in netns.run(PYTHON, "-c", CONNECT).stdout
    ended(agent)
    found = dict(re.findall(r"attempt (.+): (\w+)\s*$", agent.log, re.MULTILINE))
    assert len(found) > 60
    # A name is asked for: sockets for datagrams, and a thread; clone3(2) is not known there, so that clone(2) is used.
    allowed = {"socket AF_INET", "socket AF_INET6", "clone3"} if "target" in more else set()
    done = {name: how for name, how in found.items() if how not in REFUSED and name not in allowed}
    assert done == {}
    assert (saved(netns), tables(netns)) == (before, nft)
    assert agent.stop() == 0


def test_check_and_status_show_who_has_an_exemption(netns: Namespace, tmp_path: Path) -> None:
    # A folder that every user can reach.
    folder = Path(tempfile.mkdtemp(prefix="captures-"))
    folder.chmod(0o777)
    config = QUEUE.format(confinement="available", elements='"files"')
    config += f'[element.files]\ntype = "pcap"\ndirectory = "{folder}"\n'
    agent = started(netns, tmp_path, config)
    exempt = f"queue main: files writes {folder}"
    assert agent.status()["confinement"]["exemptions"] == [exempt]
    assert agent.status()["confinement"]["by"][0] == "seccomp"
    assert exempt in " ".join(agent.verb("check").stdout.split())
    assert "seccomp" in agent.verb("status").stdout
    assert "passed" in netns.run(PYTHON, "-c", SEND.format(payloads=[b"one", b"two"])).stdout
    assert agent.stop() == 0
    assert [path.stat().st_size > 100 for path in folder.glob("*.pcapng")] == [True]
    shutil.rmtree(folder)
