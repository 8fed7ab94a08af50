"""When a process of a proxy ends: control words and times come in, what is due comes out. No I/O, no clock."""

from __future__ import annotations

import math

from nfq_agent.host.child import DRAIN, LEAVE, STOP


class Ending:
    """The end of one process: at once, or once its connections have ended, or a time has passed.

    draining: no further connection is accepted. due: the time by which the process ends, None until the backlog was accepted.
    over: it ends now.
    """

    def __init__(self, drain: float) -> None:
        """drain: seconds that connections may continue."""
        self._configured = self._drain = drain
        self.draining = False
        self.due: float | None = None
        self.over = False

    def on_control(self, words: bytes, now: float) -> None:
        """The control words STOP, DRAIN and LEAVE: end, drain for the configured time, drain without a limit."""
        if STOP in words:
            self.over = True
        elif DRAIN in words or LEAVE in words:
            self.draining = True
            self._drain = self._configured if DRAIN in words else math.inf
            if self.due is not None:
                self.due = min(self.due, now + self._drain)

    @property
    def begins(self) -> bool:
        """Whether the backlog is to be accepted for the last time."""
        return self.draining and self.due is None

    def begun(self, now: float, empty: bool) -> None:
        """The backlog was accepted. empty: no connection is left."""
        self.due = now + self._drain
        self.over = self.over or empty

    def look(self, now: float, empty: bool) -> None:
        """Time has passed. empty: no connection is left."""
        if self.due is not None and (self.due <= now or empty):
            self.over = True
