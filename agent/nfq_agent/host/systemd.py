"""Notifications to the service manager, and its descriptor store (sd_notify(3), sd_listen_fds(3)); the only importer of sdnotify.

Without a service manager notifications are lost.

A service manager that does not read its socket must not stop the agent: a notification that it does not take at once is lost;
only the
notifications that it waits for are tried for a short while.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

import sdnotify

# The first descriptor that is passed to a service (SD_LISTEN_FDS_START of sd-daemon.h).
_FIRST: Final = 3
# How long, in seconds, a notification that systemctl waits for is tried while the socket is full.
_PATIENCE: Final = 2.0


class ServiceManager:
    """The notifications to systemd, and how often it expects a sign of life."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        self._status = ""

    @property
    def watchdog(self) -> float | None:
        """Seconds within which WATCHDOG=1 is due; None if no watchdog is set for this process (sd_watchdog_enabled(3))."""
        pid = os.environ.get("WATCHDOG_PID")
        usec = os.environ.get("WATCHDOG_USEC")
        if not usec or (pid and int(pid) != os.getpid()):
            return None
        return int(usec) / 1e6

    def ready(self) -> None:
        """Start-up, or a reload, is complete."""
        self._say("READY=1", _PATIENCE)

    def reloading(self) -> None:
        """A reload begins; Type=notify-reload needs the time stamp."""
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", _PATIENCE)

    def stopping(self) -> None:
        """The stop begins."""
        self._say("STOPPING=1", _PATIENCE)

    def alive(self) -> None:
        """Feed the watchdog."""
        self._say("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only when it changed."""
        if text != self._status:
            self._status = text
            self._say(f"STATUS={text}")

    @property
    def stores(self) -> bool:
        """Whether it keeps descriptors for the next start of this service: FDSTORE is set by systemd 254, and by our unit."""
        return self._notifier.socket is not None and os.environ.get("FDSTORE", "0") != "0"

    def keep(self, name: str, descriptor: int, polled: bool) -> None:
        """Have it keep a copy for the next start. polled: it closes the copy when the other end is closed. Raises OSError.

        Without `polled`, since a packet socket that was full reads as broken (ENOBUFS), and would be closed in silence.
        """
        words = f"FDSTORE=1\nFDNAME={name}" + ("" if polled else "\nFDPOLL=0")
        self._socket.settimeout(_PATIENCE)
        socket.send_fds(self._socket, [words.encode()], [descriptor])

    def forget(self, name: str) -> None:
        """Have it close every copy of this name. Raises OSError."""
        self._socket.settimeout(_PATIENCE)
        self._socket.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())

    def close(self) -> None:
        """Send no further notification."""
        if self._notifier.socket is not None:
            self._notifier.socket.close()

    @property
    def _socket(self) -> socket.socket:
        found: socket.socket | None = self._notifier.socket
        if found is None:
            raise OSError("there is no service manager")
        return found

    def _say(self, words: str, patience: float = 0.0) -> None:
        if self._notifier.socket is not None:
            self._notifier.socket.settimeout(patience)
        self._notifier.notify(words)


def passed() -> dict[str, int]:
    """The descriptors that the service manager passed to this process, by name; a second call returns nothing.

    Of several with one name the last one counts, and the others are closed.
    """
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, int] = {}
    for descriptor, name in enumerate(names.split(":")[: int(count)], _FIRST):
        os.set_inheritable(descriptor, False)
        if name in found:
            os.close(found[name])
        found[name] = descriptor
    return found
