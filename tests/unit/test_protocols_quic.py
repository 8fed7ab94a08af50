"""Initial packets: the keys of the RFCs' examples, and hellos in frames as clients scatter them."""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from openings import made_hello, server_name

from nfq_agent.protocols import quic

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
    secret = quic._expand(hmac.new(entry.salt, DESTINATION, sha256).digest(), b"client in", 32)  # noqa: SLF001  # the keys are not to be had otherwise
    assert tuple(quic._expand(secret, label, 12 if b"iv" in label else 16).hex() for label in entry.labels) == KEYS[version]  # noqa: SLF001  # the keys are not to be had otherwise


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


@pytest.mark.parametrize("version", list(KEYS))
def test_a_hello_in_one_frame(version: int) -> None:
    flow = quic.Connections()
    hello = flow.add(sealed(crypto(0, len(HELLO)), version=version), NOW)
    assert hello is not None
    assert hello.complete
    assert hello.facts["tls_sni"] == "quic.test"
    assert hello.facts["ja4"].startswith("q12d0103h3_")


def test_frames_out_of_order_between_others_and_in_several_datagrams() -> None:
    flow = quic.Connections()
    ack = bytes((2, 5, 0, 1, 0, 1, 0))
    ecn = bytes((3, 5, 0, 0, 0, 1, 2, 3))
    hello = flow.add(sealed(crypto(400, 700) + b"\1\0\0\0" + ack + crypto(100, 200) + ecn + crypto(300, 400)), NOW)
    assert hello is not None
    assert hello.facts == {"protocol": "quic", "quic_version": "1"}
    assert not hello.complete
    assert flow.add(sealed(crypto(0, 100) + crypto(90, 310), number=1), NOW) is hello
    assert hello.complete
    assert hello.facts["tls_sni"] == "quic.test"


def test_two_packets_in_one_datagram() -> None:
    first = sealed(crypto(0, 300), size=500)
    flow = quic.Connections()
    hello = flow.add(first + sealed(crypto(300, 700), number=1, size=800), NOW)
    assert hello is not None
    assert hello.complete


def test_frames_that_differ_are_a_conflict() -> None:
    flow = quic.Connections()
    hello = flow.add(sealed(crypto(0, 300)), NOW)
    assert hello is not None
    flow.add(sealed(crypto(0, 100) + b"\6\x40\x64\x40\x02xx", number=1), NOW)
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
    assert flow.add(datagram, NOW) is None


def test_keys_follow_the_first_destination() -> None:
    """A packet under another id, and not under the keys of the first, is none of this connection's."""
    flow = quic.Connections()
    hello = flow.add(sealed(crypto(0, 300)), NOW)
    assert hello is not None
    # The client continues with the id that the server chose, and with the same keys (RFC 9001 5.2).
    assert flow.add(sealed(crypto(300, 700), destination=b"\1\2\3\4", number=1), NOW) is hello
    assert hello.complete


def flights(count: int) -> list[bytes]:
    """First datagrams of as many connections by aioquic."""
    found = []
    for number in range(count):
        configuration = QuicConfiguration(is_client=True, server_name=f"n{number}.test")
        connection = QuicConnection(configuration=configuration)
        connection.connect(("192.0.2.1", 443), now=0.0)
        found.append(connection.datagrams_to_send(now=0.0)[0][0])
    return found


def test_each_connection_is_looked_at_and_one_that_is_known_is_known_again() -> None:
    flow = quic.Connections()
    datagrams = flights(3)
    hellos = [flow.add(datagram, NOW) for datagram in datagrams]
    assert [hello.facts["tls_sni"] for hello in hellos if hello] == ["n0.test", "n1.test", "n2.test"]
    assert [flow.add(datagram, NOW) for datagram in datagrams] == hellos


def test_more_connections_than_are_remembered_are_a_conflict_until_the_first_are_old() -> None:
    flow = quic.Connections()
    datagrams = flights(65)
    for datagram in datagrams[:64]:
        assert flow.add(datagram, NOW)
    last = flow.add(datagrams[64], NOW + 1)
    assert last is not None
    assert "conflict" in last.facts
    later = flow.add(datagrams[64], NOW + 31)
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
