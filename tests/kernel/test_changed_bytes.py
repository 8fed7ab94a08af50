"""Bytes that their sender changes after they were judged: the kernel sends the pages of a file as they are when they leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agent import Agent
from changed_page import DNS, HTTP, NUMBER, OWN_CHECKSUM, WAYS, understood
from namespace import Namespace

pytestmark = pytest.mark.kernel

CONFIG = f"""
[agent]
backend = "{{backend}}"
[queue.egress]
num = {NUMBER}
gso = {{gso}}
elements = ["dpi", "allow"]
[element.allow]
type = "policy"
default = "drop"
rule = [
    {{{{ action = "accept", http_host = ["*.good.test"] }}}},
    {{{{ action = "accept", dns_name = ["*.good.test"] }}}},
]
[rules.egress]
queue = "egress"
hooks = ["{{hook}}"]
role = "client"
tcp_ports = [{HTTP}]
udp_ports = [{DNS}]
"""
# It reads when it is told to, and says what it got.
SERVER = f"""
import socket, sys
server = socket.create_server(("10.203.0.1", {HTTP}))
print("ready", flush=True)
connection, _ = server.accept()
sys.stdin.readline()
print(connection.recv(65536), flush=True)
"""
# The request is sent, judged, and answered by the server's kernel; then the page changes.
CLIENT = f"""
import fcntl, mmap, os, socket, tempfile, time
request = b"GET / HTTP/1.1\\r\\nHost: www.good.test\\r\\n\\r\\n"
with tempfile.TemporaryFile() as file:
    file.write(request.ljust(4096, b" "))
    file.flush()
    page = mmap.mmap(file.fileno(), 4096)
    connection = socket.create_connection(("10.203.0.1", {HTTP}), timeout=60)
    os.sendfile(connection.fileno(), file.fileno(), 0, len(request))
    unsent = 1
    while unsent:
        time.sleep(0.01)
        unsent = int.from_bytes(fcntl.ioctl(connection.fileno(), 0x5411, bytes(4)), "little")
    page[: len(request)] = request.replace(b"good", b"evil")
"""


@pytest.mark.parametrize(("gso", "arrives"), [("false", b"good"), ('"auto"', b"evil")], ids=["cut", "whole"])
def test_a_page_that_changes_after_its_verdict(
    pair: tuple[Namespace, Namespace], tmp_path: Path, gso: str, arrives: bytes
) -> None:
    """Where the kernel cuts packets before the queue it makes a copy of such bytes, and sends that."""
    there, here = pair
    server = there.start(sys.executable, "-c", SERVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    agent = Agent(here, tmp_path, CONFIG.format(backend="auto", gso=gso, hook="output")).ready()
    here.run(sys.executable, "-c", CLIENT)
    server.stdin.write(b"\n")
    server.stdin.flush()
    assert b"Host: www." + arrives + b".test" in server.stdout.readline()
    assert agent.stop() == 0


_LOOPBACK = "127.0.0.1", "::1"
_VETH = "10.203.0.2", "fd00:203::2"
_BOTH = {"tcp": WAYS, "udp": WAYS}


@pytest.mark.parametrize("backend", ["legacy", "owned"])
@pytest.mark.parametrize("addresses", [_LOOPBACK, _VETH], ids=["loopback", "veth"])
def test_a_page_that_changes_while_its_packet_waits(
    pair: tuple[Namespace, Namespace], tmp_path: Path, backend: str, addresses: tuple[str, str]
) -> None:
    """With `gso = false` what was judged is sent, whichever way the sender keeps the page."""
    here, there = pair
    agent = Agent(here, tmp_path, CONFIG.format(backend=backend, gso="false", hook="output")).ready()
    target = here if addresses is _LOOPBACK else there
    assert understood(here, target, agent, addresses, _BOTH) == {"good"}
    assert agent.stop() == 0


def test_a_page_of_a_container_that_changes_while_its_packet_waits(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path
) -> None:
    client, router, target = routed
    agent = Agent(router, tmp_path, CONFIG.format(backend="legacy", gso="false", hook="forward")).ready()
    assert understood(client, target, agent, ("10.2.0.2", "fd02::2"), _BOTH) == {"good"}
    assert agent.stop() == 0


@pytest.mark.parametrize("addresses", [_LOOPBACK, _VETH], ids=["loopback", "veth"])
def test_the_default_sends_the_page_that_has_changed(
    pair: tuple[Namespace, Namespace], tmp_path: Path, addresses: tuple[str, str]
) -> None:
    """A limit: the verdict is on what the page held, and the page is sent."""
    here, there = pair
    agent = Agent(here, tmp_path, CONFIG.format(backend="legacy", gso='"auto"', hook="output")).ready()
    target = here if addresses is _LOOPBACK else there
    assert understood(here, target, agent, addresses, _BOTH) == {"evil"}
    assert agent.stop() == 0


@pytest.mark.parametrize("gso", ["false", '"auto"'], ids=["cut", "whole"])
def test_a_datagram_whose_checksum_is_its_senders(pair: tuple[Namespace, Namespace], tmp_path: Path, gso: str) -> None:
    """A limit: the kernel has no checksum to add up before the queue, and makes no copy for it."""
    here, there = pair
    agent = Agent(here, tmp_path, CONFIG.format(backend="legacy", gso=gso, hook="output")).ready()
    assert understood(here, there, agent, ("10.203.0.2",), {"udp": OWN_CHECKSUM}) == {"evil"}
    assert agent.stop() == 0
