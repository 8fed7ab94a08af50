"""What the tests of the queue library share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import pytest

from nfq_agent import (
    Packet,
    Queue,
    Verdict,
)

# Packets that are cut, and packets that are copied whole.
RANGES = pytest.mark.parametrize("copy_range", [2000, 65535])


class AnyWire(Protocol):
    """A sender and a receiver, with the queue NUMBER between them."""

    def send(self, *messages: bytes) -> None:
        """Send each as one datagram."""

    def arrived(self, count: int) -> list[bytes]:
        """The next `count` datagrams; fails if they do not come."""

    def nothing_more(self) -> bool:
        """True if no further datagram has arrived."""

    def waiting(self) -> int:
        """Packets that wait in the queue."""


@contextmanager
def serving(queue: Queue, callback: Callable[[Packet], Verdict]) -> Iterator[None]:
    """Within this, the queue runs in a thread of its own."""
    thread = threading.Thread(target=queue.run, args=(callback,))
    thread.start()
    try:
        yield
    finally:
        queue.stop()
        thread.join(60)
        assert not thread.is_alive()
