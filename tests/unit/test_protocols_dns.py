"""Messages and names, sound and hostile (RFC 9267 tells of the latter)."""

from __future__ import annotations

import struct

import pytest
from openings import dns_query

from nfq_agent.protocols import NO, Found, dns


def response(question: str, *records: bytes, kind: int = 1) -> bytes:
    query = dns_query(question, kind, flags=0x8180)
    return query[:6] + struct.pack("!H", len(records)) + query[8:] + b"".join(records)


def record(kind: int, data: bytes, owner: bytes = b"\xc0\x0c") -> bytes:
    return owner + struct.pack("!HHIH", kind, 1, 60, len(data)) + data


def test_answers_of_every_kind_that_is_shown() -> None:
    message = response(
        "a.test",
        record(1, b"\xc0\0\2\7"),
        record(28, bytes.fromhex("20010db8") + bytes(11) + b"\7"),
        record(5, b"\1b\xc0\x0e"),
        record(15, b"\0\x0a\2mx\xc0\x0e"),
        record(33, b"\0\1\0\2\0\x50\3srv\xc0\x0e"),
        record(16, b"\5words"),
        record(65, b"\0\1\0"),
    )
    found = dns.message(message, strict=True)
    assert found is not None
    assert found["dns_answers"] == ("192.0.2.7", "2001:db8::7", "b.test", "mx.test", "srv.test", "words")
    assert found["dns_name"] == ("a.test",)


@pytest.mark.parametrize(
    ("wire", "wanted"),
    [
        (b"\0", "."),
        (b"\1A\4Test\0", "a.test"),
        (b"\3a.b\0", "a\\.b"),
        (b"\2a\0\0", "a\\x00"),
        (b"\2\\.\0", "\\\\\\."),
        (b"\x3f" + b"x" * 63 + b"\0", "x" * 63),
    ],
)
def test_names(wire: bytes, wanted: str) -> None:
    assert dns.name(wire, 0) == (wanted, len(wire))


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\1",
        b"\1a",
        b"\x40a\0",
        b"\x80a\0",
        b"\xc0",
        b"\xc0\0",
        b"\1a\xc0\0",
        b"\1a\xc0\2",
        b"\xc0\x10",
        (b"\x3f" + b"x" * 63) * 4 + b"\0",
    ],
)
def test_names_that_are_none(wire: bytes) -> None:
    """Cut, reserved, pointing forwards or at themselves, too long."""
    assert dns.name(wire, 0) is None


def test_a_chain_of_pointers_is_followed_for_sixteen_steps() -> None:
    # Each points at the one before it: the longest chain there can be in as many bytes.
    wire = b"\0" + b"".join(struct.pack("!H", 0xC000 | max(0, 2 * n - 1)) for n in range(8000))
    assert dns.name(wire, 1 + 2 * 15) == (".", 1 + 2 * 16)
    assert dns.name(wire, 1 + 2 * 16) is None


def test_what_is_no_message() -> None:
    query = dns_query("a.test")
    assert isinstance(dns.datagram(query, False), Found)
    assert dns.datagram(query + b"\0", False) is NO
    assert isinstance(dns.datagram(query + b"\0", True), Found)
    assert dns.datagram(query[:-1], True) is NO
    # No question, too many, an unknown opcode, an unknown class.
    for at, value in ((4, b"\0\0"), (4, b"\0\x63"), (2, b"\x78\0"), (len(query) - 2, b"\0\x63")):
        assert dns.datagram(query[:at] + value + query[at + 2 :], True) is NO, at
    assert dns.datagram(bytes(40), True) is NO
