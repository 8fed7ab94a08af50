"""What keeps descriptors beyond a process: one contract, for the fake and for systemd's protocol (service.store.Keeper)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

from nfq_agent.host.systemd import ServiceManager
from nfq_agent.service.store import Keeper


class FakeKeeper:
    """Keeps copies in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}

    def keep(self, name: str, descriptor: int, polled: bool) -> None:
        self.kept.setdefault(name, []).append(os.dup(descriptor))

    def forget(self, name: str) -> None:
        for descriptor in self.kept.pop(name, []):
            os.close(descriptor)


class ManagerSocket:
    """The service manager's end: keeps what is sent to it as systemd does (service_notify_message() in its service.c)."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(path)
        self._kept: dict[str, list[int]] = {}
        self.polled: dict[str, bool] = {}

    @property
    def kept(self) -> dict[str, list[int]]:
        """What was sent to it so far."""
        while select.select([self._socket], [], [], 0)[0]:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 16)
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            if words.get("FDSTORE") == "1":
                self._kept.setdefault(words["FDNAME"], []).extend(descriptors)
                self.polled[words["FDNAME"]] = words.get("FDPOLL") != "0"
            elif words.get("FDSTOREREMOVE") == "1":
                for descriptor in self._kept.pop(words["FDNAME"], []):
                    os.close(descriptor)
        return self._kept

    def close(self) -> None:
        """Close everything."""
        for descriptors in self.kept.values():
            for descriptor in descriptors:
                os.close(descriptor)
        self._socket.close()


@contextlib.contextmanager
def manager(folder: str) -> Iterator[tuple[ManagerSocket, ServiceManager]]:
    """Systemd's protocol between our end and one that keeps as systemd does."""
    end = ManagerSocket(f"{folder}/notify")
    before = os.environ.get("NOTIFY_SOCKET")
    os.environ["NOTIFY_SOCKET"] = f"{folder}/notify"
    service = ServiceManager()
    try:
        yield end, service
    finally:
        service.close()
        if before is None:
            del os.environ["NOTIFY_SOCKET"]
        else:
            os.environ["NOTIFY_SOCKET"] = before
        end.close()


def alive(reader: int) -> bool:
    """Whether any process has the other end of a pipe."""
    return not select.select([reader], [], [], 0)[0]


def check_keeper(keeper: Keeper, kept: Iterator[dict[str, list[int]]]) -> None:
    """The contract. kept: what it keeps, as often as asked."""
    reader, writer = os.pipe()
    keeper.keep("one", writer, True)
    keeper.keep("two", writer, False)
    assert sorted(next(kept)) == ["one", "two"]
    os.close(writer)
    assert alive(reader), "a copy outlives the caller's"
    keeper.forget("one")
    assert list(next(kept)) == ["two"]
    assert alive(reader)
    keeper.forget("nothing of this name")
    keeper.forget("two")
    assert next(kept) == {}
    assert not alive(reader), "no copy is left"
    os.close(reader)
