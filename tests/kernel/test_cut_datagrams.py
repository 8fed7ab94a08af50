"""UDP packets with bytes behind their datagram: the receiver's kernel cuts them off, so they hide no message from the agent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import Namespace
from openings import dns_query
from raw_packets import send, with_more

from nfq_agent.testing import udp

pytestmark = pytest.mark.kernel
CONFIG = """
[queue.q]
elements = ["dpi", "deny"]
[element.deny]
type = "policy"
default = "accept"
rule = [{ action = "drop", dns_name = ["*.bad.test"] }]
[rules.r]
queue = "q"
hooks = ["input"]
udp_ports = [5300]
"""
# Writes each datagram that arrives.
RECEIVER = """
import socket
end = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
end.bind(("::", 5300))
print("ready", flush=True)
while True:
    print(end.recv(2000).hex(), flush=True)
"""
ENDS = {4: ("10.203.0.2:4000", "10.203.0.1:5300"), 6: ("[fd00:203::2]:4000", "[fd00:203::1]:5300")}
BEHIND = bytes(9)


@pytest.mark.parametrize("family", [4, 6])
def test_bytes_behind_a_datagram_hide_no_message(pair: tuple[Namespace, Namespace], tmp_path: Path, family: int) -> None:
    server, client = pair
    seen = tmp_path / "seen"
    with open(seen, "wb") as output:
        server.start(sys.executable, "-u", "-c", RECEIVER, stdout=output)
    until(lambda: "ready" in seen.read_text(), "the receiver listens")
    denied, allowed = dns_query("a.bad.test"), dns_query("a.good.test")

    def send_with_more(message: bytes) -> None:
        client.call(send, with_more(udp(*ENDS[family], message).payload, BEHIND))

    send_with_more(denied)
    until(lambda: denied.hex() in seen.read_text().split(), "the kernel delivers the datagram without them")

    agent = Agent(server, tmp_path, CONFIG).ready()
    already = seen.read_text().split().count(denied.hex())
    send_with_more(denied)
    send_with_more(allowed)
    # The queue keeps their order: by then the first was judged.
    until(lambda: allowed.hex() in seen.read_text().split(), "what is allowed arrives")
    assert seen.read_text().split().count(denied.hex()) == already == 1
    assert agent.stop() == 0
