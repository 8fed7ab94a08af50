"""A worker in a process of its own, on real packets: each gets one verdict, whatever an element, a signal or a kill does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from namespace import Namespace
from queued import NUMBER, PORT, Wire, passed, queue_rule, until

from nfq_agent import ACCEPT, DROP, RETAIN, Needs, Packet, PacketElement, Verdict
from nfq_agent.counters import Counters
from nfq_agent.element import ElementChain
from nfq_agent.flow import Flow
from nfq_agent.host.users import CAP_NET_ADMIN, User, become
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service import turn_policy
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.verdict import Action

pytestmark = pytest.mark.kernel

NOBODY = User(65534, 65534)


class Crew:
    """A bound queue and, one after the other, the workers that serve it; the test is the supervisor."""

    def __init__(self, *elements: type[PacketElement], default: Verdict = ACCEPT, **options: Any) -> None:
        self.elements: Sequence[type[PacketElement]] = elements
        self.default = default
        self.on_error = options.pop("on_error", ACCEPT)
        self.monitor = options.pop("monitor", False)
        self.keep = options.pop("keep", (CAP_NET_ADMIN,))
        self.busy_poll = options.pop("busy_poll", 0.0)
        self.queue = WorkerQueue(NUMBER, on_unanswered=self.on_error, **{"copy_range": 128, **options}).open().bind()
        self.counters = Counters()
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        self.pid = 0

    def start(self, lost_below: int | None = None) -> None:
        """Fork the next and wait until it serves."""
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.control.close()
            code = 1
            try:
                become(NOBODY, self.keep)
                chain = ElementChain([element(element.__name__, None, self.emit) for element in self.elements], self.default)
                settings = WorkerSettings(
                    NUMBER, self.default, self.on_error, self.monitor, busy_poll=self.busy_poll, lost_below=lost_below
                )
                WorkerLoop(self.queue, chain, settings, self.counters, theirs, self.emit).run()
                code = 0
            except BaseException as error:
                self.emit(repr(error))
            os._exit(code)
        theirs.close()
        self.queue.leave_to_child()
        self.control.settimeout(5)
        self.ready = self.control.recv(100)

    def emit(self, message: str, level: str = "info", **fields: Any) -> None:
        os.write(self.writer, message.encode() + b"\n")

    @property
    def lines(self) -> list[str]:
        """What was said since it was last asked."""
        try:
            return os.read(self.reader, 1 << 16).decode().splitlines()
        except BlockingIOError:
            return []

    def stop(self) -> int:
        """Tell it to stop; its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self.control.send(b"stop\n")
        return self.wait()

    def wait(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.control.close()
        return code

    def kill(self) -> int:
        """Kill it; the kernel's id sequence after that."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL
        return self.queue.statistics().id_sequence

    def end(self) -> None:
        self.queue.close()
        os.close(self.reader)
        os.close(self.writer)


@contextmanager
def crew(*elements: type[PacketElement], **options: Any) -> Iterator[Crew]:
    """A crew whose worker serves and is stopped at the end."""
    made = Crew(*elements, **options)
    made.start()
    assert made.ready == b"ready\n"
    try:
        yield made
        assert made.stop() == 0
    finally:
        made.end()


class ByText(PacketElement):
    """What the datagram says."""

    needs = Needs.PAYLOAD

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        if packet.data.startswith(b"drop"):
            return DROP
        if packet.data.startswith(b"raise"):
            raise LookupError("on purpose")
        if packet.data.startswith(b"nonsense"):
            return "accept"  # type: ignore[return-value]  # that is the mistake
        if packet.data.startswith(b"retain"):
            return RETAIN
        if packet.data.startswith(b"mark"):
            return Verdict(Action.ACCEPT, mark=9)
        return None


class ByPort(PacketElement):
    """Asked once for each five-tuple."""

    pure = True
    asked = 0

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        self.asked += 1
        sport = packet.headers.five_tuple.sport
        if sport == 4444:
            raise LookupError("on purpose")
        return DROP if sport is not None and sport % 2 else ACCEPT

    def stop(self) -> None:
        self.emit(f"asked {self.asked}")


class Bland(PacketElement):
    """Says the same to everything."""

    pure = True

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return ACCEPT


class ByProcess(ByPort):
    """Says that it looks at uid or gid, which no five-tuple tells."""

    reads_process = True


class ByFlow(PacketElement):
    """Every third packet of a flow is dropped."""

    needs = Needs.FLOW

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        assert flow is not None
        return DROP if flow.packets % 3 == 0 else None


class Listener(PacketElement):
    """Hears what became of packets."""

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        self.emit(f"{packet.data.decode()} {verdict.action.name}")


class Killer(PacketElement):
    """Dies with packets in hand."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        if packet.data == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return None


def counted(counters: Counters, **wanted: int) -> bool:
    snapshot = counters.snapshot()
    return all(snapshot[name] == value for name, value in wanted.items())


@pytest.mark.parametrize("copy_range", [128, 65535])
@pytest.mark.parametrize("default", [ACCEPT, DROP])
def test_no_elements(netns: Namespace, copy_range: int, default: Verdict) -> None:
    queue_rule(netns)

    def inside() -> int:
        wire = Wire()
        with crew(default=default, copy_range=copy_range) as made:
            wire.send(b"alone")
            until(lambda: counted(made.counters, received=1))
            wire.send(*[b"x"] * 3000)
            until(lambda: counted(made.counters, received=3001))
            assert made.counters.accepted == (3001 if default is ACCEPT else 0)
            assert made.counters.dropped == (3001 if default is DROP else 0)
            assert made.counters.last_id == 3001
            assert time.monotonic_ns() - made.counters.heartbeat < 2e9
            assert made.queue.statistics().waiting == 0
        return passed()

    assert netns.call(inside) == (3001 if default is ACCEPT else 0)


@pytest.mark.parametrize("on_error", [ACCEPT, DROP])
@pytest.mark.parametrize("copy_range", [1000, 65535])
def test_elements_decide_and_their_errors_strand_no_packet(netns: Namespace, on_error: Verdict, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(ByText, Listener, on_error=on_error, copy_range=copy_range) as made:
            wire.send(b"pass", b"drop", b"raise", b"raise again", b"nonsense", b"mark", b"last")
            good = [b"pass", b"raise", b"raise again", b"nonsense", b"mark", b"last"]
            assert wire.arrived(6 if on_error is ACCEPT else 3) == (good if on_error is ACCEPT else [b"pass", b"mark", b"last"])
            until(lambda: counted(made.counters, received=7))
            assert counted(made.counters, errors=3, marked=1, dropped=1 if on_error is ACCEPT else 4, malformed=0)
            lines = made.lines
            (failure,) = [line for line in lines if "an element failed" in line]
            assert "LookupError: on purpose" in failure
            assert "test_worker.py:" in failure
            assert f"drop {Action.DROP.name}" in lines
            # One a second: the others are suppressed and counted.
            assert made.counters.log_suppressed == 2

    netns.call(inside)


def test_a_packet_that_an_element_retains_is_answered_in_the_end(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        made = Crew(ByText, copy_range=65535)
        made.start()
        wire.send(b"retain this", b"pass", b"and this")
        assert wire.arrived(2) == [b"pass", b"and this"]
        assert wire.nothing_more()
        assert made.stop() == 0
        assert wire.arrived(1) == [b"retain this"]
        assert counted(made.counters, retained=1, unanswered=1)
        made.end()

    netns.call(inside)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_pure_element_is_asked_once_for_each_five_tuple(netns: Namespace, family: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire(socket.AddressFamily(family))
        with crew(ByPort, on_error=ACCEPT) as made:
            for port in (4440, 4441, 4442, 4443):
                with socket.socket(family, socket.SOCK_DGRAM) as sender:
                    sender.bind((wire.address[0], port))
                    for number in range(50):
                        sender.sendto(b"%d %d" % (port, number), wire.address)
            assert sorted(wire.arrived(100)) == sorted(b"%d %d" % (p, n) for p in (4440, 4442) for n in range(50))
            until(lambda: counted(made.counters, received=200))
            assert counted(made.counters, dropped=100, accepted=100, cached=196, errors=0)
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.bind((wire.address[0], 4444))
                for _ in range(3):
                    sender.sendto(b"x", wire.address)
            assert len(wire.arrived(3)) == 3
            until(lambda: counted(made.counters, received=203))
            # What an error led to is not remembered.
            assert counted(made.counters, errors=3)
            assert wire.nothing_more()
            made.control.send(b"stop\n")
            until(lambda: "asked 7" in made.lines)

    netns.call(inside)


def test_who_looks_at_the_process_is_asked_each_time(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(ByProcess) as made:
            wire.send(*[b"x"] * 20)
            until(lambda: counted(made.counters, received=20))
            made.control.send(b"stop\n")
            until(lambda: "asked 20" in made.lines)

    netns.call(inside)


def test_what_the_quick_key_does_not_describe_is_decoded(netns: Namespace) -> None:
    """Options and fragments: never a made-up port."""
    queue_rule(netns)
    netns.shell(
        f"iptables-legacy -w -t mangle -I OUTPUT -p udp -f -j NFQUEUE --queue-num {NUMBER}\n"
        f"iptables-legacy -w -t mangle -I OUTPUT -p icmp -j NFQUEUE --queue-num {NUMBER}\n"
        "ip link set lo mtu 1500"
    )

    def inside() -> None:
        wire = Wire()
        with crew(ByPort) as made:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind(("127.0.0.1", 4440))
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01" * 4)
                sender.sendto(b"with options", wire.address)
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"")
                sender.sendto(b"x" * 5000, wire.address)
            assert wire.arrived(2) == [b"with options", b"x" * 5000]
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            raw.sendto(b"\x08\0\xf7\xff\0\0\0\0", ("127.0.0.1", 0))
            until(lambda: made.counters.received >= 3)
            assert made.queue.statistics().waiting == 0
            raw.close()

    netns.call(inside)


def test_undecodable_packets_get_the_verdict_on_error(netns: Namespace) -> None:
    netns.shell(f"iptables-legacy -w -t mangle -A OUTPUT -p sctp -j NFQUEUE --queue-num {NUMBER}")

    def inside() -> None:
        for elements in ((ByPort,), (ByFlow,), (ByText, Listener)):
            with crew(*elements, on_error=DROP) as made:
                with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as sender:
                    sender.sendto(b"\0\1", ("127.0.0.1", 0))
                until(lambda made=made: counted(made.counters, received=1))  # type: ignore[misc]  # bound early
                assert counted(made.counters, dropped=1, errors=0)
                assert made.counters.malformed >= 1
                until(lambda made=made: any("malformed" in line for line in made.lines))  # type: ignore[misc]

    netns.call(inside)


def test_flows_are_kept_apart_from_one_another(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire, other = Wire(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with crew(ByFlow) as made:
            for number in range(6):
                wire.send(b"a%d" % number)
                other.sendto(b"b%d" % number, wire.address)
            assert len(wire.arrived(8)) == 8
            until(lambda: counted(made.counters, received=12))
            assert counted(made.counters, dropped=4)
            made.control.send(b"\n")
            until(lambda: counted(made.counters, flows=2))
        other.close()

    netns.call(inside)


@pytest.mark.parametrize("elements", [(), (ByPort,), (ByText,)])
def test_monitor_mode_drops_nothing_and_says_what_it_would(netns: Namespace, elements: tuple[type[PacketElement], ...]) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(*elements, monitor=True, default=DROP if not elements else ACCEPT, copy_range=1000) as made:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind(("127.0.0.1", 4441))
                for _ in range(5):
                    sender.sendto(b"drop", wire.address)
            assert wire.arrived(5) == [b"drop"] * 5
            until(lambda: counted(made.counters, received=5))
            assert counted(made.counters, dropped=0, accepted=5, would_drop=5)
            said: list[str] = []

            def one_said() -> bool:
                said.extend(made.lines)
                return bool(said)

            until(one_said)
            assert "would drop <Packet 1 OUTPUT udp 127.0.0.1:4441 -> 127.0.0.1:9999" in said[0]

    netns.call(inside)


def test_it_ends_when_its_supervisor_is_gone(netns: Namespace) -> None:
    def inside() -> None:
        made = Crew()
        made.start()
        made.control.shutdown(socket.SHUT_RDWR)
        assert made.wait() == 0
        made.end()

    netns.call(inside)


def test_it_does_not_start_where_its_answers_would_not_be_taken(netns: Namespace) -> None:
    def inside() -> None:
        made = Crew(keep=())
        made.start()
        assert made.ready == b""
        assert made.wait() == 1
        assert "QueuePermissionError" in made.lines[0]
        made.end()

    netns.call(inside)


_FLOOD = f"""
import socket, sys, time
s = socket.socket(2, 2)
s.setsockopt(1, 32, 32 << 20)
for number in range(int(sys.argv[1])):
    s.sendto(b"x" * 36, ("127.0.0.1", {PORT}))
    if number % 100 == 0: time.sleep(0.001)
"""


@pytest.mark.parametrize("elements", [(), (ByText,)])
def test_killed_in_a_flood_no_packet_is_lost(netns: Namespace, elements: tuple[type[PacketElement], ...]) -> None:
    queue_rule(netns)
    total = 60000

    def inside() -> int:
        made = Crew(*elements, max_len=65536, receive_buffer=128 << 20)
        made.start()
        sender = subprocess.Popen([sys.executable, "-c", _FLOOD, str(total)])
        kills = 0
        while sender.poll() is None:
            before = made.counters.received
            until(lambda before=before: made.counters.received > before + 1000 or sender.poll() is not None)  # type: ignore[misc]
            made.start(lost_below=made.kill())
            assert made.ready == b"ready\n"
            kills += 1
        assert kills > 3
        until(lambda: made.queue.statistics().waiting == 0)
        line = made.queue.statistics()
        assert (line.dropped, line.user_dropped, line.id_sequence) == (0, 0, total)
        assert made.stop() == 0
        counters = made.counters
        # Answered by the dead and not counted any more is counted as lost.
        assert counters.received + counters.lost >= total
        made.end()
        return passed()

    assert netns.call(inside, timeout=100) == total


def test_killed_with_packets_in_hand_and_none_that_follow(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        made = Crew(Killer)
        made.start()
        os.kill(made.pid, signal.SIGSTOP)
        wire.send(b"one", b"kill", b"three")
        os.kill(made.pid, signal.SIGCONT)
        sequence = 3
        assert made.wait() == -signal.SIGKILL
        assert made.queue.statistics().waiting == 3
        assert made.queue.statistics().id_sequence == sequence
        # The socket is empty: only the number tells that there was something.
        made.start(lost_below=sequence)
        assert wire.arrived(3) == [b"one", b"kill", b"three"]
        until(lambda: counted(made.counters, lost=3, last_id=3))
        wire.send(b"four")
        assert wire.arrived(1) == [b"four"]
        assert made.stop() == 0
        made.end()

    netns.call(inside)


def test_stopped_it_leaves_what_it_has_not_read_to_its_successor(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        made = Crew()
        made.start()
        assert made.stop() == 0
        wire.send(*[b"x"] * 100)
        # Settings changed by the supervisor in between: what it finds in the socket is passed on.
        made.queue.configure(max_len=2000)
        wire.send(*[b"y"] * 100)
        made.start()
        assert wire.arrived(200) == [b"x"] * 100 + [b"y"] * 100
        assert counted(made.counters, lost=0)
        assert made.stop() == 0
        made.end()

    netns.call(inside)


@pytest.mark.parametrize("elements", [(), (Bland,)])
@pytest.mark.parametrize(("short", "fewest", "most"), [(60.0, 1, 14), (0.0, 16, 24)])
def test_who_can_t_keep_up_takes_longer_turns(
    netns: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    elements: tuple[type[PacketElement], ...],
    short: float,
    fewest: int,
    most: int,
) -> None:
    # Turns of 256, 320, 384 and so on, if the one before was short enough; else of 256.
    monkeypatch.setattr(turn_policy, "SHORT", short)
    queue_rule(netns)

    def inside() -> int:
        wire = Wire()
        made = Crew(*elements)
        wire.send(*[b"x"] * 4000)
        made.start()
        until(lambda: counted(made.counters, received=4000, accepted=4000))
        assert made.queue.statistics().waiting == 0
        assert made.stop() == 0
        assert fewest <= made.counters.turns <= most
        made.end()
        return passed()

    assert netns.call(inside) == 4000


def test_a_full_buffer_is_counted_and_survived(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(receive_buffer=20000) as made:
            os.kill(made.pid, signal.SIGSTOP)
            wire.send(*[b"x" * 1000] * 500)
            lost = made.queue.statistics().user_dropped
            assert lost > 0
            os.kill(made.pid, signal.SIGCONT)
            assert len(wire.arrived(500 - lost)) == 500 - lost
            until(lambda: made.counters.enobufs >= lost)
            wire.send(b"y")
            assert wire.arrived(1) == [b"y"]

    netns.call(inside)


def test_stop_and_counters_under_an_endless_flood(netns: Namespace) -> None:
    queue_rule(netns)
    script = f"import socket; s=socket.socket(2,2)\nwhile True: s.sendto(b'x', ('127.0.0.1', {PORT}))"
    flood = netns.start("python3", "-c", script)

    def inside() -> float:
        made = Crew()
        made.start()
        until(lambda: made.counters.received > 20000)
        assert made.counters.turns > 20
        began = time.monotonic()
        assert made.stop() == 0
        took = time.monotonic() - began
        made.end()
        return took

    assert netns.call(inside) < 0.5
    flood.kill()


class Slow(PacketElement):
    """Every verdict much later."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict:
        return Verdict(Action.ACCEPT, delay=3600.0)


def test_a_stop_gives_delayed_verdicts(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        # The policy would drop them.
        made = Crew(Slow, on_error=DROP, unanswered_after=60.0)
        made.start()
        wire.send(b"one", b"two")
        until(lambda: counted(made.counters, received=2))
        assert wire.nothing_more()
        assert made.stop() == 0
        assert wire.arrived(2) == [b"one", b"two"]
        made.end()

    netns.call(inside)


def _processor_seconds(pid: int) -> float:
    """What a process has used so far (proc(5), utime and stime)."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("busy_poll", [0.0, 0.5])
@pytest.mark.parametrize("elements", [(), (ByText,)])
def test_busy_poll(netns: Namespace, elements: tuple[type[PacketElement], ...], busy_poll: float) -> None:
    """With it the worker uses the processor while it waits for the next packet; without it, it sleeps."""
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with crew(*elements, busy_poll=busy_poll) as made:
            before = _processor_seconds(made.pid)

            def used() -> float:
                wire.send(b"x")
                wire.arrived(1)
                time.sleep(0.2)
                return _processor_seconds(made.pid) - before

            if busy_poll:
                until(lambda: used() >= 0.2)
            else:
                for _ in range(5):
                    assert used() < 0.1

    netns.call(inside)
