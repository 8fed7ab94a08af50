"""Words to the service manager (sd_notify(3)); the only importer of sdnotify. Without a service manager they go nowhere."""

from __future__ import annotations

import os
import time

import sdnotify


class ServiceManager:
    """What systemd is told, and how often it wants to hear from us."""

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
        self._say("READY=1")

    def reloading(self) -> None:
        """A reload begins; the time stamp is what Type=notify-reload asks for."""
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The stop begins."""
        self._say("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._say("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; said only when it changed."""
        if text != self._status:
            self._status = text
            self._say(f"STATUS={text}")

    def _say(self, words: str) -> None:
        self._notifier.notify(words)
