"""The types of frames.pyx, which says what they do."""

from collections.abc import Callable
from typing import final

from nfq_agent.answering import Answering
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

OUTGOING: int
UNFINISHED: int
SEGMENTED: int

@final
class Frames:
    count: int
    size: int
    failed: int
    crossed: int
    def __init__(self, descriptor: int, most: int) -> None: ...
    def receive(self, budget: int) -> int: ...
    def packet(self, number: int) -> tuple[bytes, int, int, int] | None: ...
    def frame(self, number: int) -> tuple[bytes, int]: ...
    def sort(
        self,
        known: dict[bytes, Verdict],
        decide: Callable[[int, bytes | None], Verdict],
        runs: list[tuple[Verdict, int, int]],
    ) -> bytearray: ...
    def judge(
        self,
        first: int,
        table: Answering,
        now: float,
        make: Callable[[int], Packet],
        ask: Callable[[Packet], Verdict],
        going: bytearray,
        runs: list[tuple[Verdict, int, int]],
        kept: list[tuple[int, Verdict]],
    ) -> tuple[int, tuple[Packet, Verdict] | None]: ...
    def send(self, going: bytes | bytearray) -> int: ...
    def put(self, frame: bytes, mark: int) -> int: ...
