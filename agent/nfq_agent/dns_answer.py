"""What an answer of DNS says about addresses: records with their owners and times (RFC 1035 4.1.3, RFC 9460 for SVCB and HTTPS).

Steps: at most 256 records; the names of each are bounded as in `dns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import unpack_from
from typing import Final

from nfq_agent.protocols.dns import name

_A, _CNAME, _AAAA, _SVCB, _HTTPS = 1, 5, 28, 64, 65
# Types whose answers say where to connect to.
_ASKED: Final = frozenset((_A, _AAAA, _SVCB, _HTTPS, 255))
# Those that name a host which offers a service.
SERVICE: Final = frozenset((_SVCB, _HTTPS))
_IPV4HINT, _IPV6HINT = 4, 6
_RECORDS: Final = 256


@dataclass(frozen=True, slots=True)
class DnsQuestion:
    """One question, as its answer has to repeat it. number: the message's id."""

    number: int
    name: str
    kind: int


@dataclass(frozen=True, slots=True)
class DnsAnswer:
    """addresses: of a name, packed, each with the seconds for which it holds. aliases: (name, what it stands for, seconds)."""

    question: DnsQuestion
    addresses: tuple[tuple[str, bytes, int], ...]
    aliases: tuple[tuple[str, str, int], ...]


def question(data: bytes) -> DnsQuestion | None:
    """The one question of a query about addresses; None for anything else."""
    if len(data) < 17 or data[2] & 0xF8 or unpack_from("!H", data, 4)[0] != 1:
        return None
    read = _question(data)
    return None if read is None else read[0]


def answer(data: bytes) -> DnsAnswer | None:
    """What a response without an error says; None for anything else. A part of a truncated one is read as far as it goes."""
    if len(data) < 17 or data[2] & 0xF8 != 0x80 or data[3] & 15 or unpack_from("!H", data, 4)[0] != 1:
        return None
    read = _question(data)
    if read is None:
        return None
    asked, at = read
    addresses: list[tuple[str, bytes, int]] = []
    aliases: list[tuple[str, str, int]] = []
    for _ in range(min(sum(unpack_from("!3H", data, 6)), _RECORDS)):
        owner = name(data, at, strict=False)
        if owner is None or len(data) < owner[1] + 10:
            break
        kind, dns_class, seconds, size = unpack_from("!HHIH", data, owner[1])
        at = owner[1] + 10 + size
        if at > len(data):
            break
        # A time with its highest bit set counts as 0 (RFC 2181 8).
        seconds = 0 if seconds >> 31 else seconds
        if dns_class == 1:
            _read(data, owner[0], kind, seconds, (owner[1] + 10, at), addresses, aliases)
    return DnsAnswer(asked, tuple(addresses), tuple(aliases))


def _question(data: bytes) -> tuple[DnsQuestion, int] | None:
    asked = name(data, 12, strict=False)
    if asked is None or len(data) < asked[1] + 4:
        return None
    kind, dns_class = unpack_from("!HH", data, asked[1])
    if kind not in _ASKED or dns_class != 1:
        return None
    return DnsQuestion(unpack_from("!H", data)[0], asked[0], kind), asked[1] + 4


def _read(
    data: bytes,
    owner: str,
    kind: int,
    seconds: int,
    place: tuple[int, int],
    addresses: list[tuple[str, bytes, int]],
    aliases: list[tuple[str, str, int]],
) -> None:
    at, end = place
    if (kind, end - at) in ((_A, 4), (_AAAA, 16)):
        addresses.append((owner, data[at:end], seconds))
    elif kind == _CNAME:
        if (target := name(data, at, strict=False)) is not None:
            aliases.append((owner, target[0], seconds))
    elif kind in SERVICE and end - at > 2:
        target = name(data, at + 2, strict=False)
        if target is None:
            return
        if target[0] != ".":
            aliases.append((owner, target[0], seconds))
        if unpack_from("!H", data, at)[0]:
            # Hints are addresses of the target (RFC 9460 2.5.2, 7.3). The record speaks for its owner alone: any zone can name a
            # target of another one, with addresses of its own.
            addresses += [(owner, each, seconds) for each in _hints(data[target[1] : end])]


def _hints(parameters: bytes) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at + 4 <= len(parameters):
        key, size = unpack_from("!HH", parameters, at)
        value = parameters[at + 4 : at + 4 + size]
        at += 4 + size
        width = {_IPV4HINT: 4, _IPV6HINT: 16}.get(key)
        if width is not None:
            found += [value[place : place + width] for place in range(0, len(value) - width + 1, width)]
    return found
