"""The listeners, with real sockets on loopback: what is accepted, when, and how many."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
from collections.abc import Iterator

import pytest
from descriptors import open_descriptors
from ports import free_port

from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.host.sockets import Address
from nfq_agent.proxy.listeners import ACCEPTS, PAUSE, Listeners, Outcome, listen, places


def proxy(*listen: str) -> ProxyConfig:
    return ProxyConfig.model_validate({"listen": list(listen)})


class TestListen:
    def test_they_listen_and_hand_on_their_options(self) -> None:
        port = free_port()
        (it,) = listen(proxy(f"127.0.0.1:{port}"))
        with it, socket.create_connection(("127.0.0.1", port), timeout=60):
            assert it.getblocking() is False
            select.select([it], [], [], 5)
            accepted, _ = it.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1

    def test_the_error_names_the_address_and_the_others_are_closed(self) -> None:
        first, taken = free_port(), free_port()
        before = open_descriptors()
        with (
            socket.create_server(("127.0.0.1", taken)),
            pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ):
            listen(proxy(f"127.0.0.1:{first}", f"127.0.0.1:{taken}"))
        assert len(open_descriptors()) == len(before)
        socket.create_server(("127.0.0.1", first)).close()

    @pytest.mark.parametrize("both", [True, False])
    def test_a_dual_stack_listener_leaves_ipv4_to_another_on_its_port(self, both: bool) -> None:
        port = free_port()
        listeners = listen(proxy(f"[::]:{port}", f"0.0.0.0:{port}") if both else proxy(f"[::]:{port}"))
        for it in listeners:
            with it:
                if it.family == socket.AF_INET6:
                    assert it.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == both

    def test_those_that_fit_are_used_again(self) -> None:
        ports = [free_port() for _ in range(3)]
        first, second, third = (f"127.0.0.1:{port}" for port in ports)
        before = proxy(first, second)
        old = listen(before)
        new = listen(proxy(second, third), dict(zip(places(before), old, strict=True)))
        assert new[0] is old[1]
        for it in {*old, *new}:
            it.close()


class Taken:
    """What a proxy does with connections: it keeps them."""

    def __init__(self) -> None:
        self.held: list[socket.socket] = []

    def take(self, client: socket.socket, address: Address) -> None:
        self.held.append(client)

    def active(self) -> int:
        return len(self.held)

    def end(self, count: int) -> None:
        for _ in range(count):
            self.held.pop().close()


@pytest.fixture
def bed() -> Iterator[tuple[socket.socket, select.epoll, Taken, list[socket.socket]]]:
    """A listener, an epoll set, what was taken, and the clients."""
    with contextlib.ExitStack() as stack:
        it = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1000))
        it.setblocking(False)
        epoll = stack.enter_context(select.epoll())
        taken = Taken()
        clients: list[socket.socket] = []
        yield it, epoll, taken, clients
        for each in (*clients, *taken.held):
            each.close()


Bed = tuple[socket.socket, select.epoll, Taken, list[socket.socket]]


def connect(bed: Bed, count: int) -> None:
    listener, _, _, clients = bed
    for _ in range(count):
        clients.append(socket.create_connection(listener.getsockname(), timeout=60))


class TestAccept:
    def test_until_nothing_waits(self, bed: Bed) -> None:
        listener, epoll, taken, _ = bed
        it = Listeners([listener], epoll, 100)
        it.resume(0, 0.0)
        connect(bed, 3)
        assert [descriptor for descriptor, _ in epoll.poll(1)] == [listener.fileno()]
        assert it.get(listener.fileno()) is listener
        assert it.accept(listener, taken.active, taken.take, 0.0) is Outcome.EMPTY
        assert len(taken.held) == 3
        assert epoll.poll(0) == []

    def test_a_turn_is_bounded(self, bed: Bed) -> None:
        listener, epoll, taken, _ = bed
        it = Listeners([listener], epoll, 1000)
        connect(bed, ACCEPTS + 1)
        assert it.accept(listener, taken.active, taken.take, 0.0) is Outcome.MORE
        assert len(taken.held) == ACCEPTS
        assert it.accept(listener, taken.active, taken.take, 0.0) is Outcome.EMPTY

    def test_no_more_than_the_limit_until_there_is_room(self, bed: Bed) -> None:
        listener, epoll, taken, _ = bed
        it = Listeners([listener], epoll, 2)
        it.resume(0, 0.0)
        connect(bed, 5)
        it.accept(listener, taken.active, taken.take, 0.0)
        assert len(taken.held) == 2
        assert not it.accepting
        assert epoll.poll(0) == [], "it is not woken for what it may not accept"
        it.resume(taken.active(), 0.0)
        assert not it.accepting
        taken.end(1)
        it.resume(taken.active(), 0.0)
        assert epoll.poll(0) != []
        it.accept(listener, taken.active, taken.take, 0.0)
        assert len(taken.held) == 2

    def test_out_of_descriptors_it_pauses_and_continues(self, bed: Bed) -> None:
        listener, epoll, taken, _ = bed
        it = Listeners([listener], epoll, 100)
        it.resume(0, 0.0)
        connect(bed, 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # A limit at the lowest free number: the next descriptor is one too many.
        spare = os.dup(listener.fileno())
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            outcome = it.accept(listener, taken.active, taken.take, 50.0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert outcome is Outcome.SHORT
        assert it.shortage == "Too many open files"
        assert (it.accepting, it.due) == (False, 50.0 + PAUSE)
        it.resume(0, 50.1)
        assert not it.accepting
        it.resume(0, 50.0 + PAUSE)
        assert (it.accepting, it.due) == (True, None)
        assert it.accept(listener, taken.active, taken.take, 51.0) is Outcome.EMPTY
        assert len(taken.held) == 2

    def test_drain_takes_what_waits_and_closes(self, bed: Bed) -> None:
        listener, epoll, taken, _ = bed
        it = Listeners([listener], epoll, 1000)
        it.resume(0, 0.0)
        address = listener.getsockname()
        connect(bed, 2 * ACCEPTS + 1)
        it.drain(taken.active, taken.take, 0.0)
        assert len(taken.held) == 2 * ACCEPTS + 1
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=60)
        it.resume(0, 1.0)
        assert not it.accepting
