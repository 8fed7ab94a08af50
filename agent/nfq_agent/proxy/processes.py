"""Further processes of one proxy on the same listeners. The first one starts them, passes on its control words, and ends last."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence

from nfq_agent.counters import Slots
from nfq_agent.host.child import Child, NotReady


class Sibling:
    """A process that runs `body(control, counters)` until its control socket tells it to end, or is closed."""

    def __init__(
        self, body: Callable[[socket.socket, Slots], None], names: tuple[str, ...], close: Sequence[socket.socket]
    ) -> None:
        """Fork. names: of its counters. close: sockets that the new process must not keep open. Raises OSError."""
        self.counters = Slots(names)

        def life(control: socket.socket) -> None:
            for each in close:
                each.close()
            body(control, self.counters)

        self._child = Child("another process of the proxy", life)
        self.pid = self._child.pid
        self.control = self._child.control

    def wait_ready(self, seconds: float) -> None:
        """Return once it serves. Raises ChildProcessError if it does not."""
        try:
            self._child.wait_ready(seconds)
        except NotReady as error:
            raise ChildProcessError(str(error)) from error

    def tell(self, word: bytes) -> None:
        """Send a word to it; it is lost if the process has ended."""
        self._child.tell(word)

    def end(self, deadline: float) -> None:
        """Reap it; kill it if it still runs at `deadline` (monotonic seconds)."""
        if not self._child.wait_end(deadline - time.monotonic()):
            self._child.kill()
        self._child.reap(block=True)
