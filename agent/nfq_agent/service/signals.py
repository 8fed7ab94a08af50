"""What signals ask of the supervisor: noted when they arrive, and done in its next turn."""

from __future__ import annotations

import os
import selectors
import signal
from typing import Final

from nfq_agent.host.reexec import take_signals

_STOP: Final = (signal.SIGTERM, signal.SIGINT)
_RELOAD: Final = signal.SIGHUP
# RestartKillSignal= of the unit: the next process takes everything over.
_RESTART: Final = signal.SIGUSR2


class Signals:
    """stop, reload, restart: whether that was asked for."""

    def __init__(self) -> None:
        self.stop = False
        self.reload = False
        self.restart = False
        self._ends: tuple[int, ...] = ()

    @property
    def over(self) -> bool:
        """Whether this process has to end."""
        return self.stop or self.restart

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that a child must not keep open."""
        return self._ends

    def catch(self, selector: selectors.BaseSelector) -> None:
        """Note signals from now on, and let them wake the selector."""
        self._ends = reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*_STOP, _RELOAD, _RESTART):
            signal.signal(number, self._signalled)
        take_signals()
        selector.register(reader, selectors.EVENT_READ, lambda: os.read(reader, 512))

    def _signalled(self, number: int, _: object) -> None:
        if number == _RELOAD:
            self.reload = True
        elif number == _RESTART:
            self.restart = True
        else:
            self.stop = True

    def close(self) -> None:
        """Stop signals from waking the selector."""
        signal.set_wakeup_fd(-1)
        for end in self._ends:
            os.close(end)
