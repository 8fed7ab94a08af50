"""OpenVPN over TCP: the ClientHello that its packets carry is read, and none in other bytes is missed."""

from __future__ import annotations

from random import Random

import pytest
from openings import client_hello, made_hello, record, server_name
from talk import Talk

from nfq_agent.protocols import tls

SESSION, SERVER = bytes.fromhex("44a95b8ac77d9f02"), bytes.fromhex("4c3b214a4766a386")
# Heads of packets: bytes between the session id and the acknowledgements, none or a digest with its counter and the time.
HEADS = {"clear": b"", "tls-auth": b"d" * 20 + b"\0\0\0\1time"}
LIMIT = 1200
# As long as one of OpenSSL 3.5, with a key that is not compressible.
KEY = 51, b"\4\xbe" + Random(14).randbytes(1214)
LONG = made_hello([0x1301], [KEY])
NAMED = made_hello([0x1301], [KEY, server_name(b"a.server.test")])


def packet(opcode: int, body: bytes, head: bytes = b"") -> bytes:
    data = bytes((opcode,)) + SESSION + head + body
    return len(data).to_bytes(2, "big") + data


def control(number: int, data: bytes, head: bytes = b"", acknowledged: int | None = None) -> bytes:
    reply = b"\0" if acknowledged is None else b"\1" + acknowledged.to_bytes(4, "big") + SERVER
    return packet(0x20, reply + number.to_bytes(4, "big") + data, head)


def acknowledgement(*numbers: int, head: bytes = b"") -> bytes:
    count = bytes((len(numbers),))
    return packet(0x28, count + b"".join(number.to_bytes(4, "big") for number in numbers) + SERVER, head)


def reset(head: bytes = b"") -> bytes:
    return packet(0x38, bytes(5), head)


def flight(hello: bytes, head: bytes = b"") -> list[bytes]:
    """What a client sends up to the end of its hello."""
    return [
        reset(head),
        acknowledgement(0, head=head),
        control(1, hello[:LIMIT], head, 0),
        control(2, hello[LIMIT:], head, 1),
    ]


def talk(*segments: bytes) -> Talk:
    said = Talk().open()
    at = 0
    for segment in segments:
        said.say(segment, at)
        at += len(segment)
    return said


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("joined", [False, True])
def test_a_hello_in_two_packets(head: bytes, joined: bool) -> None:
    segments = flight(LONG, head)
    facts = talk(*([b"".join(segments)] if joined else segments)).facts
    assert facts["protocol"] == "openvpn"
    assert facts["dpi"] == "decided"
    assert facts["ja4"]
    assert "conflict" not in facts
    assert talk(*flight(NAMED, head)).facts["tls_sni"] == "a.server.test"


@pytest.mark.parametrize("size", [1, 2, 3, 11, 16, 30, 46, 60, 700])
def test_segments_end_anywhere(size: int) -> None:
    data = b"".join(flight(NAMED))
    assert talk(data[:size], data[size:]).facts["tls_sni"] == "a.server.test"


def test_a_packet_that_is_sent_again_is_read_once() -> None:
    first, second, third, fourth = flight(NAMED)
    assert talk(first, second, third, third, fourth).facts["tls_sni"] == "a.server.test"


def test_a_second_hello_is_read() -> None:
    segments = flight(LONG)
    behind = b"\x14\3\3\0\1\1" + client_hello("b.server.test")
    facts = talk(*segments, control(3, behind, acknowledged=2)).facts
    assert facts["tls_sni"] == "b.server.test"
    assert facts["protocol"] == "openvpn"


def test_behind_the_hello_nothing_is_waited_for() -> None:
    said = talk(*flight(LONG), control(3, b"\x17\3\3\0\x20" + bytes(32)), b"\0\x20\x30" + bytes(31))
    assert said.facts["dpi"] == "decided"
    assert said.facts["protocol"] == "openvpn"


HIDDEN = client_hello("b.server.test")
PLAIN = {
    "behind the opening": [reset(), HIDDEN],
    "behind an acknowledgement": [reset(), acknowledgement(0), HIDDEN],
    "behind a packet of another session": [reset(), acknowledgement(0).replace(SESSION, b"x" * 8), HIDDEN],
    "in a packet of data": [reset(), packet(0x30, HIDDEN)],
    "in a packet that comes too early": [reset(), control(2, HIDDEN)],
    "in a packet that was sent before": [reset(), control(1, b""), control(1, HIDDEN)],
    "in acknowledgements": [reset(), packet(0x28, b"\x88" + HIDDEN.ljust(4 * 0x88, b"\0") + SERVER)],
    "behind bytes of TLS": [reset(), control(1, b"\x17\3\3\0\1\1"), HIDDEN],
    "from the end of a packet on": [reset(), acknowledgement(0x16030100), HIDDEN],
    "over the border of two segments": [reset(), HIDDEN[:4], HIDDEN[4:]],
}


@pytest.mark.parametrize("segments", PLAIN.values(), ids=PLAIN)
def test_a_hello_outside_of_the_control_packets(segments: list[bytes]) -> None:
    assert talk(*segments).facts["tls_sni"] == "b.server.test"


def test_a_hello_that_begins_in_an_acknowledgement() -> None:
    ahead = packet(0x28, b"\1" + b"\0\0\0\0" + SERVER[:3] + HIDDEN[:5])
    assert talk(reset(), ahead, HIDDEN[5:]).facts["tls_sni"] == "b.server.test"


BORDER = len(control(2, b"", acknowledged=1))


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data


def test_another_name_without_the_packets() -> None:
    """The second packet's head takes the place of an extension's value, and the value is read as extensions."""
    other, name = (extension(*server_name(each)) for each in (b"b.server.test", b"a.server.test"))
    pad = extension(0x7B7B, bytes(BORDER - len(other) - 4))
    hello = made_hello([0x1301], [(0x7A7A, other + pad), (0, name[4:]), (0x7B7B, pad[4:])])
    cut = hello.index(other)
    segments = reset(), control(1, hello[:cut], acknowledged=0), control(2, hello[cut:], acknowledged=1)
    without = (segments[1] + segments[2])[segments[1].index(b"\x16\3") :][: len(hello)]
    assert tls.parse(without, b"").facts["tls_sni"] == "b.server.test"  # type: ignore[union-attr]  # it is found
    facts = talk(*segments).facts
    assert facts["conflict"] == "a ClientHello in OpenVPN that servers may read in different ways"
    assert facts["protocol"] == "openvpn"
    assert "tls_sni" not in facts
    assert talk(reset(), control(1, hello)).facts["tls_sni"] == "a.server.test"


def test_a_record_that_goes_further_without_the_packets() -> None:
    hello = made_hello([0x1301], [(0x7A7A, bytes(90) + b"\x16\3\1\x40\0" + bytes(90)), server_name(b"a.server.test")])[5:]
    end = hello.index(b"\x16\3\1\x40\0") + BORDER
    first, second = record(hello[:end]), record(hello[end:])
    facts = talk(reset(), control(1, first[:60], acknowledged=0), control(2, first[60:] + second, acknowledged=1)).facts
    assert "conflict" in facts
    assert talk(reset(), control(1, first + second)).facts["tls_sni"] == "a.server.test"


def test_a_hello_that_servers_read_in_different_ways() -> None:
    twice = made_hello([0x1301], [server_name(b"a.server.test"), server_name(b"b.server.test")])
    facts = talk(reset(), control(1, twice)).facts
    assert "conflict" in facts
    assert "tls_sni" not in facts


def test_with_an_encrypted_opening_a_plain_hello_is_found() -> None:
    opening = b"\x38" + SESSION + b"\0\0\0\1time" + b"t" * 32 + b"crypt"
    first = len(opening).to_bytes(2, "big") + opening
    assert talk(first).facts["protocol"] == "openvpn"
    assert talk(first, HIDDEN).facts["tls_sni"] == "b.server.test"
