"""The types of ring.pyx, which says what they do."""

from collections.abc import Callable
from typing import final

from nfq_agent.answering import Answering
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

OUTGOING: int
ODD: int
TAGGED: int
UNFINISHED: int
SEGMENTED: int

Seen = tuple[bytes, int, float, int, int]

def moment(seconds: float, ahead: float, now: float) -> float: ...

@final
class Ring:
    unknown: int
    def __init__(self, descriptor: int, block: int, blocks: int, interface: int) -> None: ...
    def close(self) -> None: ...
    def read(self, budget: int) -> list[Seen]: ...
    def sort(
        self,
        budget: int,
        known: dict[bytes, Verdict],
        decide: Callable[[Seen, bytes | None], Verdict | None],
        runs: list[tuple[Verdict, int]],
    ) -> int: ...
    def judge(
        self,
        budget: int,
        table: Answering,
        now: float,
        ahead: float,
        mtu: int,
        make: Callable[[Seen], Packet | None],
        ask: Callable[[Packet], Verdict],
        runs: list[tuple[Verdict, int]],
    ) -> tuple[int, bool, tuple[Packet, Verdict] | None]: ...
