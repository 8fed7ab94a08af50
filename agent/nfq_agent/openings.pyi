"""The types of openings.pyx, which says what they do."""

from collections.abc import Callable, Collection, Sequence
from typing import final

from nfq_agent.decisions import Decisions
from nfq_agent.flow_memory import FlowMemory

READS: dict[str, int]

def is_plain_request(data: bytes, host: bytes) -> bool: ...
def is_wrong_plain(packet: bytes) -> bool | None: ...
def name_in_opening(data: bytes) -> tuple[str, str] | None: ...
def told_in_hello(data: bytes) -> bytes | None: ...
def details_in_hello(data: bytes) -> bytes | None: ...
def name_in_message(data: bytes) -> str | None: ...
def is_silent(data: bytes) -> bool: ...
def groups_that_fit(groups: Sequence[tuple[Collection[str], Collection[str]]], name: str) -> int: ...

@final
class Openings:
    def __init__(
        self,
        foresee: Callable[..., tuple[bytes, Sequence[int]] | None],
        reads: Collection[str],
        apart: Collection[int],
        memory: FlowMemory | None,
        decisions: Decisions | None = None,
        names: Sequence[tuple[Collection[str], Collection[str]]] | None = None,
        tell: Callable[[bytes], bytes] | None = None,
        questions: bool = False,
        patience: tuple[int, int] = (0, 0),
    ) -> None: ...
