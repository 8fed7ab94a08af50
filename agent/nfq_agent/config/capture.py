"""`[tap.NAME]` and `[inline.NAME]`: traffic taken at interfaces, beside or without netfilter. Models only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal

from nfq_agent.config.model import Model
from nfq_agent.field import AfterValidator, Field
from nfq_agent.values import Duration, MidstreamMode, Ports, PortsField, Size

# A classic filter has 4096 instructions at most (BPF_MAXINSNS), and a range of ports costs 12 of them.
MOST_RANGES: Final = 150
_WILDCARD: Final = re.compile(r"[*?\[]")

INTERFACES: Final = r"^[^\s/]{1,32}$"
Pattern = Annotated[str, Field(pattern=INTERFACES)]


class CaptureConfig(Model):
    """The keys that a tap and an inline link share."""

    # Names or shell patterns, on the host's side.
    interfaces: Annotated[tuple[Pattern, ...], Field(min_length=1, strict=False)]
    exclude: Annotated[tuple[Pattern, ...], Field(strict=False)] = ()
    # Either port of a packet. With neither list: every IP packet.
    tcp_ports: Annotated[tuple[PortsField, ...], Field(strict=False)] = ()
    udp_ports: Annotated[tuple[PortsField, ...], Field(strict=False)] = ()
    elements: Annotated[tuple[str, ...], Field(strict=False)] = ()
    # A line for each flow that is dropped, or would be, where no element logs it.
    log_drops: bool = True
    # What the worker may allocate.
    memory: Annotated[Size, Field(ge=100_000_000)] = 1_000_000_000


class TapConfig(CaptureConfig):
    """`[tap.NAME]`"""

    # Bytes to copy of each packet, from its IP header on.
    snap: Annotated[int, Field(ge=64, le=65535)] | Literal["auto"] = "auto"
    # Bytes of the ring of each interface. auto: see capture/ring_size.py.
    ring: Annotated[Size, Field(ge=262_144, le=1_000_000_000)] | Literal["auto"] = "auto"


def _open(value: bool) -> bool:
    if not value:
        raise ValueError("the kernel lets this traffic pass when the agent has ended; allowed: true")
    return value


class InlineConfig(CaptureConfig):
    """`[inline.NAME]`"""

    # Whose ports these are: of servers behind the interfaces, of servers that their clients ask, or either port of a packet.
    role: Literal["server", "client", "both"] = "both"
    # Packets on their way to the worker; further ones pass, and are counted.
    max_waiting: Annotated[int, Field(ge=16, le=100_000)] = 4096
    # If the worker shows no sign of life for this long, everything passes.
    patience: Annotated[Duration, Field(ge=0.05, le=60)] = 0.5
    fail_open: Annotated[bool, AfterValidator(_open)] = True
    mode: Literal["enforce", "monitor"] = "enforce"
    default: Literal["accept", "drop"] = "accept"
    on_error: Literal["accept", "drop"] = "accept"
    # How programs are attached: by tcx links, which go with the worker, or as filters of a clsact qdisc. auto: links if possible.
    attach: Literal["auto", "tcx", "clsact"] = "auto"
    # As in [queue.NAME].
    midstream: MidstreamMode = "accept"

    def faults(self) -> Iterator[str]:
        """Keys that do not go together."""
        if self.role != "both" and not (self.tcp_ports or self.udp_ports):
            yield f"role {self.role}: no port is named; allowed: with tcp_ports or udp_ports"


def same_interface(ours: Iterable[str], others: Iterable[str], excluded: Sequence[str] = ()) -> str | None:
    """A pattern of `ours` that may choose the same interface as one of `others`; None if there is none.

    Decided by the part before the first wildcard: if neither is a prefix of the other, the patterns share no name.
    excluded: names and patterns of interfaces that one of the two does not choose.
    """
    for one in ours:
        for other in others:
            beginnings = [_WILDCARD.split(each, maxsplit=1)[0] for each in (one, other)]
            exact = [beginning == each for beginning, each in zip(beginnings, (one, other), strict=True)]
            if all(exact):
                meet = one == other
            elif any(exact):
                name, pattern = (one, other) if exact[0] else (other, one)
                meet = fnmatchcase(name, pattern)
            else:
                meet = beginnings[0].startswith(beginnings[1]) or beginnings[1].startswith(beginnings[0])
            narrow = one if exact[0] or (not exact[1] and len(beginnings[0]) >= len(beginnings[1])) else other
            if meet and not any(_covers(each, narrow) for each in excluded):
                return one
    return None


def _covers(pattern: str, other: str) -> bool:
    """Whether every name that `other` chooses is one that `pattern` chooses. False where that is not plain."""
    beginning = _WILDCARD.split(other, maxsplit=1)[0]
    if beginning == other:
        return fnmatchcase(other, pattern)
    return pattern.endswith("*") and not _WILDCARD.search(pattern[:-1]) and beginning.startswith(pattern[:-1])


def overlap(ours: Sequence[Ports], others: Sequence[Ports]) -> Ports | None:
    """Ports that both name, the first such range; None where there is none."""
    for one in ours:
        for other in others:
            if one.first <= other.last and other.first <= one.last:
                return Ports(max(one.first, other.first), min(one.last, other.last))
    return None
