"""`dns-answer` between dnsmasq and dig, which checks what it gets: UDP and TCP, both families."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, until
from captures import listening
from namespace import Namespace

pytestmark = pytest.mark.kernel

CONFIG = """
[queue.dns]
gso = false
elements = ["sinkhole", "none", "empty"]
[element.sinkhole]
type = "dns-answer"
names = ["*.bad.test"]
addresses = ["192.0.2.1", "2001:db8::1"]
[element.none]
type = "dns-answer"
names = ["*.none.test"]
answer = "nxdomain"
[element.empty]
type = "dns-answer"
names = ["*.empty.test"]
[rules.dns]
queue = "dns"
hooks = ["output"]
udp_ports = [53]
tcp_ports = [53]
"""


@pytest.mark.parametrize("over", ["+notcp", "+tcp"])
@pytest.mark.parametrize("server", ["127.0.0.1", "::1"])
def test_answers_are_changed(netns: Namespace, tmp_path: Path, server: str, over: str) -> None:
    netns.start(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
        "--address=/test/198.51.100.7", "--address=/test/2001:db8::7", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(partial(listening, netns, 53), "the server is there")
    agent = Agent(netns, tmp_path, CONFIG).ready()

    def ask(name: str, kind: str) -> tuple[str, str]:
        """The status and the addresses; dig warns of what is not sound."""
        said = netns.run("dig", f"@{server}", over, "+tries=1", "+time=30", name, kind, check=False).stdout
        assert "malformed" not in said.lower(), said
        assert "extra bytes" not in said.lower(), said
        status = said.partition("status: ")[2].partition(",")[0]
        lines = [line.split()[-1] for line in said.splitlines() if line.startswith(f"{name}.")]
        return status, " ".join(lines)

    assert ask("www.bad.test", "A") == ("NOERROR", "192.0.2.1"), agent.log
    assert ask("www.bad.test", "AAAA") == ("NOERROR", "2001:db8::1"), agent.log
    assert ask("www.good.test", "A") == ("NOERROR", "198.51.100.7"), agent.log
    assert ask("www.none.test", "A") == ("NXDOMAIN", ""), agent.log
    assert ask("www.empty.test", "AAAA") == ("NOERROR", ""), agent.log
    assert agent.stop() == 0
