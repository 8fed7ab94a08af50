"""TCP peers for the inside of a host: real sockets, plain Python, no part of the agent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from booted.container import Container
from booted.nspawn import until

_OURS = re.compile(r"NFQA-|nfq-agent:")
# A server that sends back what it gets, and a client that compares. Both ends cross INPUT and OUTPUT.
_EXCHANGE = """
import hashlib, os, socket, sys, threading
port, size = int(sys.argv[1]), int(sys.argv[2])
server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
def serve():
    connection, _ = server.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()
for address in ("127.0.0.1", "::1"):
    threading.Thread(target=serve, daemon=True).start()
    client = socket.create_connection((address, port), timeout=60)
    sent = os.urandom(size)
    threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR)), daemon=True).start()
    got = b""
    while data := client.recv(65536):
        got += data
    assert got == sent, f"{address}: {len(got)} of {size} bytes came back, or others"
"""

# One connection that is never idle for long. It ends well on SIGTERM, and badly if a byte is late by 10 s, lost or wrong.
_STEADY = """
import json, signal, socket, sys, threading, time
port = int(sys.argv[1])
server = socket.create_server(("127.0.0.1", port))
def serve():
    connection, _ = server.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
threading.Thread(target=serve, daemon=True).start()
client = socket.create_connection(("127.0.0.1", port), timeout=10)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
count, longest = 0, 0.0
print("steady", flush=True)
while not asked:
    message = count.to_bytes(8, "big") * 128
    began = time.monotonic()
    client.sendall(message)
    got = b""
    while len(got) < len(message):
        data = client.recv(len(message) - len(got))
        assert data, "the connection was closed"
        got += data
    assert got == message, "other bytes came back"
    longest = max(longest, time.monotonic() - began)
    count += 1
    time.sleep(0.005)
print(json.dumps({"rounds": count, "longest": longest}), flush=True)
"""


def exchange(host: Container, port: int = 11000, size: int = 100_000) -> None:
    """Send bytes there and back over IPv4 and IPv6 on the loopback; an AssertionError unless all came back."""
    host.run("python3", "-c", _EXCHANGE, str(port), str(size))


def exchange_in_a_unit(host: Container) -> None:
    """The same by a service: a process that enters the host from outside has a control group that is not seen in there."""
    host.write("/root/exchange.py", _EXCHANGE)
    command = "/usr/bin/python3 /root/exchange.py 11000 1000"
    host.write("/etc/systemd/system/exchange.service", f"[Service]\nType=oneshot\nExecStart={command}\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "exchange")


class Steady:
    """A connection in use. After `steady` has closed it, `rounds` went there and back, none slower than `longest` seconds."""

    rounds = 0
    longest = 0.0


@contextlib.contextmanager
def steady(host: Container, port: int = 11000) -> Iterator[Steady]:
    """Keep one connection busy; an AssertionError if it breaks or a byte is lost."""
    process = host.start("python3", "-c", _STEADY, str(port), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    found = Steady()
    assert process.stdout is not None
    # nsenter does not hand on signals, and its only child is the client.
    client = until(lambda: _child(process.pid), "the client inside")
    try:
        assert process.stdout.readline() == "steady\n"
        yield found
        os.kill(client, signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.kill(client, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, f"the connection broke: {errors}"
    answer = json.loads(output)
    found.rounds, found.longest = answer["rounds"], answer["longest"]


def _child(pid: int) -> int:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(listed[0]) if listed else 0


@contextlib.contextmanager
def lock_held(host: Container) -> Iterator[None]:
    """Another program holds the xtables lock."""
    words = ("flock", "--close", "/run/xtables.lock", "sh", "-c", "echo held; exec sleep 100")
    process = host.start(*words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    # nsenter does not hand on signals, and the lock goes with its only child.
    holder = _child(process.pid)
    try:
        yield
    finally:
        os.kill(holder, signal.SIGKILL)
        process.communicate()


def status(host: Container, *words: str) -> dict[str, Any]:
    """What `nfq-agent status --json` says."""
    answer: dict[str, Any] = json.loads(host.run("nfq-agent", "status", "--json", *words).stdout)
    return answer


def settled(host: Container) -> dict[str, Any]:
    """The status once every packet that the workers have received has its verdict: none is under way."""

    def found() -> dict[str, Any] | None:
        report = status(host)
        workers = [worker for queue in report["queues"] for worker in queue["workers"]]
        return report if all(each["received"] == each["accepted"] + each["dropped"] for each in workers) else None

    answer: dict[str, Any] = until(found, "no packet is under way")
    return answer


def saved(host: Container) -> str:
    """All rules of both kinds and families, without counters and remarks."""
    text = host.shell("iptables-legacy-save; ip6tables-legacy-save; iptables-nft-save; ip6tables-nft-save 2>/dev/null")
    return "\n".join(re.sub(r"\[\d+:\d+\]", "", line) for line in text.splitlines() if not line.startswith("#"))


def ours(host: Container) -> list[str]:
    """The lines of our rules and chains."""
    return [line for line in saved(host).splitlines() if _OURS.search(line)]


def foreign_rules(host: Container) -> None:
    """What an administrator may have: both kinds of iptables, in the tables that are ours too."""
    host.shell(
        """
        iptables-legacy -A INPUT -p tcp --dport 22 -m comment --comment "let me in" -j ACCEPT
        iptables-legacy -t mangle -I OUTPUT -p tcp --dport 11000 -j MARK --set-mark 0x7
        ip6tables-legacy -t mangle -N theirs
        ip6tables-legacy -t mangle -A INPUT -j theirs
        iptables-nft -A FORWARD -s 192.0.2.0/24 -j DROP
        """
    )


def main_pid(host: Container, unit: str = "nfq-agent") -> int:
    """The supervisor, by its number inside."""
    return int(host.show(unit, "MainPID"))


def nothing_left(host: Container, before: str) -> None:
    """After `systemctl stop`: no process, no rule, no queue, and all else as before."""
    host.run("systemctl", "stop", "nfq-agent")
    assert host.show("nfq-agent", "ActiveState") in ("inactive", "failed")
    assert ours(host) == []
    assert saved(host) == before
    assert host.shell("cat /proc/net/netfilter/nfnetlink_queue") == ""
    assert "nfq-agent run" not in host.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def restarted(host: Container, before: int) -> None:
    """Wait until systemd has another main process serving."""
    until(
        lambda: host.show("nfq-agent", "ActiveState") == "active" and main_pid(host) not in (0, before),
        "systemd has started the agent again",
    )


def comes_back(host: Container, unit: str, command: str) -> None:
    """Run a command after which systemd starts the unit, and wait until it is active with another main process.

    A unit that is killed comes back by Restart=; a start by hand beside that fails on Debian 13.
    """
    before = host.show(unit, "MainPID")
    host.shell(command)
    until(lambda: host.show(unit, "ActiveState") == "active" and host.show(unit, "MainPID") != before, f"{unit} is back")


def without_start_limit(host: Container) -> None:
    """Let systemd try as often as it takes: how often it does before a test has mended what is wrong depends on the machine."""
    host.write("/etc/systemd/system/nfq-agent.service.d/limits.conf", "[Unit]\nStartLimitIntervalSec=0\n")
    host.run("systemctl", "daemon-reload")


def drop_in(host: Container, name: str) -> None:
    """Put one of the package's drop-ins into force."""
    host.run("mkdir", "-p", "/etc/systemd/system/nfq-agent.service.d")
    host.run("ln", "-sf", f"/usr/share/nfq-agent/drop-ins/{name}.conf", "/etc/systemd/system/nfq-agent.service.d/")
    host.run("systemctl", "daemon-reload")
