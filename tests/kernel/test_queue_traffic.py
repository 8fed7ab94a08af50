"""The queue under real traffic: full queues and buffers, offloaded packets, the ports of a bridge."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from namespace import Namespace
from queued import NUMBER, PORT, Wire, in_turns, passed, queue_rule

from nfq_agent import (
    ACCEPT,
    DROP,
    RETAIN,
    Packet,
    Queue,
    RewriteError,
    Verdict,
)
from nfq_agent.queue.turns import WorkerQueue

pytestmark = pytest.mark.kernel


def test_a_full_queue_drops_or_lets_pass(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        for fail_open in (False, True):
            with WorkerQueue(NUMBER, max_len=10, fail_open=fail_open) as queue:
                before = passed()
                wire.send(*[b"x"] * 100)
                line = queue.statistics()
                assert line.waiting == 10
                # What passes uninspected is counted nowhere but in the rules.
                assert line.dropped == (0 if fail_open else 90)
                assert passed() - before == (90 if fail_open else 0)
                assert queue.skim(ACCEPT) == 10
                assert passed() - before == (100 if fail_open else 10)

    netns.call(inside)


@pytest.mark.parametrize("copy_range", [128, 65535])
@pytest.mark.parametrize("spin", [0.0, 0.01])
@pytest.mark.parametrize("verdict", [ACCEPT, DROP])
def test_packets_are_answered_as_they_come(netns: Namespace, verdict: Verdict, spin: float, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with WorkerQueue(NUMBER, copy_range=copy_range) as queue:
            queue.be_patient(0.01)
            queue.poll_for(spin)
            assert queue.skim_each(verdict) == 0
            known: dict[Any, Verdict] = {}
            looks: tuple[Callable[[int], int], ...] = (
                lambda budget: queue.skim_each(verdict, budget),
                lambda budget: queue.sort(known, lambda packet, key: verdict, budget, each=True)[0],
            )
            for look in looks:
                before = passed()
                wire.send(*[b"x", b"x" * 60_000] * 5)
                # As many as were asked for, and then those that are left.
                assert in_turns(look, 4) == 4
                assert queue.statistics().waiting == 6
                assert passed() - before == (4 if verdict is ACCEPT else 0)
                assert in_turns(look, 100, 6) == 6
                assert queue.statistics().waiting == 0
                assert passed() - before == (10 if verdict is ACCEPT else 0)

    netns.call(inside)


class Both(Queue, WorkerQueue):
    """Runs, and is served in turns."""


@pytest.mark.parametrize("look_up", [False, True])
def test_answered_as_they_come_nothing_that_waits_for_another_verdict(netns: Namespace, look_up: bool) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with Both(NUMBER, copy_range=128, on_unanswered=DROP) as queue:
            queue.be_patient(0.01)
            known: dict[Any, Verdict] = {}

            def remember(packet: Packet, key: Any) -> Verdict:
                known[key] = ACCEPT
                return ACCEPT

            def look(budget: int) -> int:
                return queue.sort(known, remember, budget, each=True)[0] if look_up else queue.skim_each(ACCEPT, budget)

            # One that is retained.
            wire.send(b"kept")
            (kept,) = queue.read()
            queue.answer([(kept, RETAIN)])
            wire.send(*[b"x"] * 5)
            assert in_turns(look, 100, 5) == 5
            assert wire.arrived(5) == [b"x"] * 5
            assert queue.statistics().waiting == 1
            queue.verdict(kept, ACCEPT)
            assert wire.arrived(1) == [b"kept"]
            # Those that a turn had taken when it was broken off.
            wire.send(*[b"lost"] * 3)

            def break_off(packet: Packet) -> Verdict:
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                queue.run(break_off)
            wire.send(*[b"y"] * 5)
            assert in_turns(look, 100, 5) == 5
            assert wire.arrived(5) == [b"y"] * 5
            # And the one that was asked about.
            wire.send(b"lost")

            def break_off_too(packet: Packet, key: Any) -> Verdict:
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                queue.sort({}, break_off_too, each=look_up)
            wire.send(*[b"z"] * 5)
            assert in_turns(look, 100, 5) == 5
            assert wire.arrived(5) == [b"z"] * 5
            # The two that were read and not asked about are still owed a verdict.
            assert queue.statistics().waiting == 2
            queue.finish()
            assert wire.nothing_more()
            assert queue.statistics().waiting == 0

    netns.call(inside)


@pytest.mark.parametrize("copy_range", [2000, 65535])
def test_a_full_socket_buffer_ends_nothing(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with Queue(NUMBER, copy_range=copy_range, receive_buffer=20000) as queue:
            wire.send(*[b"x" * 1000] * 500)
            line = queue.statistics()
            assert line.user_dropped > 0
            assert line.user_dropped + line.waiting == 500
            # Each dropped message counts once.
            assert queue.drops() >= line.user_dropped
            # The change's acknowledgement would not fit either; it arrives nevertheless.
            queue.configure(max_len=5000)
            seen = 0

            def callback(packet: Packet) -> Verdict:
                nonlocal seen
                seen += 1
                if seen == line.waiting + 1:
                    queue.stop()
                return ACCEPT

            threading.Timer(0.2, wire.send, [b"y"]).start()
            queue.run(callback)
            wire.arrived(line.waiting + 1)

    netns.call(inside)


@pytest.mark.parametrize("copy_range", [2000, 65535])
def test_the_ports_of_a_bridge(netns: Namespace, copy_range: int) -> None:
    """A packet that a bridge carries between two of its ports names the bridge, and the ports as physical devices."""
    with Namespace() as left, Namespace() as right:
        netns.shell("ip link add br0 type bridge; ip link set br0 up; sysctl -qw net.bridge.bridge-nf-call-iptables=1")
        for port, end, address in (("left", left, "10.9.0.1/24"), ("right", right, "10.9.0.2/24")):
            netns.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(end.pid))
            netns.shell(f"ip link set {port} master br0; ip link set {port} up")
            end.shell(f"ip address add {address} dev eth0; ip link set eth0 up")
        netns.shell(f"iptables-legacy -w -t mangle -A FORWARD -p udp --dport {PORT} -j NFQUEUE --queue-num {NUMBER}")
        shout = f"import socket; socket.socket(2, 2).sendto(b'over the bridge', ('10.9.0.2', {PORT}))"

        def inside() -> None:
            with Queue(NUMBER, copy_range=copy_range) as queue:
                deadline = time.monotonic() + 60
                # The first ones are lost while the ports are still learning.
                while not queue.wait(0.2):
                    assert time.monotonic() < deadline, "nothing came over the bridge"
                    left.run(sys.executable, "-c", shout)
                packet = queue.read()[0]
                assert packet.data == b"over the bridge"
                names = [socket.if_indextoname(number) for number in (packet.indev, packet.outdev)]
                assert names == ["br0", "br0"]
                names = [socket.if_indextoname(number) for number in (packet.physindev, packet.physoutdev)]
                assert names == ["left", "right"]
                packet.accept()

        netns.call(inside)


def _bulk(here: Namespace, there: Namespace, size: int) -> None:
    """Carry `size` bytes by TCP from the first to the second."""
    server = there.start(
        sys.executable, "-c",
        "import socket; s=socket.create_server(('10.203.0.2', 5001)); print('up', flush=True); c,_=s.accept()\n"
        f"n=0\nwhile n < {size}: n += len(c.recv(65536))\nc.sendall(b'done')",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    server.stdout.readline()
    done = here.run(
        sys.executable, "-c",
        "import socket; s=socket.create_connection(('10.203.0.2', 5001)); "
        f"s.sendall(bytes({size})); print(s.recv(4).decode())",
    )  # fmt: skip
    assert done.stdout == "done\n"


@pytest.mark.parametrize("gso", [True, False])
def test_offloaded_packets_come_whole_or_cut(pair: tuple[Namespace, Namespace], gso: bool) -> None:
    here, there = pair
    here.shell(f"iptables-legacy -w -t mangle -A OUTPUT -p tcp --dport 5001 -j NFQUEUE --queue-num {NUMBER}")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        here.enter()
        seen: list[tuple[bool, int]] = []
        refused = 0
        with Queue(NUMBER, gso=gso) as queue:
            threading.Timer(60, queue.stop).start()
            os.write(writer, b"bound")

            def callback(packet: Packet) -> Verdict:
                nonlocal refused
                seen.append((packet.gso, packet.length))
                if packet.gso:
                    try:
                        queue.check(packet, Verdict(ACCEPT.action, payload=packet.payload))
                    except RewriteError:
                        refused += 1
                if packet.headers.tcp_flags is not None and packet.headers.tcp_flags & 1:
                    queue.stop()
                return ACCEPT

            queue.run(callback)
        os.write(writer, pickle.dumps((max(length for _, length in seen), any(flag for flag, _ in seen), refused)))
        os._exit(0)
    assert os.read(reader, 5) == b"bound"
    _bulk(here, there, 5_000_000)
    longest, offloaded, refused = pickle.loads(os.read(reader, 1000))
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    if gso:
        assert longest > 1500
        assert offloaded
        assert refused > 0
    else:
        assert longest <= 1500
        assert not offloaded
        assert refused == 0
