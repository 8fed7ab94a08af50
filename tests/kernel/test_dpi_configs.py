"""The configurations that need DPI, unchanged: the application map and the egress policy."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
from agent import Agent, until
from captures import certificate, listening
from namespace import Namespace

# Two processors at least are needed to tell cpu_fanout's doing.
PROCESSORS = len(os.sched_getaffinity(0))

pytestmark = pytest.mark.kernel

CONFIGS = Path(__file__).parent.parent / "configs"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
OK, TIMEOUT = 0, 28


def curl(netns: Namespace, url: str, name: str, address: str, *more: str, user: str = "root", limit: float = 30) -> int:
    """curl's exit code for a URL whose `{}` is the name, resolved to the address; within a second."""
    port = url.split(":")[2].partition("/")[0]
    host = f"[{address}]" if ":" in address else address
    argv = ["curl", "-sk", "-o", "/dev/null", "-m", str(limit), *more, "--resolve", f"{name}:{port}:{host}", url.format(name)]
    return netns.run("runuser", "-u", user, "--", *argv, check=False).returncode


@pytest.mark.parametrize("family", [4, 6])
def test_app_map(pair: tuple[Namespace, Namespace], tmp_path: Path, family: int) -> None:
    server, client = pair
    address = "10.203.0.1" if family == 4 else "fd00:203::1"
    server.start("python3", "-m", "http.server", "8080", "--bind", "::", "-d", str(tmp_path), **QUIET)
    server.start(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
        f"--listen-address={address}", "--bind-interfaces", "--address=/test/192.0.2.7", **QUIET,
    )  # fmt: skip
    until(lambda: listening(server, 8080) and listening(server, 53, "-u"), "both are served")
    agent = Agent(server, tmp_path, (CONFIGS / "app-map.toml").read_text()).ready()

    def dig(name: str, seconds: int = 1) -> str:
        return client.run("dig", f"@{address}", "+short", "+tries=1", f"+time={seconds}", name, check=False).stdout.strip()

    url = "http://{}:8080/"
    assert curl(client, url, "www.open.test", address) == OK, agent.log
    assert curl(client, url, "www.blocked.test", address, limit=1) == TIMEOUT, agent.log
    # The same name after another one, on a connection that was let pass.
    assert curl(client, url, "www.open.test", address, "-H", "Host: www.Blocked.test.", limit=1) == TIMEOUT, agent.log
    assert dig("www.open.test", 30) == "192.0.2.7", agent.log
    assert "192.0.2.7" not in dig("www.blocked.test"), agent.log
    assert "192.0.2.7" not in dig("WWW.Blocked.Test"), agent.log
    begin = time.monotonic()
    ssh = client.run(
        "ssh", "-p", "8080", "-o", "ConnectTimeout=1", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", address,
        check=False, timeout=20,
    )  # fmt: skip
    assert ssh.returncode == 255
    assert "timed out" in ssh.stderr, ssh.stderr
    # Our SSH is dropped in silence; the web server would have answered "Bad request" at once.
    assert time.monotonic() - begin > 0.9
    assert agent.stop() == 0


@pytest.mark.skipif(PROCESSORS < 2, reason="one processor always chooses one queue")
@pytest.mark.parametrize("family", [4, 6])
def test_app_map_keeps_a_connection_in_one_place_whatever_processor_brings_it(
    pair: tuple[Namespace, Namespace], tmp_path: Path, family: int
) -> None:
    """With cpu_fanout the processor chooses the queue; the halves of one request come by two, and are read as one."""
    server, client = pair
    address = "10.203.0.1" if family == 4 else "fd00:203::1"
    server.start("python3", "-m", "http.server", "8080", "--bind", "::", "-d", str(tmp_path), **QUIET)
    until(lambda: listening(server, 8080), "it is served")
    agent = Agent(server, tmp_path, (CONFIGS / "app-map.toml").read_text()).ready()
    answers = client.call(
        halves_by_two_processors, address, [f"{n}.{zone}.test" for n in range(4) for zone in ("open", "blocked")]
    )
    assert answers == [b"HTTP", b"-"] * 4, agent.log
    assert min(worker["received"] for worker in agent.queue("dpi")["workers"]) > 8
    # Packets of the other queue are passed to the one that has the connection's state.
    assert agent.totals("dpi")["requeued"] > 8
    assert agent.totals("dpi")["flows"] == 8
    assert agent.stop() == 0


def halves_by_two_processors(address: str, names: list[str]) -> list[bytes]:
    """What each name's request is answered with, as far as its first four bytes; `-` if not at all."""
    answers = []
    first, second = sorted(os.sched_getaffinity(0))[:2]
    for name in names:
        request = f"GET / HTTP/1.0\r\nHost: {name}\r\n\r\n".encode()
        os.sched_setaffinity(0, {first})
        with socket.create_connection((address, 8080), timeout=60) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.sendall(request[:-10])
            os.sched_setaffinity(0, {second})
            wire.sendall(request[-10:])
            wire.settimeout(0.4 if "blocked" in name else 60)
            try:
                answers.append(wire.recv(4))
            except TimeoutError:
                answers.append(b"-")
    return answers


ALLOWED, DENIED = 0x4E000000, 0x4F000000


def flows(netns: Namespace, family: int, mark: int) -> int:
    """The connections to port 443 that carry a mark of the offload."""
    listing = netns.run("conntrack", "-L", "-f", f"ipv{family}", "-p", "tcp", "--dport", "443", check=False).stdout
    # Other bits say whose connection it is.
    return sum(int(found) & 0xFF000000 == mark for found in re.findall(r" mark=(\d+)", listing))


@pytest.mark.parametrize("family", [4, 6])
def test_egress_policy_with_what_it_offloads(netns: Namespace, tmp_path: Path, family: int) -> None:
    """What is allowed leaves the queue in both modes; what is denied leaves it when it is denied, not while it is monitored."""
    address, listener = ("127.0.0.1", "127.0.0.1") if family == 4 else ("::1", "[::1]")
    folder = tmp_path / "files"
    folder.mkdir()
    certificate(folder)
    (folder / "large").write_bytes(bytes(5_000_000))
    netns.run("useradd", "--system", "payments")
    netns.start("openssl", "s_server", "-accept", f"{listener}:443", "-cert", str(folder / "cert.pem"),
                "-key", str(folder / "key.pem"), "-WWW", cwd=str(folder), **QUIET)  # fmt: skip
    until(lambda: listening(netns, 443), "TLS is served")
    agent = Agent(netns, tmp_path, (CONFIGS / "egress-policy.toml").read_text()).ready()
    url = "https://{}:443/large"

    def fetch(name: str, limit: float = 30) -> tuple[int, dict[str, int]]:
        before = agent.totals("egress")
        code = curl(netns, url, name, address, user="payments", limit=limit)
        return code, {key: value - before[key] for key, value in agent.totals("egress").items()}

    code, seen = fetch("api.stripe.com")
    assert code == OK, agent.log
    # SYN, ACK and hello; with the hello the kernel has the verdict.
    assert seen["accepted"] == seen["received"] <= 4
    assert seen["would_drop"] == 0
    assert flows(netns, family, ALLOWED) == 1
    code, seen = fetch("www.evil.test")
    assert code == OK, agent.log
    assert seen["would_drop"] >= seen["received"] - 3 > 3
    assert (flows(netns, family, ALLOWED), flows(netns, family, DENIED)) == (1, 0)
    agent.configure((CONFIGS / "egress-policy.toml").read_text().replace('"monitor"', '"enforce"'))
    agent.verb("reload")
    code, seen = fetch("api.example.org")
    assert code == OK, agent.log
    assert seen["accepted"] == seen["received"] <= 4
    code, seen = fetch("www.evil.test", 1)
    assert code == TIMEOUT, agent.log
    # The hello once; whatever is sent again ends in the kernel.
    assert (seen["dropped"], seen["would_drop"]) == (1, 0)
    offloaded = agent.status()["offloaded"]
    assert offloaded["denied"] >= 1
    assert offloaded["accepted"] > 10
    assert agent.stop() == 0


def test_egress_policy_monitors_then_enforces(netns: Namespace, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    certificate(folder)
    netns.run("useradd", "--system", "payments")
    for address in ("127.0.0.1", "[::1]"):
        netns.start("openssl", "s_server", "-accept", f"{address}:443", "-cert", str(folder / "cert.pem"),
                    "-key", str(folder / "key.pem"), "-www", **QUIET)  # fmt: skip
    until(lambda: netns.run("ss", "-Hltn", "sport = :443").stdout.count("LISTEN") == 2, "TLS is served")
    agent = Agent(netns, tmp_path, (CONFIGS / "egress-policy.toml").read_text()).ready()
    url = "https://{}:443/"

    def codes(user: str, limit: float = 30) -> list[int]:
        return [
            curl(netns, url, name, address, user=user, limit=limit if name == "www.evil.test" else 30)
            for name in ("api.stripe.com", "api.example.org", "www.evil.test")
            for address in ("127.0.0.1", "::1")
        ]

    assert codes("payments") == [OK] * 6, agent.log
    until(lambda: "would drop" in agent.log, "the monitor says what it would do")
    assert agent.stop() == 0
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "enforce.toml").write_text('[queue.egress]\nmode = "enforce"\n')
    agent.start()
    agent.ready()
    # Other packets must pass unchanged. They come first: a server that has to wait serves no other client.
    assert codes("root") == [OK] * 6, agent.log
    assert codes("payments", 1) == [OK] * 4 + [TIMEOUT] * 2, agent.log
    assert agent.stop() == 0
