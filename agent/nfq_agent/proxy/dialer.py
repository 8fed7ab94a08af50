"""Where each connection is to go, and which of several addresses is tried: events come in, commands go out. No I/O, no clock.

A connection begins with `start`, and every command is answered with `connected` or `failed`, or the connection is
taken out with `gone`. `woken` ends the attempts that took too long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, NamedTuple, TypeVar

from nfq_agent.host.sockets import Address

K = TypeVar("K", bound=Hashable)
# A socket address with its family (AF_INET, AF_INET6).
Candidate = tuple[int, Address]

_NO_ADDRESS: Final = "no address"


class Refused(NamedTuple):
    """The connection is not carried anywhere. why: for the log."""

    why: str


class Connect(NamedTuple, Generic[K]):
    """Open a socket and connect it to this address."""

    key: K
    to: Candidate


class Abandon(NamedTuple, Generic[K]):
    """Close the socket of the attempt that runs: it has taken too long. Then report it with `failed`."""

    key: K
    reason: str


class GiveUp(NamedTuple, Generic[K]):
    """No address is left. reason: of the last one."""

    key: K
    reason: str


class Dialer(Generic[K]):
    """The attempts to connect of one process; each connection has a key."""

    def __init__(self, is_own: Callable[[Address], bool], timeout: float) -> None:
        """is_own: whether an address is a listener of the agent. timeout: seconds that one address gets."""
        self._is_own = is_own
        self.timeout = timeout
        # Where connections go whose destination is not known.
        self.target: tuple[Candidate, ...] = ()
        # In the order of their deadlines, since all have the same time. Plain pairs that connect by themselves write theirs here.
        self.attempts: dict[K, tuple[float, tuple[Candidate, ...]]] = {}

    def __len__(self) -> int:
        return len(self.attempts)

    def aim_at(self, candidates: Iterable[Candidate]) -> bool:
        """Set the target's addresses. Those that are our own listeners are left out; False if no other is left."""
        self.target = tuple(each for each in candidates if not self._is_own(each[1]))
        return bool(self.target)

    def route(self, destination: Candidate | None) -> tuple[Candidate, ...] | Refused:
        """The addresses to try for a new connection. destination: where it was going; None if the kernel does not know."""
        own = destination is not None and self._is_own(destination[1])
        if destination is not None and not own:
            return (destination,)
        if not self.target:
            why = "it was sent to our own listener" if own else "its original destination is not known"
            return Refused(f"{why}, and no target is configured")
        return self.target

    def start(self, key: K, candidates: tuple[Candidate, ...], now: float) -> Connect[K] | GiveUp[K]:
        """Begin to connect a new connection."""
        return self._next(key, candidates, _NO_ADDRESS, now)

    def connected(self, key: K) -> None:
        """The attempt has succeeded. Raises KeyError if none was under way."""
        del self.attempts[key]

    def failed(self, key: K, reason: str, now: float) -> Connect[K] | GiveUp[K]:
        """The attempt has failed: the next address, or the end. Raises KeyError if none was under way."""
        _, candidates = self.attempts.pop(key)
        return self._next(key, candidates, reason, now)

    def gone(self, key: K) -> None:
        """The client has closed; stop connecting."""
        self.attempts.pop(key, None)

    @property
    def due(self) -> float | None:
        """When `woken` is to be called next; None if no attempt is under way."""
        for deadline, _ in self.attempts.values():
            return deadline
        return None

    def woken(self, now: float) -> list[Abandon[K]]:
        """Time has passed: returns the attempts that have taken too long. Each has to be reported with `failed`."""
        late: list[Abandon[K]] = []
        for key, (deadline, _) in self.attempts.items():
            if deadline > now:
                break
            late.append(Abandon(key, f"no answer within {self.timeout:g} s"))
        return late

    def _next(self, key: K, candidates: tuple[Candidate, ...], reason: str, now: float) -> Connect[K] | GiveUp[K]:
        if not candidates:
            return GiveUp(key, reason)
        self.attempts[key] = (now + self.timeout, candidates[1:])
        return Connect(key, candidates[0])
