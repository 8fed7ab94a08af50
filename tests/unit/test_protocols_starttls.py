"""TLS behind another protocol: no command before it, and no second hello, hides a name."""

from __future__ import annotations

import pytest
from openings import OPENINGS, client_hello, record
from talk import Talk

HELLO, SECOND = client_hello("a.server.test"), client_hello("b.server.test")
BEFORE = {
    "smtp": b"EHLO me.test\r\nMAIL FROM:<a@b.test>\r\nRSET\r\nSTARTTLS\r\n",
    "smtp without a greeting": b"NOOP\r\nEHLO me.test\r\nSTARTTLS\r\n",
    "imap": b"a FOO\r\nb STARTTLS\r\n",
    "xmpp": b"<stream:stream\nto='chat.test'><starttls/>",
    "PROXY": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "ssh": b"SSH-2.0-x\r\nSTARTTLS\r\n",
    "mysql": bytes.fromhex("20000001 85aeff19 00000001 21") + bytes(23),
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("cut", [None, 1, 3, 6, 40])
def test_a_hello_behind_other_words(before: bytes, cut: int | None) -> None:
    data = before + HELLO
    at = len(data) if cut is None else len(before) + cut
    talk = Talk().open().say(data[:at])
    if at < len(data):
        talk.say(data[at:], at)
    assert talk.facts["tls_sni"] == "a.server.test"
    assert talk.facts["dpi"] == "decided"


@pytest.mark.parametrize("name", [name for name, (_, _, facts) in OPENINGS.items() if name.endswith(("-starttls", "-stls"))])
def test_a_second_hello(name: str) -> None:
    client, server, facts = OPENINGS[name]
    talk = Talk().open().answer(server).say(client).say(b"\x14\3\3\0\1\1" + SECOND, len(client))
    assert talk.facts["tls_sni"] == "b.server.test"
    assert talk.facts["protocol"] == facts["protocol"]


def test_noise_that_ends_like_a_record_is_not_waited_for() -> None:
    talk = Talk().open().say(b"\x00\x01\x02" * 30 + b"\x16\x03")
    assert talk.facts["dpi"] == "gave-up"
    talk.say(b"\x00" * 40000, 92).say(HELLO, 40092)
    assert "tls_sni" not in talk.facts


def test_noise_that_begins_like_a_hello_that_no_server_takes() -> None:
    """Its length is 131,396 bytes at most in OpenSSL; one of four thousand long connections would be a conflict otherwise."""
    talk = Talk().open().say(b"SSH-2.0-x\r\n")
    at = 11
    for longest in (3, 0x7F, 0xFF):
        talk.say(noise := b"\x16\3\x9a\x10\0\1" + bytes((longest,)) + b"\x55" * 50, at)
        at += len(noise)
    assert talk.facts["protocol"] == "ssh"
    assert talk.facts["dpi"] == "decided"
    assert talk.say(HELLO, at).facts["tls_sni"] == "a.server.test"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_hello_in_short_records(size: int) -> None:
    handshake = HELLO[5:]
    talk = Talk().open().say(b"SSH-2.0-x\r\n")
    talk.say(record(handshake[:size]) + record(handshake[size:]), 11)
    assert talk.facts["tls_sni"] == "a.server.test"


TUNNEL = b"CONNECT a.server.test:443 HTTP/1.1\r\nHost: a.server.test\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 6, 200])
def test_a_hello_in_a_tunnel_of_http(cut: int) -> None:
    """CONNECT names a host, the hello another one, or the same."""
    talk = Talk().open().say(TUNNEL).say(HELLO[:cut], len(TUNNEL)).say(HELLO[cut:], len(TUNNEL) + cut)
    assert talk.facts["tls_sni"] == talk.facts["http_host"] == "a.server.test"
    assert "conflict" not in talk.facts
    talk = Talk().open().say(TUNNEL).say(SECOND[:cut], len(TUNNEL)).say(SECOND[cut:], len(TUNNEL) + cut)
    assert talk.facts["tls_sni"] == "b.server.test"
    assert talk.facts["conflict"] == "a tunnel to one host, and a ClientHello for another"
    assert "http_host" not in talk.facts


def test_a_second_hello_in_a_tunnel_of_http() -> None:
    talk = Talk().open().say(TUNNEL).say(HELLO, at := len(TUNNEL)).say(b"\x14\3\3\0\1\1" + SECOND, at + len(HELLO))
    assert talk.facts["tls_sni"] == "b.server.test"
    assert "conflict" in talk.facts


@pytest.mark.parametrize("host", ["192.0.2.7", "[2001:db8::7]"])
def test_a_tunnel_to_an_address(host: str) -> None:
    tunnel = TUNNEL.replace(b"a.server.test", host.encode())
    facts = Talk().open().say(tunnel + HELLO).facts
    assert facts["tls_sni"] == "a.server.test"
    assert facts["http_host"] == host.strip("[]")


@pytest.mark.parametrize(
    "before",
    [
        b"SSH-2.0-x\r\n",
        b"EHLO me.test\r\nSTARTTLS\r\n",
        b"\0\1\2",
    ],
)
def test_other_protocols_in_a_tunnel_of_http(before: bytes) -> None:
    talk = Talk().open().say(TUNNEL).say(before, at := len(TUNNEL))
    assert talk.facts["http_host"] == "a.server.test"
    assert talk.facts["dpi"] == "decided"
    assert talk.say(SECOND, at + len(before)).facts["tls_sni"] == "b.server.test"


def test_a_server_that_does_not_change_the_protocol() -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: a.server.test\r\nConnection: upgrade\r\nUpgrade: TLS/1.2\r\n\r\n"
    again = b"GET / HTTP/1.1\r\nHost: b.server.test\r\n\r\n"
    assert Talk().open().say(upgrade).say(again, len(upgrade)).facts["http_host"] == "b.server.test"
    assert Talk().open().say(upgrade).say(HELLO, len(upgrade)).facts["http_host"] == "a.server.test"
