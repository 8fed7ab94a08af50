"""The order by which a waiting worker begins to serve: one line on its control socket, written here and read here."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Final, NamedTuple

from nfq_agent.host.child import GO, STOP
from nfq_agent.service.packet_source import Control

_LOST: Final = b"lost "


class Order(NamedTuple):
    """below: up to this number the predecessor may have left packets without a verdict; None if it left none.

    requeue: they are queued again, instead of answered with on_error. known: as `below`, in the queue of known flows.
    """

    below: int | None
    requeue: bool
    known: int | None = None

    @property
    def line(self) -> bytes:
        """As it is sent."""
        if self.below is None:
            return GO
        return b"%s%d %d %d\n" % (_LOST, self.below, self.requeue, -1 if self.known is None else self.known)


NOTHING_LOST: Final = Order(None, False)


def order_in(said: bytes) -> Order | None:
    """The order that was sent; None if it is to end."""
    if not said or STOP in said:
        return None
    if said.startswith(_LOST):
        below, requeue, known = said.partition(b"\n")[0].split()[1:]
        return Order(int(below), requeue == b"1", None if known == b"-1" else int(known))
    return Order(None, False)


def await_order(control: Control, beat: Callable[[], None], seconds: float) -> Order | None:
    """Wait for the order. beat: called every `seconds` meanwhile."""
    poller = select.poll()
    poller.register(control.fileno(), select.POLLIN)
    while not poller.poll(seconds * 1000):
        beat()
    return order_in(control.recv(4096))
