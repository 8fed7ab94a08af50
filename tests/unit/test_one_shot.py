"""One-shot processes: they answer, raise, are bounded, and end with their caller."""

from __future__ import annotations

import os
import select
import signal
import struct
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from nfq_agent.host.one_shot import OneShot, OneShotError, one_shot
from nfq_agent.rules.model import RuleError


def test_a_one_shot_answers_raises_and_is_bounded() -> None:
    assert one_shot(lambda first, second: first + second, 1, 2) == 3
    with pytest.raises(RuleError, match="no"):
        one_shot(_fail)
    with pytest.raises(OneShotError, match="SIGKILL"):
        one_shot(_kill_myself)
    with pytest.raises(OneShotError, match="SIGALRM"):
        one_shot(time.sleep, 30, seconds=1)


def test_half_an_answer_is_none() -> None:
    """Of a child that is killed, as for want of memory, while it writes its answer."""
    child = OneShot(lambda: "a" * 1_000_000)
    waiting = 0
    deadline = time.monotonic() + 10
    while waiting < select.PIPE_BUF and time.monotonic() < deadline:
        (waiting,) = struct.unpack("i", ioctl(child._reader, termios.FIONREAD, bytes(4)))  # noqa: SLF001  # how much is written
        time.sleep(0.01)
    os.kill(child._child, signal.SIGKILL)  # noqa: SLF001  # nothing else knows its pid
    with pytest.raises(OneShotError, match="ended without an answer: SIGKILL"):
        child.result()


def _fail() -> None:
    raise RuleError("no")


def _kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_one_shot_dies_with_its_caller(tmp_path: Path) -> None:
    """Otherwise rules could be inserted after the caller was killed, and after `remove`."""
    file = tmp_path / "pid"

    def wait() -> None:
        file.write_text(str(os.getpid()))
        time.sleep(30)

    caller = os.fork()
    if caller == 0:
        one_shot(wait)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    pidfd = os.pidfd_open(int(file.read_text()))
    os.kill(caller, signal.SIGKILL)
    os.waitpid(caller, 0)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_a_one_shot_is_finished_though_the_caller_is_told_to_stop() -> None:
    def signalled() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return "finished"

    assert one_shot(signalled) == "finished"
