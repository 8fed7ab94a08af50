"""Pairs that plain_pairs.pyx accepts and connects by itself: what each of them does without."""

from __future__ import annotations

import gc
import os
import select
import socket
from collections.abc import Iterator

import pytest

from nfq_agent.proxy.plain_pairs import PlainPair, PlainPairs


class Straight:
    """Compiled pairs that accept and connect by themselves, without a proxy. The destination is the listener itself."""

    def __init__(self, checks: float = 0.0) -> None:
        self.epoll = select.epoll()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.running: dict[object, PlainPair] = {}
        self.checked: list[int] = []
        self.pairs = PlainPairs(self.epoll.fileno(), None)  # type: ignore[arg-type]  # nothing is left to it here
        self.pairs.share(self.running, {}, 0.0, {}, 60.0)
        self.pairs.go_straight(True, 0, frozenset(), checks, self._is_second_hop)
        self.pairs.listen((), 100)

    def _is_second_hop(self, peer: tuple[str, int], destination: tuple[str, int]) -> bool:
        assert destination == self.listener.getsockname()
        self.checked.append(peer[1])
        return False

    def pair(self, now: float) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection: the client and the server."""
        client = socket.create_connection(self.listener.getsockname())
        assert self.pairs.accept(self.listener.fileno(), 1, now) == 0
        self.until_readable(self.listener)
        return client, self.listener.accept()[0]

    def until_readable(self, sock: socket.socket) -> None:
        for _ in range(6000):
            self.pairs.wait(0.0)
            if select.select([sock], [], [], 0.01)[0]:
                return
        raise AssertionError("nothing came within a minute")

    def until_none_runs(self) -> None:
        for _ in range(6000):
            if not self.running:
                return
            self.pairs.wait(0.01)
        raise AssertionError("a pair still runs after a minute")

    def close(self) -> None:
        for pair in self.running.values():
            pair.close()
        self.pairs.close()
        self.listener.close()
        self.epoll.close()


@pytest.fixture
def straight() -> Iterator[Straight]:
    it = Straight(checks=2.0)
    yield it
    it.close()


def test_so_many_connections_a_second_are_checked_for_a_loop(straight: Straight) -> None:
    ports = []
    for now in (100.0, 100.0, 100.0, 100.25, 100.5, 100.5, 1000.0, 1000.0, 1000.0):
        client, server = straight.pair(now)
        ports.append(client.getsockname()[1])
        client.close()
        server.close()
    assert straight.checked == [ports[place] for place in (0, 1, 4, 6, 7)]


def test_the_destination_gets_small_segments_at_once_from_the_second_on(straight: Straight) -> None:
    """The first never waits, so a connection that sends once does without the system call (tcp_nagle_check in tcp_output.c)."""
    client, server = straight.pair(0.0)
    with client, server:
        (pair,) = straight.running.values()
        told = []
        for _ in range(3):
            with socket.socket(fileno=os.dup(pair.upstream_fd)) as upstream:
                told.append(upstream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            client.sendall(b"x")
            straight.until_readable(server)
            assert server.recv(2) == b"x"
        with socket.socket(fileno=os.dup(pair.upstream_fd)) as upstream:
            told.append(upstream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    assert [bool(each) for each in told] == [False, False, True, True]


def test_pairs_that_end_in_order_need_no_garbage_collector(straight: Straight) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            client, server = straight.pair(0.0)
            server.close()
            straight.until_readable(client)
            assert client.recv(1) == b""
            client.close()
            straight.until_none_runs()
        assert not [each for each in gc.get_objects() if isinstance(each, PlainPair)]
    finally:
        gc.enable()
