"""The two examples, unchanged, with real packets."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from namespace import PATIENCE, ROOT, Namespace
from queued import until

pytestmark = pytest.mark.kernel


def bound(netns: Namespace, number: int) -> bool:
    lines = netns.shell("cat /proc/net/netfilter/nfnetlink_queue").splitlines()
    return any(line.split()[0] == str(number) for line in lines)


def test_the_syn_monitor(netns: Namespace) -> None:
    example = ROOT / "examples" / "syn_monitor.py"
    assert len(example.read_text().splitlines()) < 30
    netns.shell("iptables-legacy -w -t raw -A PREROUTING -p tcp --syn -j NFQUEUE --queue-num 1 --queue-bypass")
    monitor = netns.start(sys.executable, str(example), stdout=subprocess.PIPE, text=True)
    until(lambda: bound(netns, 1))
    netns.run(
        sys.executable, "-c",
        "import socket; s = socket.create_server(('127.0.0.1', 8080)); c = socket.socket(); c.bind(('127.0.0.1', 40000)); "
        "c.connect(('127.0.0.1', 8080))",
    )  # fmt: skip
    assert monitor.stdout is not None
    assert monitor.stdout.readline() == "A new tcp connection will be established: 127.0.0.1:40000 -> 127.0.0.1:8080\n"
    # nsenter becomes the program: the signal is the program's own.
    monitor.send_signal(signal.SIGTERM)
    assert monitor.wait(PATIENCE) == 0


def test_the_rewriter(netns: Namespace) -> None:
    netns.shell("iptables-legacy -w -t mangle -A OUTPUT -p udp --dport 9999 -j NFQUEUE --queue-num 2")
    rewriter = netns.start(sys.executable, str(ROOT / "examples" / "rewriter.py"), "cat", "kitten")
    until(lambda: bound(netns, 2))
    done = netns.run(
        sys.executable, "-c",
        "import socket; r = socket.socket(2, 2); r.bind(('127.0.0.1', 9999)); r.settimeout(60); s = socket.socket(2, 2)\n"
        "for text in (b'a cat, another cat', b'no such animal'):\n"
        "    s.sendto(text, ('127.0.0.1', 9999)); print(r.recv(100).decode())",
    )  # fmt: skip
    assert done.stdout == "a kitten, another kitten\nno such animal\n"
    rewriter.send_signal(signal.SIGINT)
    assert rewriter.wait(PATIENCE) == 0
