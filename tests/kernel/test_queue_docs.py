"""What the library's pages say is so: the reference, the first lines of the guide, and what an import brings along."""

from __future__ import annotations

import re
import socket
import sys

import pytest
from namespace import ROOT, Namespace
from queued import until


@pytest.mark.kernel
def test_packets_in_ten_lines(netns: Namespace) -> None:
    """The guide's first program, word for word."""
    guide = (ROOT / "docs" / "queue.md").read_text()
    program = guide.split("```python\n")[1].split("```")[0]
    assert len(program.splitlines()) <= 10
    rule = re.search(r"`iptables (-t mangle .*?)`", guide)
    assert rule is not None
    netns.shell(f"iptables-legacy {rule[1]}")
    netns.start(sys.executable, "-c", program)
    until(lambda: re.match(r" +5 ", netns.shell("cat /proc/net/netfilter/nfnetlink_queue")))

    def ports() -> list[bool]:
        reached = []
        for port in (23, 24):
            with socket.create_server(("127.0.0.1", port)), socket.socket() as client:
                client.settimeout(0.5 if port == 23 else 60)
                reached.append(client.connect_ex(("127.0.0.1", port)) == 0)
        return reached

    assert netns.call(ports) == [False, True]
