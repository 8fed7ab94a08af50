"""`[tap]`: a real agent beside real servers in containers; it sees what there is, says what it would drop, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, until
from containers import Container, bridged, packet_sockets, routed, traces
from namespace import Namespace

TAP = """
[tap.pods]
interfaces = ["veth*"]
exclude = ["vethmgmt"]
elements = ["dpi", "verdicts"]
{more}
[element.verdicts]
type = "policy"
default = "accept"
rule = [ {{ action = "drop", http_host = ["*.blocked.test"] }}, {{ action = "drop", dport = 7 }} ]
"""


def tap_of(agent: Agent) -> dict[str, Any]:
    (found,) = agent.status()["taps"]
    return {**found, **found["counters"]}


def interface(agent: Agent, name: str) -> dict[str, int]:
    (found,) = [each for each in tap_of(agent)["interfaces"] if each["name"] == name]
    return dict(found["counters"])


@pytest.mark.parametrize("layout", ["bridged", "routed"])
def test_a_denied_name_is_seen_and_passes(netns: Namespace, tmp_path: Path, layout: str) -> None:
    first, second = bridged(netns) if layout == "bridged" else routed(netns)
    addresses = ("10.5.0.2", "fd05::2") if layout == "bridged" else ("10.6.2.2", "fd06:2::2")
    second.serve()
    before = traces(netns)
    agent = Agent(netns, tmp_path, TAP.format(more="")).ready()
    # It writes no rule and no qdisc.
    assert traces(netns) == before
    for address in addresses:
        assert first.get(address, "www.free.test") == "200"
    until(lambda: interface(agent, "veth1")["judged"] >= 20, "both requests were seen")
    assert tap_of(agent)["would_drop"] == 0
    for address in addresses:
        assert first.get(address, "www.blocked.test") == "200"
    until(lambda: interface(agent, "veth2")["would_drop"] > 5, "the denied name was seen")
    tap = tap_of(agent)
    assert (tap["lost"], tap["errors"], tap["malformed"]) == (0, 0, 0)
    assert ", http www.blocked.test, by " in agent.log
    assert agent.stop() == 0
    assert traces(netns) == before
    assert packet_sockets(netns) == 0


def test_interfaces_are_followed(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    agent = Agent(netns, tmp_path, TAP.format(more="tcp_ports = [8080]")).ready()
    assert [each["name"] for each in tap_of(agent)["interfaces"]] == ["veth1", "veth2"]
    third = Container(netns, 3)
    with third:
        netns.run("ip", "link", "set", "veth3", "master", "br0", "up")
        third.run("ip", "address", "add", "10.5.0.3/24", "dev", "eth0")
        third.run("ip", "link", "set", "eth0", "up")
        until(lambda: len(tap_of(agent)["interfaces"]) == 3, "the third is seen")
        third.serve()
        assert first.get("10.5.0.3", "www.blocked.test") == "200"
        until(lambda: interface(agent, "veth3")["would_drop"], "its denied name is seen")
    until(lambda: len(tap_of(agent)["interfaces"]) == 2, "it is gone")
    # What it counted is not forgotten.
    assert tap_of(agent)["judged"] > sum(each["counters"]["judged"] for each in tap_of(agent)["interfaces"])
    netns.run("ip", "link", "set", "veth2", "name", "vethmgmt")
    until(lambda: [each["name"] for each in tap_of(agent)["interfaces"]] == ["veth1"], "a name that is left out")
    netns.run("ip", "link", "set", "vethmgmt", "name", "veth7")
    until(lambda: len(tap_of(agent)["interfaces"]) == 2, "and back")
    netns.run("ip", "link", "set", "veth1", "down")
    netns.run("ip", "link", "set", "veth1", "up")
    second.serve()
    until(lambda: first.get("10.5.0.2") == "200", "the port forwards again")
    until(lambda: interface(agent, "veth1")["judged"] > 5, "a downed interface is seen again")
    assert agent.stop() == 0


def test_a_hundred_interfaces_come_and_go(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, TAP.format(more="ring = 262144")).ready()
    batch = "".join(f"link add veth{n} type veth peer name peer{n}\nlink set veth{n} up\n" for n in range(100))
    netns.run("ip", "-batch", "-", input=batch)
    until(lambda: len(tap_of(agent)["interfaces"]) == 100, "all are seen")
    assert packet_sockets(netns) == 100
    netns.run("ip", "-batch", "-", input="".join(f"link del veth{n}\n" for n in range(100)))
    until(lambda: not tap_of(agent)["interfaces"], "all are gone")
    until(lambda: packet_sockets(netns) == 0, "no socket is left")
    assert agent.stop() == 0


@pytest.mark.parametrize("victim", ["supervisor", "worker"])
def test_nothing_is_left_after_a_kill(netns: Namespace, tmp_path: Path, victim: str) -> None:
    first, second = bridged(netns)
    second.serve()
    before = traces(netns)
    agent = Agent(netns, tmp_path, TAP.format(more="")).ready()
    worker = tap_of(agent)["pid"]
    if victim == "supervisor":
        agent.kill()
        until(lambda: packet_sockets(netns) == 0, "all is gone")
        assert traces(netns) == before
        return
    os.kill(worker, signal.SIGKILL)
    until(lambda: tap_of(agent)["pid"] not in (None, worker), "another worker watches")
    assert first.get("10.5.0.2", "www.blocked.test") == "200"
    until(lambda: tap_of(agent)["would_drop"], "and sees")
    os.kill(tap_of(agent)["pid"], signal.SIGSTOP)
    assert first.get("10.5.0.2", "www.blocked.test") == "200"
    until(lambda: "made no progress" in agent.log, "a stopped worker is replaced")
    assert agent.stop() == 0
    assert traces(netns) == before


# Sends one packet or frame: argv: interface, frame in hex.
RAW = "import socket, sys; s = socket.socket(17, 3); s.bind((sys.argv[1], 0)); s.send(bytes.fromhex(sys.argv[2]))"


def test_tags_fragments_and_headers_are_right_or_counted(netns: Namespace, tmp_path: Path) -> None:
    first, _ = bridged(netns)
    agent = Agent(netns, tmp_path, TAP.format(more="udp_ports = [7]")).ready()

    def sent(frame: bytes) -> None:
        first.run(sys.executable, "-c", RAW, "eth0", frame.hex())

    def counts() -> tuple[int, int, int, int]:
        found = interface(agent, "veth1")
        return found["judged"], found["would_drop"], found["fragments"], found["unreadable"]

    macs = b"\x02\0\0\0\0\x09" + b"\x02\0\0\0\0\x08"
    datagram = b"\x30\x39\x00\x07\x00\x0c\x00\x00data"

    def v4(payload: bytes, place: int = 0) -> bytes:
        return (
            b"\x45\0"
            + (20 + len(payload)).to_bytes(2, "big")
            + b"\0\1"
            + place.to_bytes(2, "big")
            + b"\x40\x11\0\0"
            + b"\x0a\x05\0\1\x0a\x05\0\2"
            + payload
        )

    sent(macs + b"\x08\0" + v4(datagram))
    until(lambda: counts() == (1, 1, 0, 0), "a plain datagram")
    # One tag and two, in the frame as the container sends it.
    sent(macs + b"\x81\0\0\x05" + b"\x08\0" + v4(datagram))
    until(lambda: counts() == (2, 2, 0, 0), "a tagged datagram")
    sent(macs + b"\x88\xa8\0\x05\x81\0\0\x06" + b"\x08\0" + v4(datagram))
    until(lambda: counts() == (3, 3, 0, 0), "a datagram with two tags")
    sent(macs + b"\x81\0\0\x05" + b"\x08\0" + v4(b"\x30\x39\x00\x08\x00\x0c\x00\x00data"))
    sent(macs + b"\x08\0" + v4(b"x" * 16, 0x2001))
    until(lambda: counts() == (3, 3, 1, 0), "another port with a tag, and a later fragment")
    sent(macs + b"\x81\0\0\x05\x88\xa8\0\1" + b"\x08\x06" + bytes(28))
    until(lambda: counts() == (3, 3, 1, 1), "ARP behind two tags")
    v6 = b"\x60\0\0\0" + (8 + len(datagram)).to_bytes(2, "big") + b"\x3c\x40" + bytes(15) + b"\1" + bytes(15) + b"\2"
    sent(macs + b"\x86\xdd" + v6 + b"\x11\0\1\4\0\0\0\0" + datagram)
    until(lambda: counts() == (4, 4, 1, 1), "IPv6 with destination options")
    sent(macs + b"\x86\xdd" + v6 + b"\x11\0\1\4\0\0\0\0" + b"\x30\x39\x00\x08\x00\x0c\x00\x00data")
    sent(macs + b"\x08\0" + v4(datagram))
    until(lambda: counts() == (5, 5, 1, 1), "and one to another port is left out")
    assert agent.stop() == 0


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_large_segments_and_jumbo_frames_are_whole(netns: Namespace, tmp_path: Path, mtu: int) -> None:
    first, second = bridged(netns, mtu=mtu)
    second.serve(8_000_000)
    netns.run("install", "-d", "-m", "777", "/run/captured")
    agent = Agent(
        netns, tmp_path, '[tap.pods]\ninterfaces = ["veth1"]\ntcp_ports = [8080]\nring = "100MB"\nelements = ["pcap"]\n'
        '[element.pcap]\ndirectory = "/run/captured"\n',
    ).ready()  # fmt: skip
    assert first.get("10.5.0.2") == "200"
    until(lambda: interface(agent, "veth1")["judged"] > 100, "the transfer was seen")
    assert agent.stop() == 0, agent.log
    (captured,) = netns.shell("echo /run/captured/*").split()
    lengths = netns.run(
        "tshark", "-r", captured, "-d", "tcp.port==8080,http", "-Y", "http.response", "-T", "fields",
        "-e", "http.content_length", "-e", "http.file_data",
    ).stdout  # fmt: skip
    assert lengths.strip().startswith("8000000"), (lengths[:200], agent.log)
    longest = netns.run("tshark", "-r", captured, "-T", "fields", "-e", "frame.len").stdout.split()
    assert max(map(int, longest)) > mtu + 100


# A listener report (MLDv2) as every host sends it, to all multicast routers: ICMPv6 behind a hop-by-hop header.
REPORT = (
    b"\x33\x33\0\0\0\x16\x02\0\0\0\0\x07\x86\xdd\x60\0\0\0\0\x24\0\1\xfe\x80" + bytes(13) + b"\7\xff\2" + bytes(13) + b"\x16"
    b"\x3a\0\5\2\0\0\1\0\x8f\0\0\0\0\0\0\1\4\0\0\0\xff\2" + bytes(13) + b"\x6a"
)
# Sends 1,000 datagrams for each line that it reads, and says so.
FLOOD = """
import socket, sys
s = socket.socket(2, 2)
s.connect(("10.5.0.99", 9))
for _ in sys.stdin:
    for _ in range(1000): s.send(bytes(1000))
    print("sent", flush=True)
"""


class Flood:
    """Datagrams from a container to an address that no host has, 1,000 for each call."""

    def __init__(self, container: Container) -> None:
        container.run("ip", "neigh", "add", "10.5.0.99", "lladdr", "02:00:00:00:00:09", "dev", "eth0")
        flood = container.start(sys.executable, "-c", FLOOD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert flood.stdin is not None
        assert flood.stdout is not None
        self._lines, self._said = flood.stdin, flood.stdout

    def begin(self) -> None:
        self._lines.write(b"more\n")
        self._lines.flush()

    def wait(self) -> None:
        """Until what was begun is sent."""
        assert self._said.readline() == b"sent\n"


def judged_or_lost(agent: Agent) -> int:
    tap = tap_of(agent)
    return int(tap["judged"] + tap["lost"])


def test_what_a_full_ring_loses_is_counted(netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "support"))
    first, second = bridged(netns)
    agent = Agent(
        netns, tmp_path, '[tap.pods]\ninterfaces = ["veth1"]\nudp_ports = [9]\nring = 262144\nelements = ["slow"]\n'
        '[element.slow]\ntype = "sleeping:Sleeper"\nseconds = 0.002\n',
    ).ready()  # fmt: skip
    flood = Flood(first)
    sent = 0
    while interface(agent, "veth1")["lost"] < 1000:
        flood.begin()
        # Frames that are not chosen, while the ring is full.
        second.run(sys.executable, "-c", RAW, "eth0", REPORT.hex())
        flood.wait()
        sent += 1000
    until(lambda: judged_or_lost(agent) >= sent, "each frame was judged or lost")
    assert judged_or_lost(agent) == sent
    agent.configure('[tap.pods]\ninterfaces = ["veth1"]\nudp_ports = [9]\n')
    agent.verb("reload")
    assert judged_or_lost(agent) == sent, agent.log
    assert agent.stop() == 0


def test_a_worker_without_a_processor_loses_no_burst(netns: Namespace, tmp_path: Path) -> None:
    first, _ = bridged(netns)
    # Whole packets are copied, since a policy of names reads them: 5 MB, which 2 MB of ring do not hold.
    agent = Agent(
        netns, tmp_path, '[tap.pods]\ninterfaces = ["veth1"]\nudp_ports = [9]\nelements = ["dpi", "verdicts"]\n'
        '[element.verdicts]\ntype = "policy"\nrule = [ { action = "drop", tls_sni = ["*.blocked.test"] } ]\n',
    ).ready()  # fmt: skip
    flood = Flood(first)
    flood.begin()
    flood.wait()
    worker = tap_of(agent)["pid"]
    os.kill(worker, signal.SIGSTOP)
    for _ in range(4):
        flood.begin()
        flood.wait()
    os.kill(worker, signal.SIGCONT)
    until(lambda: judged_or_lost(agent) == 5000, "each frame was judged or lost")
    assert tap_of(agent)["judged"] == 5000
    assert tap_of(agent)["pid"] == worker
    assert agent.stop() == 0


BAD = [
    ("no-interface", "[tap.t]\ninterfaces = []\n", "tap.t.interfaces"),
    ("unknown-key", '[tap.t]\ninterfaces = ["veth*"]\nsnapp = 1\n', "did you mean 'snap'"),
    ("rewriter", '[tap.t]\ninterfaces = ["veth*"]\nelements = ["rewriting:Rewriter"]\n', "rewrites packets"),
    ("offload", '[tap.t]\ninterfaces = ["v"]\nelements = ["offload"]\n'
     '[element.offload]\nmark = "0x4e000000/0xff000000"\n', "a tap only watches"),
    ("ports", f'[tap.t]\ninterfaces = ["v"]\ntcp_ports = [{", ".join(map(str, range(1, 200)))}]\n', "199 ports and ranges"),
    ("unknown-element", '[tap.t]\ninterfaces = ["v"]\nelements = ["lgo"]\n', "did you mean 'log'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_what_a_tap_can_not_do_is_refused(netns: Namespace, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    done = netns.run(
        "env", f"PYTHONPATH={Path(__file__).parent.parent / 'support'}", *COMMAND, "check", "--config", str(path), check=False
    )
    assert done.returncode == 78
    assert said in done.stderr


def test_a_host_that_can_not_serve_it_says_what_is_missing(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "tap.toml"
    path.write_text('[tap.t]\ninterfaces = ["veth*"]\n')
    for verb in ("check", "run"):
        done = netns.run(
            "setpriv",
            "--bounding-set=-net_raw",
            "--inh-caps=-net_raw",
            *COMMAND,
            verb,
            "--config",
            str(path),
            check=False,
            timeout=60,
        )
        assert done.returncode == 78
        assert re.search(r"tap\.t: .*CAP_NET_RAW", done.stderr)


def test_plan_names_the_interfaces(netns: Namespace, tmp_path: Path) -> None:
    netns.run("ip", "link", "add", "veth1", "type", "veth", "peer", "name", "other")
    path = tmp_path / "tap.toml"
    path.write_text('[tap.t]\ninterfaces = ["veth*"]\n')
    done = netns.run(*COMMAND, "plan", "--config", str(path), check=False)
    assert "tap.t takes these interfaces, and others that match later: veth1\n" in done.stdout
