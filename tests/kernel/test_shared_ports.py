"""Who a datagram belongs to where its address and port do not tell: another program sends from them, or shares them."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import pytest
from agent import Agent, until
from namespace import PATIENCE, UNPRIVILEGED, Namespace

CONFIG = """
[queue.main]
num = 7
elements = ["allow", "record"]
[element.allow]
type = "policy"
default = "drop"
rule = [ {{ name = "payments", action = "accept", unit = "payments-*.service" }} ]
[rules.out]
queue = "main"
hooks = ["output"]
udp_ports = [9999]
role = "client"
"""
# Joins a control group, becomes a user, binds the port 5555 of 127.0.0.1, and sends on each line of its input:
# GROUP UID ADDRESS OPTIONS TEXT
SENDER = """
import os, socket, struct, sys
group, uid, address, options, text = sys.argv[1:]
with open(group + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
os.setresuid(int(uid), int(uid), int(uid))
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for option in options.split(","):
    if option.startswith("SO_"):
        one.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
one.bind((address, 5555))
if "connect" in options:
    one.connect(("127.0.0.1", 9999))
# struct in_pktinfo: from the address of another socket (ip(7)).
other = [(socket.IPPROTO_IP, 8, struct.pack("=I4s4s", 0, socket.inet_aton("127.0.0.1"), bytes(4)))]
print("bound", flush=True)
for _ in sys.stdin:
    try:
        one.sendmsg([text.encode()], other if "forge" in options else [], 0, ("127.0.0.1", 9999))
    except OSError:
        pass
    print("sent", flush=True)
"""
RECEIVER = """
import socket
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.bind(("127.0.0.1", 9999))
print("bound", flush=True)
while True:
    print(end.recv(100).decode(), flush=True)
"""


class Program:
    """A program that sends from port 5555 when it is told to."""

    def __init__(self, netns: Namespace, group: Path, uid: int, text: str, address: str, options: str) -> None:
        argv = (sys.executable, "-c", SENDER, str(group), str(uid), address, options, text)
        self._process = netns.start(*argv, stdin=PIPE, stdout=PIPE, text=True)
        self._read("bound")

    def send(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._read("sent")

    def end(self) -> None:
        """A control group with a process in it cannot be removed."""
        self._process.communicate(timeout=PATIENCE)

    def _read(self, wanted: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{wanted}\n"


@pytest.mark.parametrize(
    ("uid", "address", "ours", "theirs", "passes"),
    [
        # Another user, from the address of a socket that has this very destination.
        (UNPRIVILEGED, "127.0.0.2", "connect", "forge", True),
        (UNPRIVILEGED, "127.0.0.2", "", "forge", True),
        # Another user on the same port; the kernel names the one that came last.
        (UNPRIVILEGED, "127.0.0.1", "SO_REUSEADDR", "SO_REUSEADDR", True),
        # The same user on the same port: it is not known which of both sends.
        (0, "127.0.0.1", "SO_REUSEADDR", "SO_REUSEADDR", False),
        (0, "127.0.0.1", "SO_REUSEPORT", "SO_REUSEPORT", False),
        (0, "0.0.0.0", "SO_REUSEPORT", "SO_REUSEPORT", False),
    ],
)
def test_a_unit_is_not_taken_for_another(
    netns: Namespace, tmp_path: Path, groups: tuple[Path, str], uid: int, address: str, ours: str, theirs: str, passes: bool
) -> None:
    root, tag = groups
    receiver = netns.start(sys.executable, "-c", RECEIVER, stdout=PIPE, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "bound\n"
    agent = Agent(netns, tmp_path, CONFIG.format(), LOG_FORMAT="json").ready()
    with ExitStack() as stack:

        def program(group: str, user: int, text: str, where: str, options: str) -> Program:
            made = Program(netns, root / f"{group}-{tag}.service", user, text, where, options)
            stack.callback(made.end)
            return made

        # Where both fit, the kernel names the one that was bound last, or by chance.
        others = [program("other", uid, "evil", address, theirs)] if "SO_" in theirs else []
        good = program("payments", 0, "good", "127.0.0.1", ours)
        others.append(program("other", uid, "evil", address, theirs))
        # A verdict is that of its five-tuple: what is accepted later holds for all that send the same.
        for each in (*others, good):
            for _ in range(3):
                each.send()
        sent = 3 * (len(others) + 1)
        until(lambda: agent.queue()["workers"][0]["received"] == sent, "the packets are judged")
        assert agent.stop() == 0
    # It ends behind all datagrams that passed.
    netns.run(sys.executable, "-c", 'import socket; socket.socket(2, 2).sendto(b"end", ("127.0.0.1", 9999))')
    arrived = [line.strip() for line in iter(receiver.stdout.readline, "end\n")]
    assert arrived == (["good"] * 3 if passes else [])
    records = [line for line in map(json.loads, agent.log.splitlines()) if line.get("event") in ("begin", "change")]
    units = {record.get("unit") for record in records if record["verdict"] == "accept"}
    assert units == ({f"payments-{tag}.service"} if passes else set())
    assert {record.get("unit") for record in records if record["verdict"] == "drop"} <= {None, f"other-{tag}.service"}
