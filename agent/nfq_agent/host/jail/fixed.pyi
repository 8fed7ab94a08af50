"""The types of fixed.pyx, which says what they do."""

from collections.abc import Iterable
from typing import Final, final

BOTTOM: Final[int]
TOP: Final[int]

@final
class FixedMessages:
    def __init__(self, shapes: Iterable[Iterable[bytes | int]]) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def headers(self) -> tuple[int, int, int]: ...
    def send(self, descriptor: int, shape: int, free_bytes: bytes | None) -> None: ...
