"""DNS over UDP and TCP: question and answers (RFC 1035 4; names RFC 4343, RFC 9267 on hostile ones; RFC 7766 for TCP).

Steps: at most 255 questions and 64 answers a message; 128 labels and 16 pointers a name. Where DNS is known to be spoken, what
some server follows is followed: pointers that go forward, and, as dnsmasq, 512 labels and 255 pointers a name.
"""

from __future__ import annotations

import re
from socket import AF_INET, AF_INET6, inet_ntop
from struct import unpack_from
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, NoMatch, Protocol, Result, text

PORTS: Final = frozenset((53, 5353))
# mDNS asks for many names at once; a query over TCP on any port for few.
_QUESTIONS: Final = 255
_FEW: Final = 8
# Messages that are not queries, before one.
_PASSED_OVER: Final = 64
# What a name may have: pointers, and bytes (RFC 1035 2.3.4). Of the servers dnsmasq takes most: extract_name() in its rfc1035.c,
# and MAXDNAME.
_POINTERS: Final = 16
_NAME: Final = 254
_MOST_POINTERS: Final = 255
_LONGEST_NAME: Final = 1024
_ANSWERS: Final = 64
_FACTS: Final = ("dns_name", "dns_type", "dns_answers", "dns_rcode", "dns_response")
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
# NetBIOS has the form of DNS (RFC 1002 4.2.1.3): a name of 32 letters A to P, and the types NB and NBSTAT. Where DNS is known
# to be spoken, the second is SRV.
_NETBIOS: Final = frozenset((32, 33))
_NETBIOS_NAME: Final = re.compile(r"[a-p]{32}(?:\.|$)")
# Types whose data is one name, and where in the data it begins.
_NAME_AT: Final = {2: 0, 5: 0, 12: 0, 39: 0, 15: 2, 33: 6}


def parse(client: bytes, server: bytes = b"") -> Result:
    """A query over TCP, two bytes of length before it (RFC 7766 8), and its answer; each of several is read by itself."""
    size = 2 + int.from_bytes(client[:2], "big")
    header = client[2:14]
    if (len(client) >= 2 and size < 19) or not _plausible(header):
        return NO
    if len(client) < size or not header:
        return MORE
    facts = message(client[2:size], strict=True)
    if facts is None or "dns_response" in facts:
        return NO
    return _with_answer(facts, size, server)


def known(client: bytes, server: bytes = b"") -> Result:
    """The same where it is known that DNS is spoken: every form that a server reads is read.

    dnsmasq takes a response for a query, and it and unbound skip messages that are not queries.
    """
    at = 0
    for _ in range(_PASSED_OVER):
        end = at + 2 + int.from_bytes(client[at : at + 2], "big")
        if len(client) < at + 2 or len(client) < end:
            return MORE
        if end == at + 2:
            # Servers end the connection here.
            return NO
        if (facts := message(client[at + 2 : end], strict=False)) is not None:
            asked = {"dns_name": facts["dns_name"], "dns_type": facts["dns_type"]}
            return _with_answer(asked, end, server)
        at = end
    return Found({"protocol": "dns", "conflict": "many messages that are not queries"})


def _with_answer(facts: dict[str, Any], size: int, server: bytes) -> Result:
    facts["protocol"] = "dns"
    if len(server) < 2 or len(server) < (answered := 2 + int.from_bytes(server[:2], "big")):
        return Found(facts, done=False, used=size, then=known)
    answer = message(server[2:answered], strict=False)
    if answer is not None and answer["dns_name"] == facts["dns_name"]:
        facts = answer | facts
    return Found(facts, used=size, then=known)


def datagram(data: bytes, known: bool = False) -> Result:
    """One message over UDP. known: the port or what was seen before says DNS, so that whatever a server reads is read."""
    facts = message(data, strict=not known)
    return NO if facts is None else Found({"protocol": "dns", **facts})


def _plausible(header: bytes) -> bool:
    """A query's header as far as it goes: QR 0, a known opcode, a question."""
    if len(header) < 12:
        return len(header) < 4 or (header[2] < 0x80 and header[2] >> 3 & 15 in _OPCODES)
    flags, questions = unpack_from("!HH", header, 2)
    return flags < 0x8000 and flags >> 11 & 15 in _OPCODES and 0 < questions <= _FEW


def message(data: bytes, strict: bool) -> dict[str, Any] | None:
    """dns_name and dns_type of the questions (tuples), dns_answers and dns_rcode of a response; None if it is not a message.

    strict: every record has to be sound, names may point back only, and nothing may follow the last record.
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
        got = name(data, at, strict)
        if got is None or len(data) < got[1] + 4:
            return None
        kind, dns_class = unpack_from("!HH", data, got[1])
        if strict and (dns_class & 0x7FFF not in _CLASSES or (kind in _NETBIOS and _NETBIOS_NAME.match(got[0]))):
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


def name(data: bytes, at: int, strict: bool = True) -> tuple[str, int] | None:
    """(the name in small letters without the dot at its end, "." for the root; where the bytes after it begin), or None.

    strict: pointers go back only (RFC 1035 4.1.4), and few of them. A dot or an unprintable byte inside a label is escaped.
    """
    most_pointers, longest = (_POINTERS, _NAME) if strict else (_MOST_POINTERS, _LONGEST_NAME)
    labels: list[str] = []
    after = -1
    total = 0
    # Each pointer has to go further back than the last, or there are few of them: so there is no loop.
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
            if (strict and target >= lowest) or pointers > most_pointers:
                return None
            at = lowest = target
            continue
        # 0x40 and 0x80 are reserved (RFC 6891 5).
        total += size + 1
        if size > 63 or at + 1 + size > len(data) or total > longest:
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
    datagram=datagram,
    changes=_FACTS,
)


__all__ = ["PORTS", "PROTOCOL", "TYPES", "NoMatch", "datagram", "known", "message", "name", "parse"]
