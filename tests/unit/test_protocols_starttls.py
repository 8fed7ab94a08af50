"""TLS behind another protocol: no command before it, and no second hello, hides a name."""

from __future__ import annotations

import pytest
from openings import OPENINGS, client_hello
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
