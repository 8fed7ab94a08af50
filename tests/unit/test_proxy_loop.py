"""The proxy's loop on loopback, without rules: whatever connects to the listener goes to the target."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.proxy.deadlines import Timeouts
from nfq_agent.proxy.loop import Proxy
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.stream import StreamChain


class Echo:
    """A server that sends back what it gets, in one thread for each connection."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    @staticmethod
    def _echo(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                client.sendall(data)

    def close(self) -> None:
        self.listener.close()


class Running:
    """A proxy in a thread. compiled: what carries its connections, plain_pairs.pyx or relay.py."""

    compiled = True

    def __init__(self, target: int, **settings: Any) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.counters = Slots(tuple(PROXY_COUNTERS))
        self.said: list[str] = []
        self.control, theirs = socket.socketpair()
        self._theirs = theirs
        proxy = Proxy(
            [self.listener], StreamChain([]), ProxySettings("tcp", target=("127.0.0.1", target), **settings), self.counters,
            theirs, self._emit, compiled=self.compiled,
        )  # fmt: skip

        def live() -> None:
            try:
                proxy.run()
            finally:
                proxy.close()

        self.thread = threading.Thread(target=live, daemon=True)
        self.thread.start()
        self.control.settimeout(60)
        assert self.control.recv(64) == b"ready\n"

    def _emit(self, message: str, level: str = "info", **fields: Any) -> None:
        self.said.append(message)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def until(self, name: str, value: int) -> None:
        deadline = time.monotonic() + 60
        while (there := self.counters.snapshot()[name]) != value:
            assert time.monotonic() < deadline, f"{name} is {there}, not {value}"
            time.sleep(0.002)

    def until_closed(self) -> None:
        """Until nothing can connect to it any more."""
        while True:
            try:
                self.connect().close()
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                # The listener was closed while this connection waited for it.
                continue

    def stop(self) -> None:
        self.control.send(b"stop\n")
        self.thread.join(60)
        assert not self.thread.is_alive()
        for each in (self.listener, self.control, self._theirs):
            each.close()


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled", "python"])
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One contract for both."""
    monkeypatch.setattr(Running, "compiled", request.param)


@pytest.fixture
def echo() -> Iterator[Echo]:
    it = Echo()
    yield it
    it.close()


@contextlib.contextmanager
def running(echo: Echo | None, **settings: Any) -> Iterator[Running]:
    """A proxy to the server; to a port that nothing listens on without one."""
    with socket.socket() as unused:
        # Kept, so that neither the proxy's listener nor its own end of the connection gets that port.
        unused.bind(("127.0.0.1", 0))
        it = Running(unused.getsockname()[1] if echo is None else echo.port, **settings)
        try:
            yield it
        finally:
            it.stop()


def test_there_and_back(echo: Echo) -> None:
    with running(echo) as proxy, proxy.connect() as client:
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(10) == b""
        proxy.until("active", 0)
        counted = proxy.counters.snapshot()
        assert (counted["connections"], counted["bytes_forward"], counted["bytes_reverse"]) == (1, 5, 5)


def test_no_more_connections_than_max_connections(echo: Echo) -> None:
    """Three of five are carried; the others wait in the backlog, and each is served when one has ended."""
    with running(echo, max_connections=3) as proxy, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in range(5)]
        for client in clients:
            client.sendall(b"x")
        for client in clients[:3]:
            assert client.recv(1) == b"x"
        # What waits would be answered within a millisecond or two.
        assert select.select(clients[3:], [], [], 0.2)[0] == []
        assert proxy.counters.snapshot()["active"] == 3
        for ended, client in zip(clients, clients[3:], strict=False):
            ended.close()
            assert client.recv(1) == b"x"
            proxy.until("active", 3)
        assert proxy.counters.snapshot()["connections"] == 5


def test_drain_ends_when_the_last_connection_does(echo: Echo) -> None:
    with running(echo, drain=30.0) as proxy:
        with proxy.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            proxy.control.send(b"drain\n")
            proxy.until_closed()
            client.sendall(b"y")
            assert client.recv(1) == b"y"
        proxy.thread.join(60)
        assert not proxy.thread.is_alive()


def test_nothing_listens_at_the_target() -> None:
    with running(None) as proxy:
        # The reset may come before connect() has returned.
        with pytest.raises(ConnectionResetError), proxy.connect() as client:
            client.recv(1)
        proxy.until("failed_upstream", 1)
        assert any("cannot connect" in line for line in proxy.said)


def test_clients_that_say_nothing_do_not_shut_others_out(echo: Echo) -> None:
    """All places are taken by clients that send nothing; they are ended, and those that wait are served."""
    with running(echo, max_connections=5, timeouts=Timeouts(opening=3.0)) as proxy, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(proxy.connect()) for _ in range(5)]
        proxy.until("active", 5)
        client = stack.enter_context(proxy.connect())
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        for each in silent:
            with pytest.raises(ConnectionResetError):
                each.recv(1)
        proxy.until("timed_out", 5)
        # The sixth waited in the backlog until there was room.
        assert proxy.counters.snapshot()["full"] > 0
        assert sum("no byte was carried within 3 s" in line for line in proxy.said) == 5


def test_when_it_is_full_idle_connections_end_sooner(echo: Echo) -> None:
    """One byte each, which is carried; they would have an hour. It says that it is full, and ends them to make room."""
    with running(echo, max_connections=50, timeouts=Timeouts(full=0.2)) as proxy, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(proxy.connect()) for _ in range(50)]
        for each in idle:
            each.sendall(b"1")
            assert each.recv(1) == b"1"
        # No client waits: nothing is ended.
        time.sleep(1.5)
        assert proxy.counters.snapshot()["active"] == 50
        client = stack.enter_context(proxy.connect())
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        assert proxy.counters.snapshot()["full"] > 0
        assert proxy.counters.snapshot()["timed_out"] == 50
        assert any("full: 50 connections run" in line for line in proxy.said)


def test_silence_ends_a_connection(echo: Echo) -> None:
    reasons = {
        Timeouts(idle=3.0): "no byte either way for 3 s",
        Timeouts(client=3.0): "the client sent and took no byte for 3 s",
        Timeouts(server=3.0): "the server sent and took no byte for 3 s",
    }
    with contextlib.ExitStack() as stack:
        proxies = {stack.enter_context(running(echo, timeouts=timeouts)): reason for timeouts, reason in reasons.items()}
        clients = {proxy: stack.enter_context(proxy.connect()) for proxy in proxies}
        # Longer than the limit, but never silent for that long.
        for _ in range(6):
            for client in clients.values():
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            time.sleep(0.6)
        for proxy, client in clients.items():
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            assert any(proxies[proxy] in line for line in proxy.said)


def test_no_more_than_max_per_source(echo: Echo) -> None:
    with running(echo, max_per_source=2) as proxy, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(proxy.connect()) for _ in range(2))
        for each in (first, second):
            each.sendall(b"x")
            assert each.recv(1) == b"x"
        # It may be reset before connect() has returned.
        with pytest.raises(ConnectionResetError), proxy.connect() as third:
            third.recv(1)
        assert any("its source has 2 connections already (max_per_source)" in line for line in proxy.said)
        other = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 60, source_address=("127.0.0.2", 0)))
        other.sendall(b"y")
        assert other.recv(1) == b"y"
        proxy.until("active", 3)
        first.close()
        proxy.until("active", 2)
        again = stack.enter_context(proxy.connect())
        again.sendall(b"z")
        assert again.recv(1) == b"z"
