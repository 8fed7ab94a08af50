"""Evasions over DNS, against dnsmasq."""

from __future__ import annotations

import struct
from functools import partial

from evasion_attempt import Attempt
from evasion_config import DNS
from evasion_line import Line
from openings import dns_query, over_tcp


def _labels(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"


_A_IN = struct.pack("!HH", 1, 1)


def _plain(name: str) -> bytes:
    return dns_query(name)


def _z_bit(name: str) -> bytes:
    return dns_query(name, flags=0x0140)


def _bytes_behind(name: str) -> bytes:
    return dns_query(name) + b"rubbish"


def _record_missing(name: str) -> bytes:
    query = bytearray(dns_query(name))
    query[11] = 1
    return bytes(query)


def _pointer_forward(name: str) -> bytes:
    # The question's name is a pointer to bytes after the question.
    return struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + b"\xc0\x12" + _A_IN + _labels(name)


def _any_class(name: str) -> bytes:
    return dns_query(name)[:-2] + b"\0\xff"


def _many_pointers(name: str) -> bytes:
    # A hundred of them, each to the next.
    chain = b"".join(struct.pack("!H", 0xC000 | 18 + 2 * number) for number in range(1, 100))
    return struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + b"\xc0\x12" + _A_IN + chain + _labels(name)


def _netbios_form(name: str) -> bytes:
    # NBSTAT has the number of SRV (RFC 1002 4.2.1.3).
    return dns_query(f"{'abcdefghijklmnop' * 2}.{name}", kind=33)


def _long_name(name: str) -> bytes:
    return dns_query(f"{'x' * 60}.{'y' * 60}.{'z' * 60}.{'x' * 60}.{name}")


_SPELLINGS = {
    "plain": ("a plain query", _plain),
    "z-bit": ("a query with the Z bit", _z_bit),
    "bytes-behind": ("bytes behind the question", _bytes_behind),
    "record-missing": ("ARCOUNT=1 without a record", _record_missing),
    "pointer-forward": ("a question name that is a pointer forward", _pointer_forward),
    "any-class": ("a query of the class ANY", _any_class),
    "many-pointers": ("a question name behind a hundred pointers", _many_pointers),
    "netbios-form": ("a name in the form of NetBIOS", _netbios_form),
    "long-name": ("a name of more than 255 bytes", _long_name),
}


def _udp(spell: object, attempt: Attempt, name: str, *, first: bool = False) -> None:
    assert callable(spell)
    with attempt.udp(DNS) as client:
        if first:
            client.send(dns_query(attempt.allowed))
            client.recv(1000)
        client.send(spell(name))
        client.recv(1000)


def _tcp(spell: object, attempt: Attempt, name: str, *, first: bool = False) -> None:
    assert callable(spell)
    with attempt.tcp(DNS) as client:
        if first:
            client.sendall(over_tcp(dns_query(attempt.allowed)))
            client.recv(1000)
        client.sendall(over_tcp(spell(name)))
        attempt.drain(client)


def _together(attempt: Attempt, name: str) -> None:
    """An allowed, the other and an allowed query in one segment."""
    allowed = over_tcp(dns_query(attempt.allowed))
    attempt.say(DNS, allowed + over_tcp(dns_query(name)) + allowed)


def _split(attempt: Attempt, name: str) -> None:
    query = over_tcp(dns_query(name))
    attempt.say(DNS, over_tcp(dns_query(attempt.allowed)), query[:1], query[1:20], query[20:])


# What dnsmasq passes over before it answers the next message.
_NO_QUERIES = {
    "five-bytes": ("five bytes", lambda _: b"hello"),
    "zeros": ("a header of zeros", lambda _: bytes(12)),
    "no-question": ("a query that counts no question", lambda query: query[:4] + b"\0\0" + query[6:]),
    "response": ("a response", lambda query: query[:2] + b"\x81\0" + query[4:]),
}


def _behind(spoil: object, attempt: Attempt, name: str) -> None:
    assert callable(spoil)
    attempt.say(DNS, over_tcp(spoil(dns_query(attempt.allowed))) + over_tcp(dns_query(name)))


def _as_response(name: str) -> bytes:
    query = dns_query(name)
    return query[:2] + b"\x81\0" + query[4:]


LINES = (
    *(
        Line(f"dns-tcp-behind-{name}", f"DNS over TCP: a query behind {text}", partial(_behind, spoil), twin=True)
        for name, (text, spoil) in _NO_QUERIES.items()
    ),
    Line("dns-tcp-as-response", "DNS over TCP: a query with the bit of a response", partial(_tcp, _as_response), twin=True),
    *(
        Line(f"dns-udp-{name}", f"DNS over UDP: {text}, as the first datagram", partial(_udp, spell))
        for name, (text, spell) in _SPELLINGS.items()
    ),
    *(
        Line(
            f"dns-udp-after-{name}",
            f"DNS over UDP, behind an allowed query from the port: {text}",
            partial(_udp, spell, first=True),
        )
        for name, (text, spell) in _SPELLINGS.items()
    ),
    *(
        Line(f"dns-tcp-{name}", f"DNS over TCP: {text}, as the first", partial(_tcp, spell))
        for name, (text, spell) in _SPELLINGS.items()
    ),
    *(
        Line(
            f"dns-tcp-after-{name}", f"DNS over TCP, behind an allowed query: {text}", partial(_tcp, spell, first=True), twin=True
        )
        for name, (text, spell) in _SPELLINGS.items()
    ),
    Line("dns-tcp-together", "DNS over TCP: three queries in one segment, the one between is denied", _together, twin=True),
    Line("dns-tcp-split", "DNS over TCP, behind an allowed query: a query in three segments", _split, twin=True),
)
