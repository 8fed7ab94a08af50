"""Initial packets: the keys of the RFCs' examples, and hellos in frames as clients scatter them."""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from openings import made_hello, server_name
from quic_flights import QuicOpening, quic_flight

from nfq_agent.protocols import quic, quic_keys
from nfq_agent.testing import Bench, udp

DESTINATION = bytes.fromhex("8394c8f03e515708")
# RFC 9001 A.1 and RFC 9369 A.1, the client's: key, iv, hp.
KEYS = {
    1: ("1f369613dd76d5467730efcbe3b1a22d", "fa044b2f42a3fd3b46fb255c", "9f50449e04a0e810283a1e9933adedd2"),
    0x6B3343CF: ("8b1a0bc121284290a29e0971b5cd045d", "91f73e2351d8fa91660e909f", "45b95e15235d6f45a6b19cbcb0294ba9"),
}
NOW = 100.0
HELLO = made_hello([0x1301], [server_name(b"quic.test"), (16, b"\0\3\2h3"), (0x39, bytes(600))])[5:]


@pytest.mark.parametrize("version", list(KEYS))
def test_the_keys_of_the_examples(version: int) -> None:
    entry = quic._VERSIONS[version]  # noqa: SLF001  # the keys are not to be had otherwise
    secret = quic_keys._expand(hmac.new(entry.salt, DESTINATION, sha256).digest(), b"client in", 32)  # noqa: SLF001  # the keys are not to be had otherwise
    assert tuple(quic_keys._expand(secret, label, 12 if b"iv" in label else 16).hex() for label in entry.labels) == KEYS[version]  # noqa: SLF001  # the keys are not to be had otherwise


def sealed(frames: bytes, *, version: int = 1, destination: bytes = DESTINATION, number: int = 0, size: int = 1200) -> bytes:
    """An Initial packet with the example's keys, padded to `size` bytes (RFC 9001 5.3, 5.4)."""
    key, iv, protection = (bytes.fromhex(each) for each in KEYS[version])
    first = 0xC3 | (0x10 if version != 1 else 0)
    head = bytes((first,)) + struct.pack("!I", version) + bytes((len(destination),)) + destination + b"\0\0"
    room = size - len(head) - 2 - 4 - 16
    frames += bytes(max(0, room - len(frames)))
    head += struct.pack("!H", 0x4000 | (4 + len(frames) + 16))
    header = head + struct.pack("!I", number)
    nonce = (int.from_bytes(iv, "big") ^ number).to_bytes(12, "big")
    cipher = AESGCM(key).encrypt(nonce, frames, header)
    mask = Cipher(algorithms.AES(protection), modes.ECB()).encryptor().update(cipher[:16])
    hidden = bytes(a ^ b for a, b in zip(header[-4:], mask[1:5], strict=True))
    return bytes((header[0] ^ mask[0] & 0x0F,)) + head[1:] + hidden + cipher


def crypto(at: int, end: int) -> bytes:
    """A CRYPTO frame (RFC 9000 19.6)."""
    data = HELLO[at:end]
    return b"\6" + struct.pack("!HH", 0x4000 | at, 0x4000 | len(data)) + data


def add(flow: quic.Connections, datagram: bytes, now: float) -> quic.Hello | None:
    """The one connection of which a datagram has packets; None where there is none."""
    hellos = flow.add(datagram, now)
    assert len(hellos) < 2
    return hellos[0] if hellos else None


@pytest.mark.parametrize("version", list(KEYS))
def test_a_hello_in_one_frame(version: int) -> None:
    flow = quic.Connections()
    hello = add(flow, sealed(crypto(0, len(HELLO)), version=version), NOW)
    assert hello is not None
    assert hello.complete
    assert hello.facts["tls_sni"] == "quic.test"
    assert hello.facts["ja4"].startswith("q12d0103h3_")


def test_frames_out_of_order_between_others_and_in_several_datagrams() -> None:
    flow = quic.Connections()
    ack = bytes((2, 5, 0, 1, 0, 1, 0))
    ecn = bytes((3, 5, 0, 0, 0, 1, 2, 3))
    hello = add(flow, sealed(crypto(400, 700) + b"\1\0\0\0" + ack + crypto(100, 200) + ecn + crypto(300, 400)), NOW)
    assert hello is not None
    assert hello.facts == {"protocol": "quic", "quic_version": "1"}
    assert not hello.complete
    assert add(flow, sealed(crypto(0, 100) + crypto(90, 310), number=1), NOW) is hello
    assert hello.complete
    assert hello.facts["tls_sni"] == "quic.test"


def test_two_packets_in_one_datagram() -> None:
    first = sealed(crypto(0, 300), size=500)
    flow = quic.Connections()
    hello = add(flow, first + sealed(crypto(300, 700), number=1, size=800), NOW)
    assert hello is not None
    assert hello.complete


@pytest.mark.parametrize(
    "frames",
    [
        b"\1" * 400 + crypto(0, len(HELLO)),
        b"\x40\6" + crypto(0, len(HELLO))[1:],
        b"\x1c\0\0\2no" + crypto(0, len(HELLO)),
        bytes((2, 5, 0, 0, 0)) * 50 + crypto(0, len(HELLO)),
    ],
)
def test_a_hello_behind_frames_that_a_server_reads(frames: bytes) -> None:
    """Many pings, a type in two bytes, a close, many acknowledgements."""
    hello = add(quic.Connections(), sealed(frames, size=1600), NOW)
    assert hello is not None
    assert hello.facts["tls_sni"] == "quic.test"


def test_more_frames_than_are_read_are_a_conflict() -> None:
    hello = add(quic.Connections(), sealed(b"\6\0\0" * 1100 + crypto(0, len(HELLO)), size=4200), NOW)
    assert hello is not None
    assert hello.complete
    assert hello.facts["conflict"]


@pytest.mark.parametrize(("size", "count"), [(24, 4), (24, 8), (5, 1), (0, 3)])
def test_a_hello_behind_packets_that_cannot_be_opened(size: int, count: int) -> None:
    junk = (b"\xc0\0\0\0\1\x08" + bytes(8) + b"\0\0" + struct.pack("!H", 0x4000 | size) + b"x" * size) * count
    hello = add(quic.Connections(), junk + sealed(crypto(0, len(HELLO))), NOW)
    assert hello is not None
    assert hello.facts["tls_sni"] == "quic.test"


def test_more_packets_than_are_read_are_a_conflict() -> None:
    junk = (b"\xc0\0\0\0\1\x08" + bytes(8) + b"\0\0\x40\x18" + b"x" * 24) * 20
    hello = add(quic.Connections(), junk + sealed(crypto(0, len(HELLO))), NOW)
    assert hello is not None
    assert hello.facts["conflict"]


def test_frames_that_differ_are_a_conflict() -> None:
    flow = quic.Connections()
    hello = add(flow, sealed(crypto(0, 300)), NOW)
    assert hello is not None
    add(flow, sealed(crypto(0, 100) + b"\6\x40\x64\x40\x02xx", number=1), NOW)
    assert hello.facts["conflict"]
    assert hello.complete


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        bytes(1200),
        sealed(crypto(0, 700))[:1199],
        sealed(crypto(0, 700))[:900] + bytes(300),
        b"\xc3\x0a\x0a\x0a\x0a" + bytes(1300),
        b"\xc3\0\0\0\0" + bytes(1300),
        b"\x43" + sealed(crypto(0, 700))[1:],
    ],
)
def test_what_is_no_initial(datagram: bytes) -> None:
    """Empty, too short, changed, of a version that is reserved or unknown, of the short form."""
    flow = quic.Connections()
    assert add(flow, datagram, NOW) is None


def test_keys_follow_the_first_destination() -> None:
    """A packet under another id, and not under the keys of the first, is none of this connection's."""
    flow = quic.Connections()
    hello = add(flow, sealed(crypto(0, 300)), NOW)
    assert hello is not None
    # The client continues with the id that the server chose, and with the same keys (RFC 9001 5.2).
    assert add(flow, sealed(crypto(300, 700), destination=b"\1\2\3\4", number=1), NOW) is hello
    assert hello.complete


def flights(count: int) -> list[bytes]:
    """First datagrams of as many connections by aioquic."""
    return [quic_flight(f"n{number}.test") for number in range(count)]


def test_each_connection_is_looked_at_and_one_that_is_known_is_known_again() -> None:
    flow = quic.Connections()
    datagrams = flights(3)
    hellos = [add(flow, datagram, NOW) for datagram in datagrams]
    assert [hello.facts["tls_sni"] for hello in hellos if hello] == ["n0.test", "n1.test", "n2.test"]
    assert [add(flow, datagram, NOW) for datagram in datagrams] == hellos


def test_each_connection_of_a_datagram_is_told() -> None:
    """A server reads the packets of one, and which one does not show."""
    hellos = quic.Connections().add(QuicOpening("a.test").whole(1200) + QuicOpening("b.test").whole(1200), NOW)
    assert [hello.facts["tls_sni"] for hello in hellos] == ["a.test", "b.test"]


def test_more_connections_than_are_remembered_are_a_conflict_until_the_first_are_old() -> None:
    flow = quic.Connections()
    datagrams = flights(65)
    for datagram in datagrams[:64]:
        assert add(flow, datagram, NOW)
    last = add(flow, datagrams[64], NOW + 1)
    assert last is not None
    assert "conflict" in last.facts
    later = add(flow, datagrams[64], NOW + 31)
    assert later is not None
    assert later.facts["tls_sni"] == "n64.test"


def test_any_version_is_quic() -> None:
    first = sealed(crypto(0, 700))
    assert quic.long_header(first) == "1"
    assert quic.long_header(first[:1] + b"\x0a\x1a\x2a\x3a" + first[5:]) == "0x0a1a2a3a"
    assert quic.long_header(first[:1] + b"\xff\0\0\x16" + first[5:]) == "draft-22"
    assert quic.long_header(first[:1] + bytes(4) + first[5:]) is None
    assert quic.long_header(first[:1199]) is None
    assert quic.long_header(b"\x80" + first[1:]) is None


def quic_rule() -> Bench:
    return Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", "tls_sni": "bad.test"}])


@pytest.mark.parametrize("names", [("bad.test", "good.test"), ("good.test", "bad.test")])
def test_of_two_quic_connections_in_a_datagram_each_is_judged(names: tuple[str, str]) -> None:
    """A server reads the packets of one, and which one does not show."""
    flight = b"".join(QuicOpening(name).whole(1200) for name in names)
    quic_rule().assert_dropped(udp("192.0.2.1:40000", "192.0.2.2:443", flight))


def test_quic_of_the_side_that_did_not_speak_first_is_read() -> None:
    """The last packet of an earlier connection comes from the server, and begins the flow."""
    bench = quic_rule()
    bench.assert_accepted(udp("192.0.2.2:443", "192.0.2.1:40000", b"\x40" + bytes(40)))
    bench.assert_dropped(udp("192.0.2.1:40000", "192.0.2.2:443", quic_flight("bad.test")))
