"""Who may give packets the mark of `offload`, by which the kernel accepts a flow without a verdict of ours."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from namespace import KERNEL, PATIENCE, Namespace
from resident import Resident

pytestmark = pytest.mark.kernel

PORT = 8443
CONFIG = """
[agent]
backend = "{backend}"
[queue.main]
num = 7
elements = ["allow", "offload"]
log_drops = false
[element.allow]
type = "policy"
default = "drop"
rule = [{{ action = "accept", dport = 53 }}]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.out]
queue = "main"
hooks = ["{hook}"]
udp_ports = [8443]
"""
# A datagram from a socket with a mark, unless that is 0. SO_MARK is 36.
PROGRAM = """
import socket, sys
host, port, mark = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    try:
        if int(mark):
            sender.setsockopt(socket.SOL_SOCKET, 36, int(mark))
    except PermissionError:
        sys.exit(13)
    sender.sendto(b"m" if int(mark) else b"-", (host, int(port)))
"""
# The same as a frame of a packet socket. argv: the interface, and the frame.
FRAME = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
    sender.bind((sys.argv[1], 0))
    sender.send(bytes.fromhex(sys.argv[2]))
"""
REFUSED = 13
ACCEPTED = r"--mark (0x[0-9a-f]+)/.*offload-accepted"


def with_rights(*rights: str) -> list[str]:
    """The words that run a command as a user with these capabilities alone."""
    allowed = "-all" + "".join(f",+{right}" for right in rights)
    kinds = [f"--{kind}={allowed}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *kinds]


def accepting(agent: Agent) -> int:
    """The mark of an accepted flow. Who cannot see it, as all but root, has 127 values to try."""
    (found,) = {match[1] for each in agent.status()["rules"] if (match := re.search(ACCEPTED, each["rule"]))}
    return int(found, 0)


def dropped(agent: Agent) -> int:
    return sum(each["count"] for each in agent.queue()["decisions"] if each["rule"] == "default")


def listens(state: dict[str, Any], host: str) -> None:
    receiver = state["receiver"] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((host, PORT))
    receiver.settimeout(PATIENCE)


def received(state: dict[str, Any]) -> bytes:
    data: bytes = state["receiver"].recv(16)
    return data


@contextlib.contextmanager
def receiver(namespace: Namespace, host: str) -> Iterator[Callable[[], bytes]]:
    """Gives the next datagram that arrives at a host."""
    resident = Resident(namespace)
    resident.call(listens, host)
    yield lambda: resident.call(received)
    resident.kill()


@pytest.mark.skipif(KERNEL < (5, 17), reason="SO_MARK needs CAP_NET_ADMIN before Linux 5.17")
@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_process_with_the_right_to_set_marks_passes_by_the_mark_of_offload(
    netns: Namespace, tmp_path: Path, backend: str
) -> None:
    agent = Agent(netns, tmp_path, CONFIG.format(backend=backend, hook="output")).ready()
    mark = accepting(agent)

    def sends(mark: int, *rights: str) -> int:
        words = [*with_rights(*rights), sys.executable, "-c", PROGRAM, "127.0.0.1", str(PORT), str(mark)]
        return netns.run(*words, check=False).returncode

    assert sends(mark) == REFUSED
    with receiver(netns, "127.0.0.1") as arrived:
        # By itself such a process is judged as any other.
        assert sends(0, "net_raw") == 0
        until(lambda: dropped(agent) == 1, "the datagram without a mark is dropped")
        assert sends(mark, "net_raw") == 0
        assert arrived() == b"m"
    assert dropped(agent) == 1
    assert agent.stop() == 0


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_mark_does_not_leave_its_network_namespace(
    routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path, backend: str
) -> None:
    """Root in a container sends marked packets, and the host that forwards them judges them nevertheless."""
    client, router, _ = routed
    agent = Agent(router, tmp_path, CONFIG.format(backend=backend, hook="forward")).ready()
    client.run(sys.executable, "-c", PROGRAM, "10.2.0.2", str(PORT), str(accepting(agent)))
    until(lambda: dropped(agent) == 1, "the marked datagram is judged")
    assert agent.status()["offloaded"]["accepted"] == 0
    assert agent.stop() == 0


def test_a_packet_socket_passes_by_netfilter_as_a_whole(routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path) -> None:
    """The right that a mark needs is enough for it, so that to refuse the mark would close nothing."""
    _, router, target = routed
    agent = Agent(router, tmp_path, CONFIG.format(backend="owned", hook="output")).ready()
    router.run(sys.executable, "-c", PROGRAM, "10.2.0.2", str(PORT), "0")
    until(lambda: dropped(agent) == 1, "the datagram is dropped")
    (link,) = json.loads(target.run("ip", "-j", "link", "show", "eth0").stdout)
    there = link["address"].replace(":", "")
    # IPv4 of 29 bytes from 10.2.0.1 to 10.2.0.2 with its checksum, and UDP without one.
    packet = f"4500001d00004000401126ca0a0200010a0200021f90{PORT:04x}0009000066"
    with receiver(target, "10.2.0.2") as arrived:
        router.run(*with_rights("net_raw"), sys.executable, "-c", FRAME, "eth2", f"{there}{'00' * 6}0800{packet}")
        assert arrived() == b"f"
    assert dropped(agent) == 1
    assert agent.stop() == 0
