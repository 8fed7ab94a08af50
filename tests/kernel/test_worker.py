"""A worker in a process of its own, on real packets: each gets one verdict, whatever an element, a signal or a kill does."""

from __future__ import annotations

import socket
import time

import pytest
from namespace import Namespace
from queued import NUMBER, Wire, passed, queue_rule, until
from worker_crew import ByText, Crew, counted, crew

from nfq_agent import ACCEPT, DROP, Needs, Packet, PacketElement, Verdict
from nfq_agent.flow import Flow
from nfq_agent.verdict import Action

pytestmark = pytest.mark.kernel


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
    """Hears what happened to packets."""

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        self.emit(f"{packet.data.decode()} {verdict.action.name}")


@pytest.mark.parametrize("copy_range", [128, 65535])
@pytest.mark.parametrize("default", [ACCEPT, DROP])
def test_no_elements(netns: Namespace, copy_range: int, default: Verdict) -> None:
    queue_rule(netns)

    def inside() -> int:
        wire = Wire()
        began = time.monotonic_ns()
        with crew(default=default, copy_range=copy_range) as made:
            wire.send(b"alone")
            until(lambda: counted(made.counters, received=1))
            wire.send(*[b"x"] * 3000)
            until(lambda: counted(made.counters, received=3001))
            assert made.counters.accepted == (3001 if default is ACCEPT else 0)
            assert made.counters.dropped == (3001 if default is DROP else 0)
            assert made.counters.last_id == 3001
            assert began < made.counters.heartbeat <= time.monotonic_ns()
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
            lines: list[str] = []

            def failures() -> list[str]:
                lines.extend(made.lines)
                return [line for line in lines if "failed on packet" in line]

            # Lines are written after the verdicts are sent and counted. One a second: the others are suppressed and counted.
            until(lambda: len(failures()) + made.counters.log_suppressed == 3)
            failure = failures()[0]
            assert "LookupError: on purpose" in failure
            assert "worker_crew.py:" in failure
            assert f"drop {Action.DROP.name}" in lines

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


def test_an_element_that_reads_the_process_is_asked_each_time(netns: Namespace) -> None:
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
                until(lambda made=made: any("malformed" in line for line in made.lines))  # type: ignore[misc]  # its default is the type

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
            assert "would drop udp 127.0.0.1:4441 -> 127.0.0.1:9999 OUTPUT, by " in said[0]

    netns.call(inside)
