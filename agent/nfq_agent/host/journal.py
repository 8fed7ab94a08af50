"""Where log events go: the journal's native socket, or standard error. A write that would block is dropped."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from nfq_agent import log
from nfq_agent.log import Log, LogEvent

_SOCKET: Final = "/run/systemd/journal/socket"
_STDERR: Final = 2
# A pipe that is writable takes this much without blocking (PIPE_BUF, pipe(7)).
_ATOMIC: Final = 4096


def open_log(
    kind: Literal["auto", "console", "json", "journal"], level: str, shows: Callable[[Mapping[str, Any]], bool] | None = None
) -> Log:
    """The log of a kind, from a level on. `auto` is the journal where standard error leads there, else the console.

    shows: as in `Log`.
    """
    if kind == "auto":
        kind = "journal" if _stderr_is_journal() else "console"
    if kind == "journal":
        return Log(_journal_sink(), level, time.time, shows)
    if kind == "json":
        return Log(_stream_sink(lambda event: log.as_json(event, _ATOMIC)), level, time.time, shows)
    colour = os.isatty(_STDERR) and "NO_COLOR" not in os.environ
    return Log(_stream_sink(lambda event: log.console(event, colour)), level, time.time, shows)


def _stderr_is_journal() -> bool:
    """True if systemd connected standard error to the journal (JOURNAL_STREAM, systemd.exec(5))."""
    wanted = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(_STDERR)
    except OSError:
        return False
    return wanted == f"{status.st_dev}:{status.st_ino}"


def _journal_sink() -> Callable[[LogEvent], bool]:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def write(event: LogEvent) -> bool:
        data = log.journal(event)
        try:
            # Not connected, so that a restarted journald is found again.
            end.sendto(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, _SOCKET)
        except OSError:
            return False
        return True

    return write


def _stream_sink(render: Callable[[LogEvent], bytes]) -> Callable[[LogEvent], bool]:
    poller = select.poll()
    poller.register(_STDERR, select.POLLOUT)

    def write(event: LogEvent) -> bool:
        data = render(event)
        if len(data) > _ATOMIC:
            data = data[: _ATOMIC - 1] + b"\n"
        try:
            ready = poller.poll(0)
            if not ready or ready[0][1] & (select.POLLERR | select.POLLNVAL):
                return False
            return os.write(_STDERR, data) == len(data)
        except OSError:
            return False

    return write
