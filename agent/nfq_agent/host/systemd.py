"""Notifications to the service manager (sd_notify(3)); the only importer of sdnotify. Without a service manager they are lost.

A service manager that does not read its socket must not stop the agent: what it does not take at once is lost, and only the
notifications that it waits for are tried for a short while.
"""

from __future__ import annotations

import os
import time
from typing import Final

import sdnotify

# How long, in seconds, a notification that systemctl waits for is tried while the socket is full.
_PATIENCE: Final = 2.0


class ServiceManager:
    """What systemd is told, and how often it wants to be told that the agent is alive."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        self._status = ""

    @property
    def watchdog(self) -> float | None:
        """Seconds within which WATCHDOG=1 is due; None where no watchdog is set for this process (sd_watchdog_enabled(3))."""
        pid = os.environ.get("WATCHDOG_PID")
        usec = os.environ.get("WATCHDOG_USEC")
        if not usec or (pid and int(pid) != os.getpid()):
            return None
        return int(usec) / 1e6

    def ready(self) -> None:
        """Start-up, or a reload, is complete."""
        self._say("READY=1", _PATIENCE)

    def reloading(self) -> None:
        """A reload begins; the time stamp is what Type=notify-reload asks for."""
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

    def _say(self, words: str, patience: float = 0.0) -> None:
        if self._notifier.socket is not None:
            self._notifier.socket.settimeout(patience)
        self._notifier.notify(words)
