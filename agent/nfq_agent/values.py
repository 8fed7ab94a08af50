"""Values as a configuration writes them: duration, size, ports, endpoint, network. One parser and one text for each.

Parsers raise ValueError with what is wrong and what is allowed. They do no I/O: `Lookups` resolves names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Protocol, TypeAlias

from nfq_agent.field import BeforeValidator
from nfq_agent.geography import Geography

if TYPE_CHECKING:
    from pydantic import ValidationInfo

Network: TypeAlias = IPv4Network | IPv6Network
# What happens to a connection whose beginning was not seen. judge: what its next message says decides, else the policy's default.
MidstreamMode = Literal["accept", "drop", "judge"]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")
_SECONDS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_SIZE: Final = re.compile(r"(\d+)\s?(kB|MB|GB)")
_BYTES: Final = {"GB": 1000_000_000, "MB": 1000_000, "kB": 1000}
_PORTS: Final = re.compile(r"(\d+):(\d+)")
_ENDPOINT: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):(\d+)")
LAST_PORT: Final = 65535
# The prefix of the name of a list file.
FILE: Final = "file:"
# Bad entries of a list file that are named one by one.
_SHOWN: Final = 5
# Characters of a value in a message.
_LONGEST_SHOWN: Final = 60


def duration(value: object) -> float:
    """Seconds, from `"5s"`, `"100ms"`, `"0"` or the number 0, which needs no unit."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    if isinstance(value, str):
        if value == "0":
            return 0.0
        if match := _DURATION.fullmatch(value):
            return float(match[1]) * _SECONDS[match[2]]
    raise ValueError(f'{value!r} is not a valid duration; allowed: "0", or a number with us, ms, s, m or h, as in "5s"')


def duration_text(seconds: float) -> str:
    """The text of a duration, in the largest unit that gives a number of at least 1: `5s`, `1.5m`, `0`."""
    for unit, size in _SECONDS.items():
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return "0"


def size(value: object) -> int:
    """Bytes, from a number of them or from `"64MB"`. Units are powers of 1000."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)) and int(match[1]) > 0:
        return int(match[1]) * _BYTES[match[2]]
    raise ValueError(f'{value!r} is not a valid size; allowed: a number of bytes, or a number with kB, MB or GB, as in "64MB"')


def size_text(count: int) -> str:
    """The text of a size, in the largest unit that gives a number of at least 1: `64.0 MB`, `512 B`."""
    for unit, factor in _BYTES.items():
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def shortened(text: str, value: object) -> str:
    """What is said of a value, which is cut where it is long."""
    whole = repr(value)
    return text if len(whole) <= _LONGEST_SHOWN else text.replace(whole, f"{whole[: _LONGEST_SHOWN - 3]}...", 1)


class TableFaults(ValueError):
    """What is wrong with a table as a whole: each fault with the keys and numbers that lead from the table to it."""

    def __init__(self, faults: Iterable[tuple[tuple[str | int, ...], str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(text for _, text in self.faults))


def raise_faults(faults: Iterable[str]) -> None:
    """Raise TableFaults with all of these; nothing where there is none. For what checks a table as a whole."""
    if found := [((), fault) for fault in dict.fromkeys(faults)]:
        raise TableFaults(found)


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """A port, or a range of them with both ends in it."""

    first: int
    last: int

    @classmethod
    def parse(cls, value: object, lowest: int = 1) -> Ports:
        """From a number or `"8000:8010"`. lowest: 0 where packets are matched, since a packet may carry port 0."""
        if isinstance(value, Ports):
            return value
        allowed = f'allowed: {lowest} to {LAST_PORT}, or a range as "8000:8010"'
        if isinstance(value, str):
            _refuse_file(value, "ports and ranges of them")
        first = last = -1
        if isinstance(value, int) and not isinstance(value, bool):
            first = last = value
        elif isinstance(value, str) and (match := _PORTS.fullmatch(value)):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise ValueError(f"range {value} ends before it begins; {allowed}")
        if not lowest <= first <= last <= LAST_PORT:
            raise ValueError(f"{value!r} is not a valid port; {allowed}")
        return cls(first, last)

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}:{self.last}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """HOST:PORT; an IPv6 address is in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, value: object, lowest: int = 1) -> Endpoint:
        """From `"0.0.0.0:15002"`, `"[::]:15002"` or `"localhost:80"`. lowest: 0 for the ends of a packet, as in Ports."""
        if isinstance(value, Endpoint):
            return value
        allowed = 'allowed: HOST:PORT, as in "0.0.0.0:15002" or "[::]:15002"'
        match = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{value!r} is not a valid endpoint; {allowed}")
        port = int(match[3])
        if not lowest <= port <= LAST_PORT:
            raise ValueError(f"{value!r}: {port} is not a valid port; allowed: {lowest} to {LAST_PORT}")
        return cls(match[1] or match[2], port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _refuse_file(value: str, allowed: str) -> None:
    if value.startswith(FILE):
        raise ValueError(f"{value!r}: entries of a file are for rules of a policy, and not taken here; allowed: {allowed}")


def ports_of_text(text: str) -> Ports:
    """Ports as a list file has them, `80` or `8000:8010`; 0 is allowed, as packets may carry it."""
    return Ports.parse(int(text) if text.isdecimal() else text, lowest=0)


def network(value: object) -> Network:
    """A network, from `"10.0.0.0/8"`, `"fd00::/8"` or a single address."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    allowed = 'allowed: an address, or a network as "10.0.0.0/8" or "fd00::/8"'
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a valid network; {allowed}")
    _refuse_file(value, "networks, or the name of an ipset in set")
    try:
        return ip_network(value)
    except ValueError:
        try:
            near = ip_network(value, strict=False)
        except ValueError:
            raise ValueError(f"{value!r} is not a valid network; {allowed}") from None
        raise ValueError(f"{value!r} has bits set after its prefix (did you mean {str(near)!r}?); {allowed}") from None


def single_address(value: object) -> IPv4Address | IPv6Address:
    """An address, from `"192.0.2.1"` or `"2001:db8::1"`."""
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return ip_address(value)
    raise ValueError(f'{value!r} is not an address; allowed: one as "192.0.2.53" or "2001:db8::53"')


def one_or_more(value: object) -> object:
    """A single value stands for a list with that value."""
    return value if isinstance(value, list | tuple) else (value,)


def listed(parse: Callable[[str], Any]) -> Callable[[object, ValidationInfo], object]:
    """For pydantic: one value or a list of values, in which `"file:PATH"` stands for the entries of that file.

    parse: makes a value of an entry's text. Raises ValueError.
    """

    def values(value: object, info: ValidationInfo) -> object:
        found: list[object] = []
        faults: dict[int, str] = {}
        given = one_or_more(value)
        members = list(enumerate(given)) if isinstance(given, list | tuple) else []
        for place, each in members:
            if not (isinstance(each, str) and each.startswith(FILE)):
                found.append(each)
                continue
            try:
                found += _entries(each, lookups(info.context), parse)
            except ValueError as error:
                faults[place] = str(error)
        if not faults:
            return found
        # The others are not looked at any more: their faults are told here.
        for place, each in members:
            if isinstance(each, str) and not each.startswith(FILE):
                try:
                    parse(each)
                except ValueError as error:
                    faults[place] = shortened(str(error), each)
        raise TableFaults(((place,), faults[place]) for place in sorted(faults))

    return values


def _entries(name: str, host: Lookups, parse: Callable[[str], Any]) -> list[Any]:
    """The entries of one list file. name: with its prefix. Raises ValueError."""
    file = name.removeprefix(FILE)
    if not file or not file.isprintable():
        raise ValueError(f"{name!r} is not the name of a file; allowed: file:NAME or file:/PATH/NAME")
    lines = host.lines(file)
    if not lines:
        raise ValueError(f"{name} has no entry; allowed: one or more, one a line")
    entries: list[Any] = []
    bad: list[str] = []
    allowed = ""
    for number, text in lines:
        try:
            entries.append(parse(text))
        except ValueError as error:
            what, mark, rest = shortened(str(error), text).partition("; allowed: ")
            bad.append(f"{name}, line {number}: {what}")
            allowed = allowed or mark + rest
    if bad:
        more = f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ValueError("; ".join(bad[:_SHOWN]) + more + allowed)
    return entries


class Lookups(Protocol):
    """Resolves names in a configuration that refer to the host. A model is validated with one of these as its context."""

    def uid(self, name: str) -> int:
        """The id of a user. Raises KeyError."""
        ...

    def gid(self, name: str) -> int:
        """The id of a group. Raises KeyError."""
        ...

    def lines(self, file: str) -> list[tuple[int, str]]:
        """The entries of a list file, with their line numbers. Raises ValueError."""
        ...

    def geography(self, files: tuple[str, ...]) -> Geography:
        """The places in databases in MaxMind's format. Raises ValueError."""
        ...


def lookups(context: Any) -> Lookups:
    """The Lookups of a validation. Raises ValueError if the caller gave none."""
    if context is None:
        raise ValueError("neither names nor files can be looked up here; allowed: numbers and values")
    found: Lookups = context
    return found


Duration = Annotated[float, BeforeValidator(duration)]
Size = Annotated[int, BeforeValidator(size)]
PortsField = Annotated[Ports, BeforeValidator(Ports.parse)]
EndpointField = Annotated[Endpoint, BeforeValidator(Endpoint.parse)]
AddressField = Annotated[IPv4Address | IPv6Address, BeforeValidator(single_address)]
NetworkField = Annotated[Network, BeforeValidator(network)]
