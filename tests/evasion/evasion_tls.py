"""Evasions over TLS and QUIC, against OpenSSL and aioquic."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from functools import partial

# aioquic would import it later, when the try has given up root and may not read the clone any more.
import cryptography.hazmat.backends.openssl  # noqa: F401  # loaded before the processes are forked
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from evasion_attempt import Attempt
from evasion_line import Line
from evasion_servers import PLAIN, QUIC, TLS
from openings import client_hello, made_hello, numbers, record, server_name


def _client(name: str) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    _step(client)
    return client, incoming, outgoing


def _step(client: ssl.SSLObject) -> None:
    with contextlib.suppress(ssl.SSLError):
        client.do_handshake()


def _hello(attempt: Attempt, name: str) -> None:
    attempt.say(TLS, client_hello(name))


def _pieces(size: int, attempt: Attempt, name: str) -> None:
    hello = client_hello(name)
    attempt.say(TLS, *[hello[at : at + size] for at in range(0, len(hello), size)], pause=0.005)


def _large(attempt: Attempt, name: str) -> None:
    """11 KB, the name at the end of it, in segments of 1,024 bytes."""
    padding = [(0x1A1A, bytes(10_500))]
    hello = made_hello((0x1301, 0xC02F), [*padding, numbers(13, 0x0403, 0x0804), numbers(10, 24, 23), server_name(name.encode())])
    attempt.say(TLS, *[hello[at : at + 1024] for at in range(0, len(hello), 1024)], pause=0.005)


def _no_host_name(attempt: Attempt, name: str) -> None:
    """A server name with characters that no host name has, and an allowed name at its end."""
    attempt.say(TLS, made_hello((0x1301, 0xC02F), [numbers(10, 24), server_name(f"{name}:80.{attempt.allowed}".encode())]))


def _records(attempt: Attempt, name: str) -> None:
    """The hello in records of 20 bytes."""
    attempt.say(TLS, record(client_hello(name)[5:], 20))


def _record_version(attempt: Attempt, name: str) -> None:
    attempt.say(TLS, b"\x16\3\5" + client_hello(name)[3:])


def _behind(records: bytes, port: int, attempt: Attempt, name: str) -> None:
    # OpenSSL 3.5 sends a hello of two segments. A plain application, in place of a TLS server that needs all of it, would be seen
    # to read the first, which passes while the outcome is open: it gets a hello of one.
    version = ssl.TLSVersion.TLSv1_2 if port == PLAIN else None
    attempt.say(port, records + client_hello(name, version=version))


def _tunnel(attempt: Attempt, name: str) -> None:
    """A tunnel of HTTP to an allowed host, and in it a hello that fits one segment."""
    host = attempt.allowed
    request = f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode()
    attempt.say(PLAIN, request, client_hello(name, version=ssl.TLSVersion.TLSv1_2))


def _openvpn(joined: bool, attempt: Attempt, name: str) -> None:
    """OpenVPN over TCP: the opening, and a hello in two control packets; or, if `joined`, behind an acknowledgement."""
    hello = made_hello((0x1301, 0xC02F), [(0x1A1A, bytes(1200)), server_name(name.encode())])
    session, peer = b"sessions", b"peer-num"
    parts = [b"\x38" + session + bytes(5), b"\x28" + session + b"\1" + bytes(4) + peer]
    if not joined:
        cut = hello.index(name.encode())
        for number, part in ((1, hello[:cut]), (2, hello[cut:])):
            parts.append(b"\x20" + session + b"\0" + number.to_bytes(4, "big") + part)
        hello = b""
    attempt.say(PLAIN, b"".join(len(part).to_bytes(2, "big") + part for part in parts) + hello)


def _empty_between(attempt: Attempt, name: str) -> None:
    hello = record(client_hello(name)[5:], 60)
    attempt.say(TLS, hello[:65] + b"\x16\3\1\0\0" * 3 + hello[65:])


def _retry(attempt: Attempt, name: str, *, joined: bool = True) -> None:
    """The server asks for another share; the second hello, behind a ChangeCipherSpec, asks for the name."""
    client, incoming, outgoing = _client(attempt.allowed)
    with attempt.tcp(TLS) as connection:
        connection.sendall(outgoing.read())
        incoming.write(connection.recv(65536))
        _step(client)
        second = outgoing.read().replace(attempt.allowed.encode(), name.encode())
        for piece in (second,) if joined else (second[:6], second[6:]):
            connection.sendall(piece)
        attempt.drain(connection)


def _retry_behind_many(attempt: Attempt, name: str) -> None:
    """The second hello stands behind forty ChangeCipherSpec, and its first byte in a record of its own."""
    second = client_hello(name, version=ssl.TLSVersion.TLSv1_2)
    rest = second[6:]
    records = b"\x14\3\3\0\1\1" * 40 + b"\x16\3\3\0\1\1\x16\3\3" + len(rest).to_bytes(2, "big")
    attempt.say(PLAIN, client_hello(attempt.allowed, version=ssl.TLSVersion.TLSv1_2), records + rest)


def _urgent(attempt: Attempt, name: str) -> None:
    """One urgent byte inside the name: what the application reads is one byte shorter than what is on the wire."""
    hello = client_hello(name.replace("refused", "refuused"))
    at = hello.index(b"refuused") + 4
    with attempt.tcp(PLAIN) as connection:
        connection.sendall(hello[: at - 1])
        connection.send(b"u", socket.MSG_OOB)
        connection.sendall(hello[at:])
        attempt.drain(connection)


def _quic_client(name: str, **options: object) -> QuicConnection:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], verify_mode=ssl.CERT_NONE, server_name=name)
    for key, value in options.items():
        setattr(configuration, key, value)
    return QuicConnection(configuration=configuration)


def first_flight(name: str, address: tuple[str, int], number: bytes | None = None, **options: object) -> list[bytes]:
    """The first datagrams of a client. number: its first connection id, a random one if None."""
    connection = _quic_client(name, **options)
    if number is not None:
        # aioquic chooses it by itself, and there is no public way to set it.
        connection._peer_cid.cid = connection._original_destination_connection_id = number  # noqa: SLF001  # aioquic shows it nowhere else
    connection.connect(address, now=0.0)
    return [datagram for datagram, _ in connection.datagrams_to_send(now=0.0)]


def send_flight(client: socket.socket, flight: list[bytes]) -> None:
    """Send it twice, and then until it is answered, as clients do: a busy server may lose some, and answer late."""
    for turn in range(6):
        for datagram in flight:
            client.send(datagram)
        with contextlib.suppress(TimeoutError):
            # A negotiation (version 0, RFC 8999 6) answers a packet of another version, not this one.
            answer = client.recv(2000)
            if turn and answer[1:5] != bytes(4):
                return


def _quic(attempt: Attempt, name: str) -> None:
    with attempt.udp(QUIC) as client:
        send_flight(client, first_flight(name, (attempt.address, QUIC)))


def _quic_again(attempt: Attempt, name: str) -> None:
    """Another connection from the same port."""
    with attempt.udp(QUIC) as client:
        for each in (attempt.allowed, name):
            send_flight(client, first_flight(each, (attempt.address, QUIC)))


def _quic_behind_junk(count: int, attempt: Attempt, name: str) -> None:
    with attempt.udp(QUIC) as client:
        for _ in range(count):
            client.send(b"\x40" + os.urandom(40))
        send_flight(client, first_flight(name, (attempt.address, QUIC)))


def _quic_reversed(attempt: Attempt, name: str) -> None:
    """The last part of the hello comes first."""
    with attempt.udp(QUIC) as client:
        many = ["h3", *[f"alpn-{n:03}-{'x' * 40}" for n in range(60)]]
        send_flight(client, first_flight(name, (attempt.address, QUIC), alpn_protocols=many)[::-1])


def _quic_greased(attempt: Attempt, name: str) -> None:
    """A packet of a version that no server knows comes before it (RFC 9000 15)."""
    with attempt.udp(QUIC) as client:
        client.send(b"\xc0\x1a\x2a\x3a\x4a\x08" + os.urandom(8) + bytes(1186))
        send_flight(client, first_flight(name, (attempt.address, QUIC)))


def _quic_large(attempt: Attempt, name: str) -> None:
    """A hello in several Initial packets."""
    with attempt.udp(QUIC) as client:
        many = ["h3", *[f"alpn-{n:03}-{'x' * 40}" for n in range(60)]]
        send_flight(client, first_flight(name, (attempt.address, QUIC), alpn_protocols=many))


LINES = (
    Line("tls-hello", "TLS: a ClientHello", _hello, twin=True),
    Line("tls-records", "TLS: a ClientHello in many records", _records, twin=True),
    Line("tls-record-version", "TLS: a ClientHello in a record of version 0x0305", _record_version, twin=True),
    Line("tls-empty-record", "TLS: an empty record before the ClientHello", partial(_behind, b"\x16\3\1\0\0", TLS), twin=True),
    Line("tls-empty-records", "TLS: empty records between the parts of a ClientHello", _empty_between, twin=True),
    Line("tls-empty-ccs", "TLS: an empty ChangeCipherSpec before it", partial(_behind, b"\x14\3\1\0\0", TLS), twin=True),
    # OpenSSL refuses these; Go, Java and NSS take the first, GnuTLS the second.
    Line("tls-alert", "TLS: a warning before it", partial(_behind, b"\x15\3\1\0\2\1\x5a", PLAIN), twin=True),
    Line("tls-ccs", "TLS: a ChangeCipherSpec before it", partial(_behind, b"\x14\3\1\0\1\1", PLAIN), twin=True),
    Line("tls-tunnel", "TLS: behind `CONNECT` to an allowed host", _tunnel, twin=True),
    Line("tls-openvpn", "TLS: in the packets of OpenVPN over TCP", partial(_openvpn, False)),
    Line("tls-behind-openvpn", "TLS: behind packets of OpenVPN over TCP", partial(_openvpn, True)),
    Line("tls-pieces-100", "TLS: a ClientHello in segments of 100 bytes", partial(_pieces, 100), twin=True),
    Line("tls-pieces-10", "TLS: a ClientHello in segments of 10 bytes", partial(_pieces, 10)),
    Line("tls-large", "TLS: a ClientHello of 11 KB in segments of 1,024 bytes, the name at its end", _large, twin=True),
    Line(
        "tls-no-host-name",
        "TLS: a server name with characters that no host name has, which ends like an allowed one",
        _no_host_name,
    ),
    Line(
        "tls-retry", "TLS: the ClientHello after a HelloRetryRequest, in one segment with a ChangeCipherSpec", _retry, twin=True
    ),
    Line("tls-retry-behind-many", "TLS: a second ClientHello behind forty ChangeCipherSpec, in two records", _retry_behind_many),
    Line("tls-retry-apart", "TLS: the same, in a segment of its own", partial(_retry, joined=False), twin=True),
    Line("tls-urgent", "TLS: a byte of TCP urgent data inside the ClientHello", _urgent),
    Line("quic", "QUIC: a first connection", _quic, twin=True),
    Line("quic-again", "QUIC: a second connection from the same port", _quic_again, twin=True),
    Line(
        "quic-behind-junk",
        "QUIC: eight datagrams of junk before the first Initial packet",
        partial(_quic_behind_junk, 8),
        twin=True,
    ),
    Line("quic-behind-much-junk", "QUIC: 100 datagrams of junk before the first Initial packet", partial(_quic_behind_junk, 100)),
    Line("quic-large", "QUIC: a ClientHello in several Initial packets", _quic_large, twin=True),
    Line("quic-reversed", "QUIC: the same, the last of them first", _quic_reversed, twin=True),
    Line("quic-greased", "QUIC: behind a packet of a version that is none", _quic_greased, twin=True),
)
