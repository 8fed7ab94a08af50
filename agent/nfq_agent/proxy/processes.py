"""Further processes of one proxy on the same listeners: the first one starts them, tells them what it is told, and ends last."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence

from nfq_agent.counters import Slots
from nfq_agent.host.child import end_after


class Sibling:
    """A process that runs `body(control, counters)` until its control socket says so, or ends."""

    def __init__(
        self, body: Callable[[socket.socket, Slots], None], names: tuple[str, ...], close: Sequence[socket.socket]
    ) -> None:
        """Fork. names: of its counters. close: sockets that are not its to keep. Raises OSError."""
        self.counters = Slots(names)
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:

            def life() -> None:
                for each in (self.control, *close):
                    each.close()
                body(theirs, self.counters)

            end_after(life)
        theirs.close()

    def wait_ready(self, seconds: float) -> None:
        """Return once it serves. Raises ChildProcessError if it does not."""
        self.control.settimeout(seconds)
        try:
            word = self.control.recv(64)
        except TimeoutError:
            word = b""
        if word != b"ready\n":
            raise ChildProcessError(f"process {self.pid} of the proxy did not get ready; see the lines above")

    def tell(self, word: bytes) -> None:
        """Say a word to it; one that is gone does not hear it."""
        with contextlib.suppress(OSError):
            self.control.send(word, socket.MSG_NOSIGNAL)

    def end(self, deadline: float) -> None:
        """Reap it, and kill it if it still runs at `deadline` (monotonic seconds)."""
        pidfd = os.pidfd_open(self.pid)
        try:
            if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        finally:
            os.close(pidfd)
            self.control.close()
