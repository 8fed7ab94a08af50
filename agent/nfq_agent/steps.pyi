"""The types of steps.pyx, which says what they do."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

from nfq_agent.answering import Answering
from nfq_agent.verdict import Verdict

MOST: int

class Step:
    @property
    def drops(self) -> bool: ...

class Limited(Step):
    def take_held(self) -> int: ...

@final
class LineLimit(Limited):
    def __init__(self, per_second: float, burst: float, drops_only: bool, say: Callable[[int], None]) -> None: ...
    def take(self, now: float) -> bool: ...

@final
class AddressLimit(Limited):
    def __init__(  # one for each option
        self, per_second: float, burst: float, limit: int, per: str, mask: bytes, mask6: bytes, say: Callable[[int], None]
    ) -> None: ...
    def take(self, address: bytes | None, now: float) -> bool: ...

@final
class Die(Step):
    def __init__(self, one_in: int, throw: Callable[..., Any], by_flow: bool, rest: Literal["accept", "drop"] | None) -> None: ...
    def count(self) -> bool: ...

@final
class OpeningHeard(Step):
    def __init__(self) -> None: ...

@final
class Steps(Answering):
    def __init__(self, steps: Sequence[Step], monitor: bool) -> None: ...
    def look_up(self, packet: bytes, now: float) -> tuple[Verdict | None, int]: ...
