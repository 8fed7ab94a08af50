"""`replay`: that it says of a capture what the agent did with the same packets, and what another configuration would do."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, until
from containers import bridged
from namespace import Namespace
from openings import client_hello, dns_query
from resident import Resident

from nfq_agent.capture.recording import packets
from nfq_agent.cli.judging import Judging, key_of
from nfq_agent.cli.sighting import sighting
from nfq_agent.config.file import load
from nfq_agent.packet import PacketError

CONFIG = """
[queue.main]
num = 7
mode = "{mode}"
elements = ["dpi", "allow", "capture"]
default = "drop"
[rules.web]
queue = "main"
tcp_ports = [8080]
hooks = ["forward"]
[element.allow]
type = "policy"
default = "drop"
[[element.allow.rule]]
action = "accept"
http_host = [{names}]
[element.capture]
type = "pcap"
directory = "{folder}"
"""


def written(path: Path, folder: Path, *names: str, mode: str = "enforce") -> Path:
    path.write_text(CONFIG.format(mode=mode, folder=folder, names=", ".join(f'"{name}"' for name in names)))
    return path


def replayed(netns: Namespace, *argv: str, code: int = 0) -> dict[str, Any]:
    done = netns.run(*COMMAND, "replay", *argv, "--json", check=False)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_replay_says_what_the_agent_did(netns: Namespace, tmp_path: Path) -> None:
    # The worker is another user, and pytest keeps its own folders to itself.
    netns.shell("mkdir -m 777 /run/captured")
    folder = Path("/run/captured")
    same = written(tmp_path / "same.toml", folder, "www.free.test", "api.free.test")
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, same.read_text()).ready()
    for name, answer in [("www.free.test", "200"), ("bad.test", "000"), ("api.free.test", "200"), ("www.free.test", "200")]:
        assert first.get("10.5.0.2", name, seconds=30 if answer == "200" else 1.5) == answer
    assert agent.stop() == 0
    (capture,) = netns.shell("ls /run/captured/*.pcapng").split()

    told = replayed(netns, capture, "--config", str(same))
    assert told["changed"] == []
    assert not told["drops_more"]
    assert sorted((flow["name"], flow["before"], flow["after"]) for flow in told["flows"]) == [
        ("api.free.test", "accept", "accept"),
        ("bad.test", "drop", "drop"),
        ("www.free.test", "accept", "accept"),
        ("www.free.test", "accept", "accept"),
    ]
    # What would be dropped that passed is said, and is the exit code of a gate in front of a roll-out.
    fewer = written(tmp_path / "fewer.toml", folder, "www.free.test")
    told = replayed(netns, capture, "--config", str(fewer), code=4)
    assert [(flow["name"], flow["before"], flow["after"]) for flow in told["changed"]] == [("api.free.test", "accept", "drop")]
    # The same by two configurations, without the comments of an agent.
    plain = tmp_path / "plain.pcap"
    netns.run("tshark", "-r", capture, "-w", str(plain), "-F", "pcap")
    told = replayed(netns, str(plain), "--config", str(fewer), "--against", str(same), code=4)
    assert [flow["name"] for flow in told["changed"]] == ["api.free.test"]
    # More is allowed: no reason to stop a roll-out.
    told = replayed(netns, str(plain), "--config", str(same), "--against", str(fewer))
    assert [(flow["before"], flow["after"]) for flow in told["changed"]] == [("drop", "accept")]
    # In monitor mode nothing is dropped; what would be is said.
    watching = written(tmp_path / "watching.toml", folder, "www.free.test", mode="monitor")
    told = replayed(netns, str(plain), "--config", str(watching))
    assert sorted(flow["after"] for flow in told["flows"]) == ["accept", "accept", "would drop", "would drop"]
    told = replayed(netns, str(plain), "--config", str(watching), "--enforce")
    assert sorted(flow["after"] for flow in told["flows"]) == ["accept", "accept", "drop", "drop"]


def test_what_a_person_reads(netns: Namespace, tmp_path: Path) -> None:
    config = written(tmp_path / "new.toml", tmp_path, "www.free.test")
    text = tmp_path / "note.txt"
    text.write_text("no capture")
    done = netns.run(*COMMAND, "replay", str(text), "--config", str(config), check=False)
    assert (done.returncode, done.stderr) == (1, f"nfq-agent: {text}: not a capture; allowed: pcap and pcapng files\n")
    done = netns.run(*COMMAND, "replay", str(tmp_path / "none"), "--config", str(config), check=False)
    assert (done.returncode, done.stderr) == (1, f"nfq-agent: {tmp_path}/none: No such file or directory\n")


TAP = """
[tap.pods]
interfaces = ["veth1"]
tcp_ports = [8080]
elements = ["dpi", "verdicts", "capture"]
[queue.main]
num = 7
mode = "monitor"
elements = ["dpi", "verdicts"]
[rules.web]
queue = "main"
tcp_ports = [8080]
hooks = ["prerouting", "postrouting"]
[element.verdicts]
type = "policy"
default = "accept"
rule = [ { action = "drop", http_host = ["*.blocked.test"] } ]
[element.capture]
type = "pcap"
directory = "/run/captured"
"""


def test_a_tap_and_a_replay_of_its_capture_would_drop_the_same_packets(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("mkdir -m 777 /run/captured; echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, TAP).ready()
    for number in range(5):
        assert first.get("10.5.0.2", "www.blocked.test" if number % 2 else "www.free.test") == "200"
        assert first.get("fd05::2", f"{number}.blocked.test") == "200"

    def counted() -> dict[str, int]:
        found: dict[str, int] = agent.status()["taps"][0]["counters"]
        return found

    # A block of the ring is read 40 ms late at most.
    until(lambda: counted()["judged"] >= 100, "the ten connections are seen")
    counts = [counted()]

    def quiet() -> bool:
        time.sleep(0.3)
        counts.append(counted())
        return counts[-1] == counts[-2]

    until(quiet, "nothing more comes")
    seen = counts[-1]
    assert agent.stop() == 0
    (capture,) = netns.shell("ls /run/captured/*.pcapng").split()
    told = netns.run(*COMMAND, "replay", capture, "--config", str(agent.config), "--json", check=False)
    replay = json.loads(told.stdout)
    assert seen["judged"] == replay["packets"]
    assert seen["would_drop"] > 0
    assert sum(flow["after"] == "would drop" for flow in replay["flows"]) == 7
    assert seen["would_drop"] == replay["verdicts"]["would drop"]
    # The capture says what would have been dropped, and nothing has changed since.
    assert (replay["changed"], told.returncode) == ([], 0)


ALL = """
[queue.main]
num = 7
mode = "{mode}"
elements = ["dpi", "allow", "capture"]
[rules.all]
queue = "main"
hooks = [{hooks}]
all = true
[element.allow]
type = "policy"
default = "drop"
rule = [
  {{ action = "accept", tls_sni = "*.good.test" }},
  {{ action = "accept", http_host = "*.good.test" }},
  {{ action = "accept", dns_name = "*.good.test" }},
  {{ action = "reject", dport = 25 }},
  {{ action = "accept", protocol = ["icmp", "icmpv6"] }},
  {{ action = "accept", dport = 5000 }},
]
[element.capture]
type = "pcap"
directory = "/run/captured"
"""


def answering(state: dict[str, Any]) -> None:
    """Serve on some ports: each piece that comes is answered."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def accept(listener: socket.socket) -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        for port in (25, 80, 443, 8080):
            listener = state[f"{host} {port}"] = socket.create_server((host, port), family=family)
            threading.Thread(target=accept, args=(listener,), daemon=True).start()


def talk(_: dict[str, Any], host: str) -> None:
    """Traffic of many kinds: names that are allowed and not, in one piece and in several, and what has no name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    good, bad = client_hello("a.good.test"), client_hello("bad.test")
    get = [f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode() for name in ("a.good.test", "evil.test")]
    said: list[tuple[int, list[bytes]]] = [
        (443, [good]), (443, [bad]), (443, pieces(good, 50)), (443, pieces(bad, 50)), (443, get[:1]), (80, get[:1] * 2),
        (80, get), (80, pieces(get[1], 3)), (25, [b"EHLO x\r\n"]), (8080, [os.urandom(100)] * 3), (9999, [b"x"]),
    ]  # fmt: skip
    for port, parts in said:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 5.0) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts:
                connection.sendall(part)
                # An answer comes, or the flow is denied.
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    connection.recv(1000)
    for port, data in ((53, dns_query("x.good.test")), (53, dns_query("bad.test")), (443, bytes(1200)), (5000, bytes(9000))):
        with socket.socket(family, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(data, (host, port))
            sender.sendto(data, (host, port))
    for number in (47, 132):
        with socket.socket(family, socket.SOCK_RAW, number) as raw, contextlib.suppress(OSError):
            raw.sendto(bytes(60), (host, 0))


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def differing(capture: Path, config: Path) -> Iterator[str]:
    """The packets of a capture with another verdict than the agent gave them."""
    judging = Judging(load(config), enforce=False, every=False)
    with capture.open("rb") as stream:
        for recorded in packets(stream):
            where, key = sighting(recorded), key_of(recorded)
            assert where is not None
            found = judging.again(recorded, key)
            with contextlib.suppress(PacketError):
                found = judging.judge(recorded, where, key).outcome if found is None else found
                if found is not where.outcome:
                    yield f"{recorded.time} {recorded.comment}: {found.word}"


@pytest.mark.parametrize(
    ("hooks", "mode"),
    [('"output"', "enforce"), ('"input", "output"', "enforce"), ('"prerouting", "postrouting"', "monitor")],
    ids=["out", "both ways", "watching"],
)
def test_each_packet_gets_the_verdict_that_the_agent_gave(
    netns: Namespace, tmp_path: Path, resident: Resident, hooks: str, mode: str
) -> None:
    netns.shell("mkdir -m 777 /run/captured")
    agent = Agent(netns, tmp_path, ALL.format(hooks=hooks, mode=mode)).ready()
    resident.call(answering)
    for host in ("127.0.0.1", "::1"):
        resident.call(talk, host)
    assert agent.stop() == 0
    (capture,) = netns.shell("ls /run/captured/*.pcapng").split()
    # The folder is in the namespace alone.
    kept = tmp_path / "seen.pcapng"
    netns.run("cp", capture, str(kept))
    assert list(differing(kept, agent.config)) == []
    told = replayed(netns, capture, "--config", str(agent.config))
    assert told["changed"] == []
    judged = {(flow["before"], flow["name"]) for flow in told["flows"]}
    denied = "drop" if mode == "enforce" else "would drop"
    assert {("accept", "a.good.test"), (denied, "evil.test"), (denied, "bad.test"), ("accept", None), (denied, None)} <= judged
