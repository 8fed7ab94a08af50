"""The types of address_tokens.pyx, which says what they do."""

from typing import final

@final
class AddressTokens:
    evicted: int
    def __init__(self, per_second: float, burst: float, limit: int) -> None: ...
    def __len__(self) -> int: ...
    def take_from(self, address: bytes, now: float) -> bool: ...
