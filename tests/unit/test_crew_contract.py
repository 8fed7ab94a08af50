"""The fakes that the supervisor is tested with do what the real ones do: here the fakes, and the real service manager."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crew_contract import CONTRACT, Fault, World, config_for
from fake_system import FakeCrew, FakeServiceManager, Trouble

from nfq_agent.host.systemd import ServiceManager
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.system import ServiceWords, Workers
from nfq_agent.service.worker import Worker, WorkerError


class FakeWorld:
    def __init__(self) -> None:
        self._trouble = Trouble()
        self._fake = FakeCrew(self._trouble)
        self.crew: Workers = self._fake

    def worker(self, number: int, fault: Fault = "", max_len: int = 100) -> Worker:
        if fault:
            # A worker that is added and one that replaces another; the title is the same.
            error = WorkerError("on purpose")
            self._trouble.fail |= {f"crew.add worker of queue {number}": error}
            if number in self._fake.queues:
                self._trouble.fail = {f"crew.replace worker of queue {number}": error}
        config = config_for(number, "", max_len)
        return QueueWorker("main", number, config, User(0, 0), Log(lambda _: True, "error", float), tuple)

    def serves(self, worker: Worker) -> bool:
        return worker in self._fake.serving


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_fake_crew(promise: Callable[[World], None]) -> None:
    promise(FakeWorld())


Heard = Callable[[], list[str]]


@pytest.fixture(params=["fake", "real"])
def service(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ServiceWords, Heard]]:
    """A service manager and what was said to it."""
    if request.param == "fake":
        fake = FakeServiceManager(3.0)
        yield fake, lambda: fake.said
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "3000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        heard: list[str] = []

        def hear() -> list[str]:
            while True:
                try:
                    # The time stamp of a reload is not compared.
                    heard.append(end.recv(4096).decode().partition("\n")[0])
                except BlockingIOError:
                    return heard

        real = ServiceManager()
        yield real, hear
        real._notifier.socket.close()  # noqa: SLF001  # the library never closes it


def test_what_a_service_manager_is_told(service: tuple[ServiceWords, Heard]) -> None:
    manager, heard = service
    manager.ready()
    manager.reloading()
    manager.status("serving")
    manager.status("serving")
    manager.alive()
    manager.status("ending")
    manager.stopping()
    assert heard() == [
        "READY=1", "RELOADING=1", "STATUS=serving", "WATCHDOG=1", "STATUS=ending", "STOPPING=1"
    ]  # fmt: skip
    assert manager.watchdog == 3.0


def test_a_service_manager_that_does_not_read_does_not_hold_the_agent_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        manager = ServiceManager()
        # A socket takes some ten unread datagrams (max_dgram_qlen of unix(7)); then a send would block without end.
        for number in range(1000):
            manager.alive()
            manager.status(str(number))
        # It reads again, and is told what counts.
        while end.recv(4096) != b"WATCHDOG=1":
            pass
        manager.stopping()
        end.settimeout(5)
        while end.recv(4096) != b"STOPPING=1":
            pass
        manager._notifier.socket.close()  # noqa: SLF001  # the library never closes it
