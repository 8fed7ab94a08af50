"""What a packet of a real queue says of itself: metadata, owner, size, and whether it may be rewritten."""

from __future__ import annotations

import os
import socket
import subprocess
import time

import pytest
from namespace import Namespace
from queue_program import RANGES, serving
from queued import NUMBER, PORT, Wire, queue_rule, until

from nfq_agent import (
    Action,
    Hook,
    Queue,
    RewriteError,
    Verdict,
)
from nfq_agent.checksum import mend

pytestmark = pytest.mark.kernel


def test_rewriting_a_packet_that_was_not_copied_whole_is_refused(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        for copy_range in (100, 5000):
            with Queue(NUMBER, copy_range=copy_range) as queue:
                wire.send(b"x" * 9000)
                (packet,) = queue.read()
                assert packet.truncated
                assert (len(packet.payload), packet.length) == (copy_range, 9028)
                with pytest.raises(RewriteError, match="larger copy_range"):
                    packet.accept(payload=packet.payload)
                packet.accept()
                assert wire.arrived(1) == [b"x" * 9000]
                wire.send(b"x")
                (packet,) = queue.read()
                with pytest.raises(RewriteError, match="allowed: 1 to"):
                    packet.accept(payload=b"")
                with pytest.raises(RewriteError, match="allowed: 1 to"):
                    packet.accept(payload=b"x" * 65532)
                packet.accept()
                wire.arrived(1)

    netns.call(inside)


def test_metadata_only(netns: Namespace) -> None:
    queue_rule(netns, match="-m comment --comment x")

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER, copy="meta") as queue:
            wire.send(b"unseen")
            (packet,) = queue.read()
            assert packet.payload == b""
            assert packet.hook == Hook.OUTPUT
            assert packet.outdev == socket.if_nametoindex("lo")
            packet.accept()
            assert wire.arrived(1) == [b"unseen"]

    netns.call(inside)


@RANGES
def test_what_a_packet_says_of_itself(pair: tuple[Namespace, Namespace], copy_range: int) -> None:
    here, there = pair
    here.shell(f"iptables-legacy -w -t mangle -A INPUT -p udp --dport {PORT} -j NFQUEUE --queue-num {NUMBER}")
    mac = there.shell("ip -o link show eth0").split("link/ether ")[1].split()[0]

    def inside() -> None:
        with Queue(NUMBER, copy_range=copy_range) as queue:
            before = time.time()
            subprocess.run(
                here_sends := [
                    "nsenter", f"--target={there.pid}", "--net", "python3", "-c",
                    f"import socket; socket.socket(2,2).sendto(b'hello', ('10.203.0.1', {PORT}))",
                ],
                check=True,
            )  # fmt: skip
            assert here_sends
            until(lambda: queue.statistics().waiting == 1)
            (packet,) = queue.read()
            assert packet.hook == Hook.INPUT
            assert packet.indev == socket.if_nametoindex("eth0")
            assert (packet.outdev, packet.physindev, packet.physoutdev) == (0, 0, 0)
            assert packet.hw_address is not None
            assert packet.hw_address.hex(":") == mac
            assert packet.hw_protocol == 0x0800
            assert packet.length == 33
            assert packet.mark == 0
            assert before - 0.1 <= packet.time <= time.time() + 0.1
            assert (packet.uid, packet.gid) == (None, None)
            assert packet.gso is False
            packet.accept()

    here.call(inside)


def test_uid_and_gid_of_the_sender(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        with Queue(NUMBER, uid_gid=True, copy_range=200) as queue:
            wire = Wire()
            child = os.fork()
            if child == 0:
                os.setgid(4321)
                os.setuid(1234)
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", wire.address)
                os._exit(0)
            os.waitpid(child, 0)
            (packet,) = queue.read()
            assert (packet.uid, packet.gid) == (1234, 4321)
            packet.accept()

    netns.call(inside)


def test_packets_of_64_kb(netns: Namespace) -> None:
    queue_rule(netns)
    netns.run("ip", "link", "set", "lo", "mtu", "65536")

    def inside() -> None:
        wire = Wire()
        data = os.urandom(65480)
        with Queue(NUMBER, max_len=100) as queue, serving(queue, lambda p: Verdict(Action.ACCEPT, payload=mend(p.payload[:-1]))):
            wire.send(data)
            assert wire.arrived(1) == [data[:-1]]
            # Many at once are more than one message to the kernel may hold.
            wire.send(*[data] * 20)
            assert wire.arrived(20) == [data[:-1]] * 20

    netns.call(inside)
