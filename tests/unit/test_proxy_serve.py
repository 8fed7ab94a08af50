"""Several processes of one proxy on the same listeners: they start, count, drain and end together."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.host.child import DRAIN, READY, STOP
from nfq_agent.proxy import serve as serving
from nfq_agent.proxy.processes import Sibling
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.stream import StreamChain


def children() -> list[int]:
    """The pids of this process's children."""
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found


class Server:
    """A server that sends one line back and closes, in a thread."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client, contextlib.suppress(OSError):
                    client.sendall(b"got " + client.recv(100))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.listener.close()


class Proxied:
    """`serve` in this thread, and a test beside it in another, as the supervisor and the clients."""

    def __init__(self, server: Server, processes: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.counters = Slots(tuple(PROXY_COUNTERS))
        self.control, self._theirs = socket.socketpair()
        self.control.settimeout(30)
        self.settings = ProxySettings("tcp", target=("127.0.0.1", server.port), processes=processes, drain=5.0)
        self.failed: list[BaseException] = []

    def run(self, beside: Callable[[Proxied], None], chain_of: Callable[[], StreamChain] = lambda: StreamChain([])) -> None:
        def life() -> None:
            try:
                beside(self)
            except BaseException as error:
                self.failed.append(error)
                self.control.sendall(STOP)

        thread = threading.Thread(target=life)
        thread.start()
        try:
            serving.serve([self.listener], chain_of, self.settings, self.counters, self._theirs, _ignore)
        finally:
            thread.join()
            for each in (self.listener, self.control, self._theirs):
                each.close()
        if self.failed:
            raise self.failed[0]

    def ask(self, word: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            client.sendall(word)
            return client.recv(100)


def _ignore(message: str, level: str = "info", **fields: Any) -> None:
    del message, level, fields


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("word", [STOP, DRAIN])
def test_they_serve_and_end_together(server: Server, processes: int, word: bytes) -> None:
    proxied = Proxied(server, processes)
    pids: list[int] = []

    def beside(proxied: Proxied) -> None:
        assert proxied.control.recv(64) == READY
        pids.extend(children())
        assert [proxied.ask(b"%d" % number) for number in range(6)] == [b"got %d" % number for number in range(6)]
        proxied.control.sendall(word)

    before = children()
    proxied.run(beside)
    assert len(pids) - len(before) == processes - 1
    assert children() == before
    # Whichever process took them, they are counted once.
    assert proxied.counters.snapshot()["connections"] == 6


def test_a_sibling_that_dies_ends_the_proxy(server: Server) -> None:
    proxied = Proxied(server, 2)

    def beside(proxied: Proxied) -> None:
        assert proxied.control.recv(64) == READY
        (pid,) = set(children()) - set(before)
        os.kill(pid, 9)

    before = children()
    with pytest.raises(ChildProcessError, match=r"process \d+ of proxy tcp ended"):
        proxied.run(beside)
    assert children() == before


def test_a_chain_that_does_not_start_in_one_of_them_starts_none(server: Server) -> None:
    proxied = Proxied(server, 2)
    mine = os.getpid()

    def chain_of() -> StreamChain:
        if os.getpid() != mine:
            raise OSError("no such folder")
        return StreamChain([])

    before = children()
    with pytest.raises(ChildProcessError, match="another process of the proxy ended before it was ready"):
        proxied.run(lambda _: None, chain_of)
    assert children() == before


def test_where_one_fails_the_others_are_stopped_in_order(server: Server, tmp_path: Path) -> None:
    class Marking(StreamChain):
        def stop(self) -> None:
            (tmp_path / "stopped").touch()

    def chain_of() -> StreamChain:
        if os.getpid() == mine:
            raise OSError("no such folder")
        return Marking([])

    mine = os.getpid()
    with pytest.raises(OSError, match="no such folder"):
        Proxied(server, 2).run(lambda _: None, chain_of)
    assert (tmp_path / "stopped").exists()


def test_a_sibling_is_killed_at_its_deadline() -> None:
    def deaf(control: socket.socket, counters: Slots) -> None:
        counters.set("connections", 5)
        control.sendall(READY)
        time.sleep(60)

    mine, other = socket.socketpair()
    sibling = Sibling(deaf, ("connections",), [mine])
    sibling.wait_ready(10)
    began = time.monotonic()
    sibling.tell(STOP)
    sibling.end(began + 0.2)
    assert time.monotonic() - began >= 0.2
    assert sibling.counters.snapshot() == {"connections": 5}
    assert not os.path.exists(f"/proc/{sibling.pid}")
    for each in (mine, other, sibling.control):
        each.close()
