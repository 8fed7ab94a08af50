"""Pairs that no element looks at: plain_pairs.pyx and relay.py are held to one contract, in the proxy's loop on loopback."""

from __future__ import annotations

import contextlib
import gc
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from descriptors import open_descriptors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.host.child import READY
from nfq_agent.proxy.loop import Proxy
from nfq_agent.proxy.plain_pairs import PlainPair, PlainPairs
from nfq_agent.proxy.relay import Pair
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.proxy.tally import Tally
from nfq_agent.stream import StreamChain

RESET = struct.pack("ii", 1, 0)
LARGE = 6 << 20


class Bed:
    """A proxy in a thread, whose target is a listener of the test's own."""

    def __init__(self, compiled: bool, **options: object) -> None:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.server.settimeout(60)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.listener.setblocking(False)
        self.counters = Slots(tuple(PROXY_COUNTERS))
        self.control, self._theirs = socket.socketpair()
        target = ("127.0.0.1", self.server.getsockname()[1])
        chosen = ProxySettings("tcp", target=target, **options)  # type: ignore[arg-type]  # each test gives what fits
        self.said: list[str] = []
        self.proxy = Proxy([self.listener], StreamChain([]), chosen, self.counters, self._theirs, self._emit, compiled=compiled)
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()
        self.control.settimeout(60)
        assert self.control.recv(64) == READY

    def _live(self) -> None:
        try:
            self.proxy.run()
        finally:
            self.proxy.close()

    def _emit(self, message: str, level: str = "info", **fields: object) -> None:
        del level, fields
        self.said.append(message)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection: the client and the server."""
        client = socket.create_connection(self.listener.getsockname(), timeout=60)
        server, _ = self.server.accept()
        server.settimeout(60)
        return client, server

    def count(self, name: str) -> int:
        return self.counters.snapshot()[name]

    def until(self, name: str, value: int) -> None:
        deadline = threading.Event()
        for _ in range(30_000):
            if self.count(name) == value:
                return
            deadline.wait(0.002)
        raise AssertionError(f"{name} is {self.count(name)}, not {value}")

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.control.send(b"stop\n")
        self.thread.join(60)
        assert not self.thread.is_alive()
        for each in (self.server, self.listener, self.control, self._theirs):
            each.close()


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    it = Bed(request.param)
    yield it
    it.stop()


def read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := sock.recv(min(size - len(data), 1 << 16))):
        data += more
    return bytes(data)


def end_of(sock: socket.socket) -> str:
    """How the other side ended: in order, or by a reset."""
    try:
        return f"{len(sock.recv(1))} bytes"
    except ConnectionResetError:
        return "reset"


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def pattern(size: int, seed: int) -> bytes:
    return (bytes(range(seed % 7, 251)) * (size // 200 + 1))[:size]


@pytest.mark.parametrize("by_client", [True, False])
def test_a_large_transfer_waits_for_a_slow_reader_and_arrives_whole(bed: Bed, by_client: bool) -> None:
    """Much more than the sockets' buffers take: the proxy keeps a part, stops reading, and continues when there is room."""
    client, server = bed.pair()
    there, back = ("bytes_forward", "bytes_reverse") if by_client else ("bytes_reverse", "bytes_forward")
    sends, reads = (client, server) if by_client else (server, client)
    with client, server:
        data = pattern(LARGE, 1)
        sender = threading.Thread(target=send_all, args=(sends, data))
        sender.start()
        # Until nothing more can be sent: what comes after that has to wait in the proxy.
        before = 0
        while (now := bed.count(there)) == 0 or now != before:
            before = now
            select.select([], [], [], 0.2)
        assert read(reads, LARGE) == data
        sender.join(60)
        assert end_of(reads) == "0 bytes"
        reads.sendall(b"answer after the end of the request")
        assert read(sends, 35) == b"answer after the end of the request"
        reads.close()
        assert end_of(sends) == "0 bytes"
        bed.until("active", 0)
        assert (bed.count(there), bed.count(back), bed.count("reset")) == (LARGE, 35, 0)


def test_a_reset_is_passed_on_either_way(bed: Bed) -> None:
    for by_client in (True, False):
        client, server = bed.pair()
        first, second = (client, server) if by_client else (server, client)
        with client, server:
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            first.close()
            assert end_of(second) == "reset"
    bed.until("reset", 2)
    bed.until("active", 0)


def test_what_a_side_said_before_it_refused_is_carried(bed: Bed) -> None:
    """An answer and a close with unread bytes, which is a reset: the answer still arrives."""
    for _ in range(20):
        client, server = bed.pair()
        with client, server:
            client.sendall(b"request")
            assert server.recv(3) == b"req"
            server.sendall(b"413 too large")
            assert read(client, 13) == b"413 too large"
            server.close()
            assert end_of(client) == "reset"
    bed.until("active", 0)


def test_small_segments_do_not_wait(bed: Bed) -> None:
    """Several in a row without an answer: with Nagle's algorithm each but the first would wait for an acknowledgement."""
    client, server = bed.pair()
    with client, server:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(50):
            client.sendall(b"%02d" % number)
            assert read(server, 2) == b"%02d" % number
        for number in range(50):
            server.sendall(b"%02d" % number)
            assert read(client, 2) == b"%02d" % number


@pytest.mark.parametrize("compiled", [True, False])
def test_a_destination_that_does_not_answer_is_given_up(compiled: bool) -> None:
    """Its backlog is full, so that it does not answer at all (tcp(7)); a client that is reset before that is not kept."""
    bed = Bed(compiled, connect_timeout=1.0)
    bed.server.listen(0)
    with socket.create_connection(bed.server.getsockname()):
        client = socket.create_connection(bed.listener.getsockname(), timeout=60)
        assert end_of(client) == "reset"
        client.close()
        bed.until("failed_upstream", 1)
        assert any("cannot connect" in line and "no answer within 1 s" in line for line in bed.said)
        bed.until("active", 0)
        client = socket.create_connection(bed.listener.getsockname(), timeout=60)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        bed.until("connections", 2)
        bed.until("active", 0)
        assert bed.count("failed_upstream") + bed.count("reset") == 2
    bed.stop()


def test_nothing_is_left_of_pairs_that_ended(bed: Bed) -> None:
    """Descriptors, and the memory of each pair: some end in order, some by a reset, some when the proxy is stopped."""
    for _ in range(3):
        client, server = bed.pair()
        client.close()
        server.close()
    # Before the last one is counted, none may be active for a moment.
    bed.until("connections", 3)
    bed.until("active", 0)
    before = len(open_descriptors())
    for number in range(60):
        client, server = bed.pair()
        bed.until("active", 1)
        client.sendall(b"x" * 100)
        assert read(server, 100) == b"x" * 100
        if number % 3 == 0:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        if number % 3 == 1:
            server.shutdown(socket.SHUT_WR)
        server.close()
        bed.until("active", 0)
    assert len(open_descriptors()) == before
    # The loop in Python may still hold the one that it looked at last.
    assert sum(isinstance(each, Pair | PlainPair) for each in gc.get_objects()) <= 1


def test_a_stop_in_the_middle_resets_both_sides_and_closes_everything() -> None:
    before = len(open_descriptors())
    for compiled in (True, False):
        bed = Bed(compiled)
        ends = [bed.pair() for _ in range(5)]
        bed.until("active", 5)
        # One with bytes that the other side does not take.
        ends[0][0].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ends[0][0].send(bytes(1 << 16))
        bed.stop()
        assert bed.count("active") == 0
        assert bed.count("reset") == 5
        for client, server in ends[1:]:
            assert {end_of(client), end_of(server)} == {"reset"}
        for client, server in ends:
            client.close()
            server.close()
        del bed
    assert len(open_descriptors()) == before


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.booleans(), st.integers(1, 300_000)),
        st.tuples(st.just("shut"), st.booleans(), st.just(0)),
    ),
    max_size=8,
)
ENDS = st.sampled_from(["close client", "close server", "reset client", "reset server"])


def test_what_the_owner_has_written_is_not_added_once_more() -> None:
    """A connection that was accepted between two waits: the owner counts it first."""
    counters = Slots(tuple(PROXY_COUNTERS))
    tally, running, new, attempts = Tally(counters, several=False), {}, {}, {}  # type: ignore[var-annotated]  # as `share` takes them
    with select.epoll() as epoll, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        pairs = PlainPairs(epoll.fileno(), None)  # type: ignore[arg-type]  # nothing is left to it here
        pairs.share(running, new, 0.0, attempts, 60.0)
        # The destination is the listener itself.
        pairs.go_straight(True, 0, frozenset(), 0.0, lambda *_: False)
        pairs.count_in(*tally.carried_in)
        with socket.create_connection(listener.getsockname()):
            assert pairs.accept(listener.fileno(), 1, 0.0) == 0
            tally.counted["connections"] += pairs.take_counts()[2]
            tally.write(len(running), [])
            pairs.wait(0.0)
            assert counters.snapshot()["connections"] == 1
            assert counters.snapshot()["active"] == 1
            for pair in list(running):
                pair.close()
        pairs.close()


def story(bed: Bed, steps: list[tuple[str, bool, int]], end: str) -> list[object]:
    """What both ends see of a connection: each step is seen to its end before the next one."""
    seen: list[object] = []
    before = bed.counters.snapshot()
    ends = bed.pair()
    shut = [False, False]
    with ends[0], ends[1]:
        for what, by_server, size in steps:
            here, there = (ends[1], ends[0]) if by_server else ends
            if shut[by_server]:
                continue
            if what == "send":
                data = pattern(size, len(seen))
                sender = threading.Thread(target=here.sendall, args=(data,))
                sender.start()
                seen.append(read(there, size) == data)
                sender.join(60)
            else:
                here.shutdown(socket.SHUT_WR)
                shut[by_server] = True
                seen.append(end_of(there))
                if all(shut):
                    break
        how, _, who = end.partition(" ")
        if not all(shut):
            here, there = ends if who == "client" else (ends[1], ends[0])
            if how == "reset":
                here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            here.close()
            if not shut[who == "server"]:
                seen.append(end_of(there))
        # The other side goes, too.
        for each in ends:
            each.close()
    bed.until("active", 0)
    after = bed.counters.snapshot()
    seen.append({name: after[name] - before[name] for name in ("connections", "bytes_forward", "bytes_reverse")})
    return seen


@pytest.fixture(scope="module")
def beds() -> Iterator[tuple[Bed, Bed]]:
    both = Bed(True), Bed(False)
    yield both
    for each in both:
        each.stop()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, end=ENDS)
def test_compiled_and_python_tell_the_same_story(beds: tuple[Bed, Bed], steps: list[tuple[str, bool, int]], end: str) -> None:
    compiled, python = (story(bed, steps, end) for bed in beds)
    assert compiled == python
