"""`[inline]`: a real agent judges what netfilter does not see, and the kernel bypasses it in every way that it can end."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from containers import Container, bridged, interfaces, routed, traces
from inlined import all_judged, attached, config, gone, inline_of
from namespace import PATIENCE, Namespace

from nfq_agent.host import pairs

SUPPORT = str(Path(__file__).parent.parent / "support")


@pytest.mark.parametrize("layout", ["bridged", "routed"])
def test_a_denied_name_is_dropped(netns: Namespace, tmp_path: Path, layout: str) -> None:
    first, second = bridged(netns) if layout == "bridged" else routed(netns)
    addresses = ("10.5.0.2", "fd05::2") if layout == "bridged" else ("10.6.2.2", "fd06:2::2")
    second.serve()
    before = traces(netns)
    agent = Agent(netns, tmp_path, config()).ready()
    for address in addresses:
        assert first.get(address, "www.free.test") == "200"
        assert first.get(address, "www.blocked.test", seconds=1.5) == "000"
        # It does not judge another port.
        assert first.get(address, "www.blocked.test", port=9090) == "200"
    inline = all_judged(agent)
    assert inline["dropped"] >= 2
    assert (inline["lost"], inline["past_stale"], inline["past_full"], inline["errors"]) == (0, 0, 0, 0)
    assert agent.stop() == 0
    assert traces(netns) == before
    assert gone(netns)
    assert first.get(addresses[0], "www.blocked.test") == "200"


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("address", ["10.5.0.2", "fd05::2"])
def test_bulk_arrives_whole(netns: Namespace, tmp_path: Path, mtu: int, address: str) -> None:
    first, second = bridged(netns, mtu=mtu)
    second.serve(16_000_000)
    agent = Agent(netns, tmp_path, config()).ready()
    url = f"http://[{address}]:8080/" if ":" in address else f"http://{address}:8080/"
    digest = first.shell(f"curl -s -m 90 {url} | sha256sum").split()[0]
    assert digest == hashlib.sha256(b"0123456789abcdef" * 1_000_000).hexdigest()
    inline = inline_of(agent)
    assert inline["judged"] > 300
    assert inline["lost"] == 0
    assert agent.stop() == 0


def test_a_reject_needs_no_address_of_the_host(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, config(action="reject")).ready()
    for address in ("10.5.0.2", "fd05::2"):
        where = f"[{address}]" if ":" in address else address
        done = first.run("curl", "-sS", "-m", "30", "-H", "Host: www.blocked.test", f"http://{where}:8080/", check=False)
        assert "reset" in done.stderr, done.stderr
    # The server's connection is reset, too.
    until(lambda: "ESTAB" not in second.run("ss", "-Htn", "sport", "=", ":8080").stdout, "no connection is left at the server")
    assert agent.stop() == 0


# Asks by UDP; argv: address, port. Prints what came of it.
ASK = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
asking = socket.socket(family, socket.SOCK_DGRAM)
asking.settimeout(30)
asking.connect((sys.argv[1], int(sys.argv[2])))
asking.send(b"x" * int(sys.argv[3]))
try:
    print(asking.recv(10))
except OSError as error:
    print(type(error).__name__)
"""


def test_a_rejected_datagram_is_answered_on_a_bridge_without_an_address(netns: Namespace, tmp_path: Path) -> None:
    first, _ = bridged(netns)
    ports = '[element.ports]\ntype = "policy"\ndefault = "accept"\nrule = [ { action = "reject", protocol = "udp", dport = 7 } ]'
    agent = Agent(netns, tmp_path, config('"ports"', more=ports)).ready()
    for address in ("10.5.0.2", "fd05::2"):
        # No process listens, so another port is refused by the container itself.
        for port, size in ((7, 10), (7, 1400), (8, 10)):
            assert first.run(sys.executable, "-c", ASK, address, str(port), str(size)).stdout == "ConnectionRefusedError\n"
    inline = inline_of(agent)
    assert (inline["dropped"], inline["errors"], inline["lost"]) == (4, 0, 0)
    assert agent.stop() == 0


@pytest.mark.parametrize("elements", ['"ports"', ""])
def test_what_needs_no_look_into_packets_is_counted_too(netns: Namespace, tmp_path: Path, elements: str) -> None:
    first, second = bridged(netns)
    second.serve()
    ports = (
        '[element.ports]\ntype = "policy"\ndefault = "accept"\nrule = [ { action = "drop", dst = ["10.5.0.2"], dport = 8080 } ]'
    )
    agent = Agent(netns, tmp_path, config(elements, more="\n" + ports)).ready()
    assert first.get("10.5.0.2", seconds=1.5 if elements else 30) == ("000" if elements else "200")
    assert first.get("fd05::2") == "200"
    inline = all_judged(agent)
    assert inline["judged"] > 5
    assert (inline["dropped"] > 0) is bool(elements)
    assert (inline["errors"], inline["lost"]) == (0, 0)
    assert agent.stop() == 0


def test_monitor_mode_lets_pass(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, config(more='mode = "monitor"')).ready()
    assert first.get("10.5.0.2", "www.blocked.test") == "200"
    inline = inline_of(agent)
    assert inline["would_drop"] > 0
    assert inline["dropped"] == 0
    assert agent.stop() == 0


def test_what_is_decided_leaves_for_the_kernel(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    second.serve(64_000_000)
    agent = Agent(netns, tmp_path, config('"dpi", "verdicts", "offload"')).ready()
    assert first.get("10.5.0.2", "www.blocked.test", seconds=1.5) == "000"
    assert first.get("10.5.0.2", "www.free.test", seconds=90) == "200"
    inline = inline_of(agent)
    assert inline["decided_dropped"] + inline["decided_accepted"] > 0, inline
    assert agent.stop() == 0


PING = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 7))
count, rate = int(sys.argv[2]), float(sys.argv[3])
begun = time.monotonic()
for number in range(count):
    s.send(number.to_bytes(4, "big"))
    ahead = begun + number / rate - time.monotonic()
    if ahead > 0: time.sleep(ahead)
"""
SINK = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
s.bind(("", 7))
print("ready", flush=True)
got, latest, gap = 0, 0.0, 0.0
while True:
    try: s.recv(100)
    except TimeoutError: break
    now = time.monotonic()
    if latest: gap = max(gap, now - latest)
    latest = now
    got += 1
    # The first one comes once its sender has started.
    if got == 1: s.settimeout(float(sys.argv[1]))
print(got, gap, flush=True)
"""


class Stream:
    """Datagrams from one container to another, counted where they arrive."""

    def __init__(self, source: Container, sink: Container, count: int, rate: float, quiet: float = 3) -> None:
        self.sink = sink.start(sys.executable, "-c", SINK, str(quiet), stdout=-1, text=True)
        assert self.sink.stdout is not None
        self.sink.stdout.readline()
        self.source = source.start(sys.executable, "-c", PING, "10.5.0.2", str(count), str(rate))

    def end(self) -> tuple[int, float]:
        """How many arrived, and the longest time without one, in seconds."""
        assert self.source.wait(timeout=PATIENCE) == 0
        assert self.sink.stdout is not None
        got, gap = self.sink.stdout.readline().split()
        return int(got), float(gap)


@pytest.mark.parametrize(
    ("victim", "how"), [("supervisor", "KILL"), ("worker", "KILL"), ("worker", "STOP"), ("supervisor", "STOP")]
)
def test_traffic_continues_within_a_second(netns: Namespace, tmp_path: Path, victim: str, how: str) -> None:
    first, second = bridged(netns)
    before = traces(netns)
    agent = Agent(netns, tmp_path, config(more='patience = "300ms"')).ready()
    worker = inline_of(agent)["pid"]
    stream = Stream(first, second, 6000, 1000)
    time.sleep(1)
    pid = worker if victim == "worker" else agent.process.pid
    os.kill(pid, getattr(signal, f"SIG{how}"))
    if victim == "supervisor" and how == "STOP":
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
    got, gap = stream.end()
    assert gap < 1.5
    # What the dead worker had read is lost, nothing else.
    assert got >= 6000 - 130, got
    if victim == "supervisor" and how == "KILL":
        until(lambda: gone(netns), "nothing is left")
        assert traces(netns) == before
        return
    until(lambda: inline_of(agent)["pid"] is not None, "a worker serves")
    assert agent.stop() == 0
    assert gone(netns)


def test_a_slow_element_is_passed_by_and_all_is_counted(
    netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", SUPPORT)
    first, second = bridged(netns)
    agent = Agent(netns, tmp_path, config('"slow"', 'max_waiting = 64\npatience = "5s"')).ready()
    # As fast as it can be sent, which is faster than the element.
    stream = Stream(first, second, 3000, 1e6)
    got, _ = stream.end()
    inline = all_judged(agent)
    # At the first interface and at the second.
    assert inline["judged"] + inline["past_full"] + inline["past_stale"] == 6000, inline
    assert inline["past_full"] > 1000
    assert (got, inline["lost"]) == (3000, 0)
    assert agent.stop() == 0


def test_nothing_is_lost_over_starts_reloads_and_stops(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    # Where a frame comes back to the host, its mark is seen here, unless the program has taken it off.
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    netns.run("iptables-legacy", "-t", "mangle", "-A", "PREROUTING", "-m", "mark", "!", "--mark", "0")
    agent = Agent(netns, tmp_path, config()).ready()
    stream = Stream(first, second, 60_000, 5000, quiet=5)
    for number in range(4):
        agent.configure(config(more=f"max_waiting = {1000 + number}"))
        agent.verb("reload")
        assert agent.stop() == 0
        agent.start()
        agent.ready()
    got, _ = stream.end()
    assert got == 60_000
    assert agent.stop() == 0
    rules = netns.run("iptables-legacy", "-t", "mangle", "-S", "PREROUTING", "-v").stdout
    (counted,) = [line for line in rules.splitlines() if "--mark 0x0" in line]
    assert counted.endswith("-c 0 0")


def test_a_hundred_interfaces_come_and_go(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, config()).ready()
    netns.run("ip", "-batch", "-", input="".join(f"link add veth{n} type veth peer name peer{n}\n" for n in range(100)))
    until(lambda: len(inline_of(agent)["interfaces"]) == 100, "all are taken")
    assert attached(netns) == 202
    netns.run("ip", "-batch", "-", input="".join(f"link del veth{n}\n" for n in range(100)))
    until(lambda: not inline_of(agent)["interfaces"], "all are gone")
    assert agent.stop() == 0
    assert gone(netns)


def test_what_a_killed_agent_left_is_removed(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, config()).ready()
    worker = inline_of(agent)["pid"]
    os.kill(agent.process.pid, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    agent.kill()
    assert any(name.startswith("nfq") for name in interfaces(netns))
    assert "removed 1 interface pair" in agent.verb("remove").stdout
    assert gone(netns)


@pytest.mark.parametrize("how", ["start", "remove"])
def test_a_pair_whose_maker_was_killed_before_it_had_its_alias_is_removed(netns: Namespace, tmp_path: Path, how: str) -> None:
    first, second = pairs.names("nfq-agent:default:pods")
    netns.run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
    # Of another instance, which may be making it.
    other, _ = pairs.names("nfq-agent:other:pods")
    netns.run("ip", "link", "add", other, "type", "veth", "peer", "name", "foreign")
    if how == "start":
        assert Agent(netns, tmp_path, config()).ready().stop() == 0
    else:
        assert "removed 1 interface pair" in netns.run(*COMMAND, "remove").stdout
    assert not {first, second} & set(interfaces(netns))
    assert {other, "foreign"} <= set(interfaces(netns))


BAD = [
    ("closed", '[inline.t]\ninterfaces = ["v"]\nfail_open = false\n', "lets this traffic pass when the agent has ended"),
    ("rewriter", '[inline.t]\ninterfaces = ["v"]\nelements = ["rewriting:Rewriter"]\n', "rewrites packets"),
    ("patience", '[inline.t]\ninterfaces = ["v"]\npatience = "1ms"\n', "inline.t.patience"),
]


@pytest.mark.parametrize(("text", "said"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_what_an_inline_link_can_not_do_is_refused(netns: Namespace, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    done = netns.run("env", f"PYTHONPATH={SUPPORT}", *COMMAND, "check", "--config", str(path), check=False)
    assert done.returncode == 78
    assert said in done.stderr


def test_a_host_that_can_not_serve_it_says_what_is_missing(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "inline.toml"
    path.write_text('[inline.t]\ninterfaces = ["veth*"]\n')
    done = netns.run(
        "setpriv",
        "--bounding-set=-bpf,-sys_admin",
        "--inh-caps=-bpf,-sys_admin",
        *COMMAND,
        "check",
        "--config",
        str(path),
        check=False,
    )
    assert done.returncode == 78
    assert "inline.t: " in done.stderr
    assert "CAP_BPF" in done.stderr
