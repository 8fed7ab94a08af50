"""Fixtures of the unit tests."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from answering import Answering


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What stands for the queue's socket, and what stands for the kernel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.settimeout(60)
        yield ours, theirs


@pytest.fixture
def kept_signals() -> Iterator[None]:
    """Restore the signal handlers that a supervisor sets."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def agent(run_folder: Path) -> Iterator[Answering]:
    assert run_folder.is_dir()
    made = Answering()
    yield made
    made.close()
