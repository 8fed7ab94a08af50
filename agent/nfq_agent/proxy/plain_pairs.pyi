"""The types of plain_pairs.pyx, which says what they do."""

from collections.abc import Callable, Collection
from typing import Any, Protocol, final

from nfq_agent.connection import Connection
from nfq_agent.host.sockets import Address
from nfq_agent.proxy.dialer import Candidate

class Owner(Protocol):
    """What plain pairs leave to the proxy. now: monotonic seconds."""

    def take(self, client: int, family: int, address: Address, due: bool, now: float) -> None:
        """A new connection whose destination needs a decision. client: its descriptor. due: it is to be checked for a loop."""

    def failed(self, pair: PlainPair, number: int, now: float) -> None:
        """A new connection cannot be connected, by this error."""

    def unreachable(self, pair: PlainPair, reason: str) -> None:
        """An attempt to connect has failed: it is to be abandoned."""

    def ended(self, pair: PlainPair, now: float) -> None:
        """A pair is over: it is to be closed."""

@final
class PlainPair:
    key: Connection | PlainPair
    connection: Connection | None
    over: str | None
    connected: bool
    carried: bool
    opened: float
    @property
    def client_active(self) -> float: ...
    @property
    def server_active(self) -> float: ...
    @property
    def waiting(self) -> bool: ...
    @property
    def addresses(self) -> tuple[Address, Address]: ...
    @property
    def counted(self) -> tuple[int, int]: ...
    @property
    def upstream_fd(self) -> int: ...
    def close(self) -> None: ...
    def abandon(self) -> int: ...

@final
class PlainPairs:
    def __init__(self, epoll: int, owner: Owner) -> None: ...
    def go_straight(
        self,
        tproxy: bool,
        mark: int,
        own_ports: frozenset[int],
        checks: float,
        second_hop: Callable[[tuple[str, int], tuple[str, int]], bool],
    ) -> None: ...
    def share(
        self,
        running: dict[object, Any],
        new: dict[Any, float],
        first: float,
        attempts: dict[Any, tuple[float, tuple[Candidate, ...]]],
        timeout: float,
    ) -> None: ...
    def listen(self, listeners: Collection[int], limit: int) -> None: ...
    def count_in(self, memory: memoryview, places: tuple[int, int, int, int]) -> None: ...
    def close(self) -> None: ...
    def take_counts(self) -> tuple[int, int, int]: ...
    def adopt(self, client: int, upstream: int, key: Connection | PlainPair, connection: Connection, now: float) -> PlainPair: ...
    def accept(self, listener: int, most: int, now: float) -> int: ...
    def wait(self, seconds: float) -> list[tuple[int, int]]: ...
