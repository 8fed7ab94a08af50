"""The real crew with real processes, on a fake kernel's queues: its contract, deaths, and processes that drain."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from crew_contract import CONTRACT, World, config_for
from crew_world import RealWorld
from fake_queue import FakeKernel, FakeWire
from ports import free_port
from queued import NUMBER

from nfq_agent.capture.following import Followed
from nfq_agent.config.models import Config
from nfq_agent.host.users import User
from nfq_agent.service.crew import workers_of
from nfq_agent.service.interface_worker import InterfaceWorker
from nfq_agent.service.proxy_worker import ProxyWorker
from nfq_agent.service.restarts import MOST_DEATHS
from nfq_agent.service.worker import Worker, WorkerError

# The fake kernel answers in a thread; the child processes do not touch it.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    fake = FakeKernel()
    fake.install(monkeypatch)
    yield fake
    fake.close()


@pytest.fixture
def world(kernel: FakeKernel) -> Iterator[RealWorld]:
    # No right is needed: the fake kernel checks none.
    made = RealWorld(User(os.geteuid(), os.getegid()), keep=())
    yield made
    made.close()


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_real_crew(world: RealWorld, promise: Callable[[World], None]) -> None:
    promise(world)


def until(world: RealWorld, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, world.lines
        world.turn(0.05)


def test_a_worker_that_dies_is_started_again_and_its_packets_are_answered(world: RealWorld, kernel: FakeKernel) -> None:
    wire = FakeWire(kernel)
    worker = world.worker(NUMBER)
    world.crew.add([worker])
    wire.send(b"before")
    assert wire.arrived(1) == [b"before"]
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(world, lambda: worker.pid not in (first, None))
    assert (
        f"worker of queue {NUMBER} (pid {first}) died: SIGKILL; it is started again, and the rules stay in place" in world.lines
    )
    assert worker.restarts == 1
    wire.send(b"after")
    assert wire.arrived(1) == [b"after"]


def test_a_worker_that_keeps_dying_is_an_error(world: RealWorld) -> None:
    worker = world.worker(NUMBER)
    world.crew.add([worker])

    def die_for_ever() -> None:
        while True:
            if worker.child is not None:
                worker.child.kill()
            world.turn(0.05)

    with pytest.raises(WorkerError, match=rf"died {MOST_DEATHS} times within .* s, the last time by SIGKILL"):
        die_for_ever()
    worker.stop()


def test_a_worker_that_does_not_stop_is_killed(world: RealWorld) -> None:
    worker = world.worker(NUMBER)
    world.crew.add([worker])
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    world.crew.retire([worker])
    assert f"worker of queue {NUMBER} did not stop within 2 s and was killed" in world.lines
    assert world.crew.workers == []


def proxy(world: RealWorld, port: int, **options: Any) -> ProxyWorker:
    config = Config.model_validate({"proxy": {"p": {"listen": [f"127.0.0.1:{port}"], "target": "127.0.0.1:1", **options}}})
    (made,) = workers_of(config, world.user, world.log, lambda: world.crew.descriptors)
    world.with_rights(made)
    assert isinstance(made, ProxyWorker)
    return made


@pytest.fixture
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marking a socket needs a right that a unit test does not have."""
    monkeypatch.setattr("nfq_agent.proxy.upstream.set_mark", lambda sock, mark: None)  # as it is called


def end(connection: socket.socket) -> None:
    """Close it, although a process that was forked since then has a copy."""
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def echo(port: int) -> socket.socket:
    """A connection through the proxy, which has carried bytes."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(b"x")
    return client


@pytest.mark.usefixtures("unmarked")
def test_a_proxy_drains_beside_its_successor(world: RealWorld) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        target = f"127.0.0.1:{server.getsockname()[1]}"
        old, successor = proxy(world, port, target=target), proxy(world, port, target=target, drain="9s")
        assert successor.differs(old)
        world.crew.add([old])
        with echo(port) as client:
            peer, _ = server.accept()
            assert peer.recv(1) == b"x"
            world.crew.replace(old, successor)
            assert world.crew.proxies == {"p": successor}
            # The connection of the old process continues, and a new one is served.
            peer.sendall(b"y")
            assert client.recv(1) == b"y"
            with echo(port):
                other, _ = server.accept()
                assert other.recv(1) == b"x"
                assert successor.counted["connections"] == 2
                end(other)
            end(peer)
            assert client.recv(1) == b""
        world.crew.retire([successor])
        world.crew.wait_for_leaving()
    assert not any("killed" in line for line in world.lines)


@pytest.mark.usefixtures("unmarked")
def test_a_proxy_that_does_not_end_in_its_drain_time_is_killed(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        worker = proxy(world, port, target=f"127.0.0.1:{server.getsockname()[1]}", drain="100ms")
        world.crew.add([worker])
        with echo(port):
            server.accept()[0].close()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGSTOP)
            monkeypatch.setattr(worker, "ends_within", 0.2)
            world.crew.retire([worker])
            world.crew.wait_for_leaving()
    assert "proxy p did not end within its drain time and was killed" in world.lines


class Looker(InterfaceWorker):
    """A worker of interfaces whose process only notes what it is told."""

    kind = "tap"
    columns = ("judged",)

    def __init__(self, world: RealWorld, patterns: list[str]) -> None:
        config = Config.model_validate({"tap": {"t": {"interfaces": patterns}}})
        super().__init__("t", config.tap["t"], config, world.user, world.log, lambda: world.crew.descriptors)
        world.with_rights(self)
        self.entered: list[str] = []
        self.forgotten: list[str] = []

    def differs(self, other: Looker) -> bool:
        return self.selection != other.selection

    def enter(self, followed: Followed) -> None:
        if followed.link.name == "gone0":
            raise OSError("it cannot be opened")
        self.entered.append(followed.link.name)
        self._tell(f"add {followed.link.index}", [])

    def left(self, followed: Followed) -> None:
        self.forgotten.append(followed.link.name)

    def body(self, control: socket.socket) -> None:
        emit = self.prepare()
        control.send(b"ready\n")
        control.settimeout(0.1)
        told = b""
        while b"stop" not in told:
            self.pulse.beat()
            try:
                told = control.recv(4096)
            except TimeoutError:
                continue
            for line in told.split(b"\n")[:-1]:
                emit(f"told {line.decode()}")
                self.table.add(0, "judged", line.startswith(b"add"))


def test_a_worker_of_interfaces_is_told_those_that_it_follows(world: RealWorld) -> None:
    worker = Looker(world, ["lo"])
    world.crew.add([worker])
    assert world.crew.captures == {("tap", "t"): worker}
    assert worker.entered == ["lo"]
    until(world, lambda: worker.total() == {"judged": 1})
    ((link, _, counts),) = worker.interfaces()
    assert (link.name, counts) == ("lo", {"judged": 1})
    # What a successor serves begins where this one ends.
    successor = Looker(world, ["lo", "lo*"])
    assert successor.differs(worker)
    world.crew.replace(worker, successor)
    until(world, lambda: successor.total() == {"judged": 2})
    # A worker that dies is told all interfaces again.
    assert successor.pid is not None
    os.kill(successor.pid, signal.SIGKILL)
    until(world, lambda: successor.entered == ["lo", "lo"])
    until(world, lambda: successor.total() == {"judged": 3})
    world.crew.retire([successor])
    assert world.crew.captures == {}


def test_an_interface_that_cannot_be_taken_is_logged_and_one_that_leaves_is_forgotten(
    world: RealWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Looker(world, ["lo", "gone0", "more*"])
    world.crew.add([worker])
    (lo,) = [link for link, _, _ in worker.interfaces()]
    gone, more = replace(lo, index=901, name="gone0"), replace(lo, index=902, name="more0")
    monkeypatch.setattr("nfq_agent.service.interface_worker.links", lambda: [lo, gone, more])
    changes: list[Any] = [[(gone, False), (more, False)], None, [(more, True)]]
    assert worker._links is not None  # noqa: SLF001  # the socket's news are given here
    monkeypatch.setattr(worker._links, "changes", lambda: changes.pop(0))  # noqa: SLF001  # likewise
    (follow,) = worker.follows.values()
    follow()
    assert "tap t: gone0 cannot be taken: it cannot be opened" in world.lines
    assert worker.entered == ["lo", "more0"]
    # Messages were lost: all interfaces are listed again, and nothing is taken twice.
    follow()
    assert worker.entered == ["lo", "more0"]
    follow()
    assert worker.forgotten == ["more0"]
    assert [link.name for link, _, _ in worker.interfaces()] == ["lo"]


def test_the_workers_of_a_configuration() -> None:
    config = Config.model_validate(
        {
            "queue": {"main": {"balance": "4:5"}},
            "proxy": {"p": {"listen": ["127.0.0.1:1"]}},
            "tap": {"t": {"interfaces": ["lo"]}},
            "inline": {"i": {"interfaces": ["lo"]}},
        }
    )
    made: list[Worker] = workers_of(config, User(0, 0), RealWorld(User(0, 0)).log, tuple)
    assert [worker.key for worker in made] == [
        ("queue", 4), ("queue", 5), ("proxy", "p"), ("tap", "t"), ("inline", "i"),
    ]  # fmt: skip
    again = workers_of(config, User(0, 0), RealWorld(User(0, 0)).log, tuple)
    assert not any(worker.differs(other) for worker, other in zip(made, again, strict=True))
    (other,) = workers_of(config_for(4, "", 7), User(0, 0), RealWorld(User(0, 0)).log, tuple)
    assert other.differs(made[0])
