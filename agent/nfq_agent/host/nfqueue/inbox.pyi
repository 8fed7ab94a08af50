"""The types of inbox.pyx, which says what they do."""

from collections import deque
from collections.abc import Callable

from nfq_agent.host.nfqueue.messages import FlowKey, Run
from nfq_agent.host.nfqueue.outbox import Cutter, Outbox
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

def five_tuple_of(packet: bytes | bytearray) -> bytes | None: ...
def rare_fields(
    message: bytes,
) -> tuple[int, int, int, int, int | None, int | None, bytes | None, float | None]: ...

class Inbox:
    def __init__(
        self, descriptor: int, room: int, make: Callable[[int, int, int, int, int, bool, bytes, bytes], Packet]
    ) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def latest(self) -> int: ...
    @property
    def first_took(self) -> int: ...
    @property
    def polls(self) -> int: ...
    @property
    def found(self) -> int: ...
    @property
    def polled(self) -> int: ...
    @property
    def glance(self) -> dict[str, int]: ...
    @property
    def cutter(self) -> Cutter | None: ...
    def cut_joined(self, cutter: Cutter) -> None: ...
    def send_through(self, outbox: Outbox) -> None: ...
    def read(self, budget: int, pending: deque[bytes]) -> list[Packet]: ...
    def skim(self, budget: int, pending: deque[bytes]) -> tuple[int, int, int]: ...
    def sort(
        self,
        budget: int,
        pending: deque[bytes],
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
    ) -> tuple[int, int, list[Run]]: ...
    def skim_each(
        self, budget: int, pending: deque[bytes], verdict: bytes, together: int, spin: float
    ) -> tuple[int, int, int]: ...
    def sort_each(
        self,
        budget: int,
        pending: deque[bytes],
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
        accept: bytes,
        accepted: Verdict,
        answer: Callable[[int, Verdict], None],
        together: int,
        spin: float,
    ) -> tuple[int, int, list[Run]]: ...
