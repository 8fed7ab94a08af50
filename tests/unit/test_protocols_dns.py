"""Messages and names, valid and hostile (RFC 9267 describes the latter)."""

from __future__ import annotations

import struct

import pytest
from openings import dns_query, over_tcp
from talk import Talk

from nfq_agent.protocols import MORE, NO, Found, dns


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
    # No question, more than there are, an unknown opcode.
    for at, value in ((4, b"\0\0"), (4, b"\0\x63"), (2, b"\x78\0")):
        assert dns.datagram(query[:at] + value + query[at + 2 :], True) is NO, at
    assert dns.datagram(query[:-2] + b"\0\x63", False) is NO
    assert dns.datagram(bytes(40), True) is NO


def test_where_dns_is_known_whatever_a_server_reads_is_read() -> None:
    query = dns_query("a.test")
    record_missing = query[:11] + b"\1" + query[12:]
    chain = b"".join(struct.pack("!H", 0xC000 | 20 + 2 * number) for number in range(200))
    forward = query[:12] + b"\xc0\x12" + query[-4:] + b"\1b\4test\0"
    for odd, name in (
        (query[:3] + b"\x40" + query[4:], "a.test"), (query + b"rest", "a.test"), (record_missing, "a.test"), (forward, "b.test"),
        (dns_query(".".join(["x" * 60] * 15)), ".".join(["x" * 60] * 15)),
        (query[:12] + b"\xc0\x12" + query[-4:] + chain + b"\1b\4test\0", "b.test"),
    ):  # fmt: skip
        assert dns.datagram(odd, False) is NO
        found = dns.datagram(odd, True)
        assert isinstance(found, Found)
        assert found.facts["dns_name"] == (name,)


def test_many_questions_of_mdns_are_read_and_netbios_is_not_dns() -> None:
    question = dns_query("a.local")[12:]
    many = dns_query("a.local")[:4] + b"\0\x09" + bytes(6) + question * 9
    found = dns.datagram(many, True)
    assert isinstance(found, Found)
    assert len(found.facts["dns_name"]) == 9
    for kind in (b"\0\x20", b"\0\x21"):
        netbios = dns_query("a")[:12] + b"\x20" + b"CKAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" + b"\0" + kind + b"\0\1"
        assert dns.datagram(netbios, False) is NO
        # Where DNS is known to be spoken, the types are DNS's own: SRV is one.
        found = dns.datagram(netbios, True)
        assert isinstance(found, Found)
        assert found.facts["dns_type"] == ("SRV" if kind == b"\0\x21" else "TYPE32",)


def test_queries_over_tcp_are_read_one_by_one() -> None:
    first, second = over_tcp(dns_query("a.test")), over_tcp(dns_query("b.test", flags=0x0140) + b"x")
    result = dns.parse(first + second)
    assert isinstance(result, Found)
    assert (result.facts["dns_name"], result.used, result.then) == (("a.test",), len(first), dns.known)
    assert dns.parse(second) is NO
    result = dns.known(second)
    assert isinstance(result, Found)
    assert result.facts["dns_name"] == ("b.test",)


@pytest.mark.parametrize(
    "before",
    [b"hello", b"x", bytes(12), b"\xff" * 40, dns_query("a.good.test")[:12], dns_query("a.good.test")[:-2]],
    ids=["five bytes", "one byte", "zeros", "ones", "a header", "cut"],
)
def test_where_dns_is_known_messages_that_are_no_queries_are_passed_over(before: bytes) -> None:
    data = over_tcp(before) + over_tcp(dns_query("b.test"))
    for size in range(len(data)):
        assert dns.known(data[:size]) is MORE, size
    result = dns.known(data)
    assert isinstance(result, Found)
    assert (result.facts["dns_name"], result.used, result.then) == (("b.test",), len(data), dns.known)


def test_where_dns_is_known_a_response_of_the_client_asks() -> None:
    result = dns.known(over_tcp(response("b.test", record(1, b"\xc0\0\2\7"))))
    assert isinstance(result, Found)
    assert result.facts == {"protocol": "dns", "dns_name": ("b.test",), "dns_type": ("A",)}


def test_too_many_messages_that_are_no_queries_are_a_conflict() -> None:
    result = dns.known(over_tcp(b"x") * 64)
    assert isinstance(result, Found)
    assert "conflict" in result.facts
    # Servers end the connection at a message of no bytes.
    assert dns.known(over_tcp(b"")) is NO


@pytest.mark.parametrize("data", [b"hello world\r\n", b"\0\5abcde", b"\xcd\xa6" + b"\x3a" * 300], ids=["text", "short", "noise"])
def test_tcp_to_the_port_of_dns_that_is_not_dns_is_a_conflict(data: bytes) -> None:
    """A server passes over messages that are not queries, so a query may follow. On another port it is given up."""
    for port, conflicts in ((53, True), (54, False)):
        talk = Talk(dst=f"198.51.100.1:{port}").open()
        for turn in range(32):
            talk.say(data, turn * len(data))
        assert talk.facts["dpi"] == "gave-up"
        assert ("conflict" in talk.facts) is conflicts
    assert "conflict" not in Talk(dst="198.51.100.1:53").open().say(b"SSH-2.0-x\r\n").facts
