"""DNS over UDP and TCP: question and answers (RFC 1035 4; names RFC 4343, RFC 9267 on hostile ones; RFC 7766 for TCP).

Steps: at most 16 messages of 8 questions and 64 answers; 128 labels and 16 pointers a name,
and a compression pointer has to point before the last place.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop
from struct import unpack_from
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, NoMatch, Protocol, Result, text

PORTS: Final = frozenset((53, 5353))
_QUESTIONS: Final = 8
_MESSAGES: Final = 16
_POINTERS: Final = 16
_ANSWERS: Final = 64
_FACTS: Final = ("dns_name", "dns_type", "dns_answers", "dns_rcode", "dns_response", "dns_too_many")
# QUERY, IQUERY, STATUS, NOTIFY, UPDATE (IANA, DNS OpCodes); 6 is stateful, over TLS only.
_OPCODES: Final = frozenset((0, 1, 2, 4, 5))
# IN, CH, HS, NONE, ANY; the high bit is mDNS's (RFC 6762 5.4, 10.2).
_CLASSES: Final = frozenset((1, 3, 4, 254, 255))
TYPES: Final = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 10: "NULL", 12: "PTR", 13: "HINFO", 15: "MX", 16: "TXT", 24: "SIG", 25: "KEY",
    28: "AAAA", 29: "LOC", 33: "SRV", 35: "NAPTR", 37: "CERT", 39: "DNAME", 41: "OPT", 43: "DS", 44: "SSHFP", 46: "RRSIG",
    47: "NSEC", 48: "DNSKEY", 50: "NSEC3", 51: "NSEC3PARAM", 52: "TLSA", 53: "SMIMEA", 59: "CDS", 60: "CDNSKEY",
    61: "OPENPGPKEY", 62: "CSYNC", 63: "ZONEMD", 64: "SVCB", 65: "HTTPS", 99: "SPF", 108: "EUI48", 109: "EUI64",
    249: "TKEY", 250: "TSIG", 251: "IXFR", 252: "AXFR", 255: "ANY", 256: "URI", 257: "CAA",
}  # fmt: skip
# Types whose data is one name, and where in the data it begins.
_NAME_AT: Final = {2: 0, 5: 0, 12: 0, 39: 0, 15: 2, 33: 6}


def parse(client: bytes, server: bytes) -> Result:
    """The queries over TCP, two bytes of length before each (RFC 7766 8); names and types are those of all of them.

    More than 16 at once have no names: dns_too_many says so.
    """
    queries: list[dict[str, Any]] = []
    at = 0
    sound = True
    while at < len(client):
        size = int.from_bytes(client[at : at + 2], "big")
        header = client[at + 2 : at + 14]
        sound = not ((len(client) >= at + 2 and size < 17) or not _plausible(header))
        if not sound or len(client) < at + 2 + size or not header:
            break
        query = message(client[at + 2 : at + 2 + size], strict=True)
        sound = query is not None and not query.pop("dns_response", None)
        if query is None or not sound:
            break
        queries.append(query)
        at += 2 + size
        if len(queries) > _MESSAGES:
            return Found({"protocol": "dns", "dns_too_many": True}, used=len(client))
    if not queries:
        return MORE if sound else NO
    facts: dict[str, Any] = {"protocol": "dns", **queries[-1]}
    for key in ("dns_name", "dns_type"):
        facts[key] = tuple(each for query in queries for each in query[key])
    if not sound:
        return Found(facts, used=at)
    if len(server) >= 2 and len(server) >= (size := 2 + int.from_bytes(server[:2], "big")):
        answer = message(server[2:size], strict=True)
        if answer is not None and answer["dns_name"] == queries[-1]["dns_name"]:
            facts = answer | facts
        # The rest of a query may be on its way.
        return Found(facts, done=at == len(client), used=at)
    return Found(facts, done=False, used=at)


def datagram(data: bytes, known: bool) -> Result:
    """One message over UDP. known: the port or what was seen before says DNS, so that bytes after the message are let pass."""
    facts = message(data, strict=not known)
    return NO if facts is None else Found({"protocol": "dns", **facts})


def _plausible(header: bytes) -> bool:
    """A query's header as far as it goes: QR 0, a known opcode, one question, no answers."""
    if len(header) < 12:
        return len(header) < 4 or (header[2] < 0x80 and header[2] >> 3 & 15 in _OPCODES)
    flags, questions = unpack_from("!HH", header, 2)
    return flags < 0x8000 and flags >> 11 & 15 in _OPCODES and 0 < questions <= _QUESTIONS


def message(data: bytes, strict: bool) -> dict[str, Any] | None:
    """dns_name and dns_type of the questions (tuples), dns_answers and dns_rcode of a response; None for what is no message.

    strict: every record has to be sound and nothing may follow the last one.
    """
    if len(data) < 17:
        return None
    flags, questions, answers, authority, additional = unpack_from("!5H", data, 2)
    response = flags >= 0x8000
    # A multicast response repeats no question (RFC 6762 6).
    if flags >> 11 & 15 not in _OPCODES or questions > _QUESTIONS or not (questions or (response and answers)):
        return None
    if strict and flags & 0x40:
        return None
    at = 12
    names: list[str] = []
    types: list[str] = []
    for _ in range(questions):
        got = name(data, at)
        if got is None or len(data) < got[1] + 4:
            return None
        kind, dns_class = unpack_from("!HH", data, got[1])
        if dns_class & 0x7FFF not in _CLASSES:
            return None
        at = got[1] + 4
        names.append(got[0])
        types.append(TYPES.get(kind) or f"TYPE{kind}")
    facts: dict[str, Any] = {"dns_name": tuple(names), "dns_type": tuple(types)}
    found: list[str] = []
    records = answers + authority + additional
    for number in range(min(records, _ANSWERS)):
        record = _record(data, at)
        if record is None:
            if strict:
                return None
            break
        at, shown = record
        if number < answers and shown is not None:
            found.append(shown)
    else:
        if strict and records <= _ANSWERS and at != len(data):
            return None
    if response:
        facts |= {"dns_answers": tuple(found), "dns_rcode": flags & 15, "dns_response": True}
    return facts


def _record(data: bytes, at: int) -> tuple[int, str | None] | None:
    """(where the next one begins, the data as text or None where we have none for the type)."""
    owner = name(data, at)
    if owner is None or len(data) < owner[1] + 10:
        return None
    kind, _, _, size = unpack_from("!HHIH", data, owner[1])
    at = owner[1] + 10
    end = at + size
    if end > len(data):
        return None
    shown: str | None = None
    if kind == 1 and size == 4:
        shown = inet_ntop(AF_INET, data[at:end])
    elif kind == 28 and size == 16:
        shown = inet_ntop(AF_INET6, data[at:end])
    elif kind in _NAME_AT and size > _NAME_AT[kind]:
        target = name(data, at + _NAME_AT[kind])
        if target is None:
            return None
        shown = target[0]
    elif kind == 16 and size and data[at] < size:
        shown = text(data[at + 1 : at + 1 + data[at]])
    return end, shown


def name(data: bytes, at: int) -> tuple[str, int] | None:
    """(the name in small letters without the dot at its end, "." for the root; where the bytes after it begin), or None.

    A dot or an unprintable byte inside a label is escaped.
    """
    labels: list[str] = []
    after = -1
    total = 0
    # Each pointer has to go further back than the last (RFC 1035 4.1.4: "a prior occurrence"), so there is no loop.
    lowest = at
    pointers = 0
    while True:
        if at >= len(data):
            return None
        size = data[at]
        if size == 0:
            at += 1
            break
        if size >= 0xC0:
            if at + 1 >= len(data):
                return None
            target = (size & 0x3F) << 8 | data[at + 1]
            if after < 0:
                after = at + 2
            pointers += 1
            if target >= lowest or pointers > _POINTERS:
                return None
            at = lowest = target
            continue
        # 0x40 and 0x80 are reserved (RFC 6891 5); 255 bytes are the most that a name may have (RFC 1035 2.3.4).
        total += size + 1
        if size > 63 or at + 1 + size > len(data) or total > 254:
            return None
        label = data[at + 1 : at + 1 + size]
        shown = text(label).lower()
        labels.append(shown.replace(".", "\\.") if "." in shown else shown)
        at += 1 + size
    return ".".join(labels) or ".", at if after < 0 else after


PROTOCOL: Final = Protocol(
    "dns",
    facts=_FACTS,
    headline="dns_name",
    hosts=("dns_name",),
    parse=parse,
    changes=_FACTS,
)


__all__ = ["PORTS", "PROTOCOL", "TYPES", "NoMatch", "datagram", "message", "name", "parse"]
