"""The verdict: what happens to a packet. Values only; nothing here talks to the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class VerdictError(Exception):
    """A verdict that cannot be given: the packet has one already, waits in no queue, or the value is not a verdict."""


class RewriteError(VerdictError):
    """New bytes for a packet that cannot take them: it was not copied whole, or it is an offloaded one (GSO)."""


class Action(IntEnum):
    """What the kernel does with a packet; the numbers are those of linux/netfilter.h."""

    DROP = 0
    ACCEPT = 1
    # NF_STOLEN: the program keeps the packet. It is never sent; the kernel refuses it.
    RETAIN = 2
    QUEUE = 3
    REPEAT = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer for one packet.

    action: what happens to it. mark: the 32-bit packet mark to set, or None to leave it. payload: the new bytes from the
    IP header on, or None to leave them. exact: a worker sends them as they are; otherwise it mends their lengths and
    checksums (`checksum.mend`), which a program of its own does itself. queue: the number of the queue it goes to (0 to
    65535), with Action.QUEUE only. delay: seconds that the packet is kept back before the verdict is given.
    inject: whole packets, from the IP header on, that the worker sends besides (a copy, a TCP reset). means: the final
    action, if the action is only a step (`outcome`). rejects: a drop whose sender gets an error, if that is allowed.
    Source: nfqnl_recv_verdict() in net/netfilter/nfnetlink_queue.c.
    """

    action: Action
    mark: int | None = None
    payload: bytes | None = None
    queue: int | None = None
    delay: float = 0.0
    inject: tuple[bytes, ...] = ()
    means: Action | None = None
    exact: bool = False
    rejects: bool = False

    def __post_init__(self) -> None:
        if (self.queue is not None) != (self.action is Action.QUEUE):
            raise ValueError("a queue number goes with Action.QUEUE, and only with it")
        if self.queue is not None and not 0 <= self.queue <= 0xFFFF:
            raise ValueError(f"queue {self.queue}: a queue number is 0 to 65535")
        if self.action is Action.RETAIN and not (self.mark is None and self.payload is None):
            raise ValueError("a packet that is retained is not changed; the verdict that it gets later may")
        if self.mark is not None and not 0 <= self.mark <= 0xFFFFFFFF:
            raise ValueError(f"mark {self.mark:#x}: a mark has 32 bits")

    @property
    def outcome(self) -> Action:
        """What finally happens to the packet: the action, or what it means."""
        return self.action if self.means is None else self.means

    @property
    def word(self) -> str:
        """The outcome as text: `accept`, `drop`, `reject`, ..."""
        return "reject" if self.rejects else self.outcome.name.lower()

    @property
    def plain(self) -> bool:
        """True if the verdict is only its action, so that neighbours can share one message."""
        return self.mark is None and self.payload is None and self.queue is None and not (self.delay or self.inject)

    @property
    def code(self) -> int:
        """The 32-bit verdict of the wire: the action, with the queue number in the upper half for QUEUE."""
        return self.action if self.queue is None else self.action | self.queue << 16


ACCEPT: Final = Verdict(Action.ACCEPT)
DROP: Final = Verdict(Action.DROP)
REPEAT: Final = Verdict(Action.REPEAT)
REJECT: Final = Verdict(Action.DROP, rejects=True)
# The packet is kept; it is answered later by its own methods, or by the queue's policy when it was forgotten.
RETAIN: Final = Verdict(Action.RETAIN)
# An accept that would have been a drop, in monitor mode and at a tap; known by its identity.
WOULD_DROP: Final = Verdict(Action.ACCEPT)
