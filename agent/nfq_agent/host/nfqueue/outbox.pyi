"""The types of outbox.pyx, which says what they do."""

from typing import final

@final
class Outbox:
    def __init__(self, descriptor: int, number: int) -> None: ...
    @property
    def headers(self) -> tuple[int, int, int]: ...
    def send(self, messages: bytes) -> None: ...
