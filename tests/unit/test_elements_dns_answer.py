"""`dns-answer`: what happens to an answer, over UDP and TCP, with the length and with what does not fit."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.dns_reply import rewritten
from nfq_agent.protocols import dns
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import Action

NAME = b"\1a\4good\4test\0"
OPT = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
A, AAAA = bytes((192, 0, 2, 1)), bytes(15) + b"\1"


def answer(*records: bytes, kind: int = 1, opt: bool = False, flags: int = 0x8180) -> bytes:
    head = struct.pack("!6H", 7, flags, 1, len(records), 0, opt)
    whole = [b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 300, len(each)) + each for each in records]
    return head + NAME + struct.pack("!HH", kind, 1) + b"".join(whole) + (OPT if opt else b"")


def read(message: bytes) -> dict[str, object]:
    facts = dns.message(message, strict=True)
    assert facts is not None
    return facts


@pytest.mark.parametrize("opt", [False, True])
@pytest.mark.parametrize("size", [None, "kept"])
def test_addresses_of_the_type_that_was_asked_for(opt: bool, size: str | None) -> None:
    sent = answer(b"\x0a\0\0\1", b"\x0a\0\0\2", opt=opt)
    made = rewritten(sent, [A, AAAA], 0, None if size is None else len(sent))
    assert made is not None
    assert size is None or len(made) == len(sent)
    assert read(made)["dns_answers"] == ("192.0.2.1",)
    assert made[:2] == sent[:2]
    other = rewritten(answer(bytes(16), kind=28), [A, AAAA], 0, None)
    assert other is not None
    assert read(other)["dns_answers"] == ("::1",)


def test_an_empty_answer_and_a_name_that_does_not_exist() -> None:
    sent = answer(b"\x0a\0\0\1")
    empty, none = rewritten(sent, [], 0, None), rewritten(sent, [], 3, len(sent))
    assert empty is not None
    assert none is not None
    assert (read(empty)["dns_answers"], read(empty)["dns_rcode"]) == ((), 0)
    assert (read(none)["dns_answers"], read(none)["dns_rcode"], len(none)) == ((), 3, len(sent))


def test_the_servers_flags_do_not_stay() -> None:
    made = rewritten(answer(A, flags=0x87A0), [], 0, None)
    assert made is not None
    assert made[2:4] == b"\x81\x80"


@given(st.binary(max_size=300), st.integers(0, 3), st.booleans())
def test_no_bytes_break_it(data: bytes, rcode: int, keep: bool) -> None:
    for message in (data, struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0) + NAME + b"\0\1\0\1" + data):
        if len(message) >= 17:
            made = rewritten(message, [A, AAAA], rcode, len(message) if keep else None)
            assert made is None or not keep or len(made) == len(message)


def bench(**options: Any) -> Bench:
    return Bench("dns-answer", names=["*.good.test"], **options)


def test_only_answers_for_the_names_are_changed() -> None:
    element = bench(addresses=["192.0.2.1"])
    changed = element.decide(udp("192.0.2.53:53", "192.0.2.2:4000", answer(b"\x0a\0\0\1")))
    assert changed.payload is not None
    for packet in (
        udp("192.0.2.53:54", "192.0.2.2:4000", answer(A)),
        udp("192.0.2.53:53", "192.0.2.2:4000", answer(A, flags=0x0100)),
        udp("192.0.2.53:53", "192.0.2.2:4000", answer(A).replace(b"good", b"evil")),
        udp("192.0.2.53:53", "192.0.2.2:4000", b"short"),
    ):
        assert element.decide(packet).payload is None


def test_over_tcp_only_what_is_whole_passes() -> None:
    element = bench(addresses=["192.0.2.1"])
    message = answer(b"\x0a\0\0\1")
    whole = struct.pack("!H", len(message)) + message
    other = whole.replace(b"good", b"evil")
    changed = element.decide(tcp("192.0.2.53:53", "192.0.2.2:4000", data=other + whole))
    assert changed.payload is not None
    assert changed.payload[-len(whole) - len(other) : -len(whole)] == other
    assert A in changed.payload
    assert element.decide(tcp("192.0.2.53:53", "192.0.2.2:4000", data=whole[:-4])).action is Action.DROP
    assert element.decide(tcp("192.0.2.53:53", "192.0.2.2:4000", data=other[:-4])).action is Action.ACCEPT
