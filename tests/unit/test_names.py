"""The table of names: what answers prove, for how long, shared by several writers, and bounded."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.dns_answer import DnsAnswer, DnsQuestion, answer, question
from nfq_agent.names import PLACES, REGIONS, SIZE, NameTable

A, B = b"\x0a\0\0\1", b"\x0a\0\0\2"


def table(memory: bytearray | None = None, writer: int = 1) -> NameTable:
    return NameTable(
        memoryview(memory or bytearray(SIZE)), b"x" * 16, writer, ["*.good.test", "www.good.test"], [b"\x7f\0\0\x35"]
    )


def said(
    name: str, *addresses: tuple[str, bytes, int], aliases: tuple[tuple[str, str, int], ...] = (), kind: int = 1
) -> DnsAnswer:
    return DnsAnswer(DnsQuestion(1, name, kind), addresses, aliases)


def test_an_address_and_its_time() -> None:
    names = table()
    names.learn(said("a.good.test", ("a.good.test", A, 600)), 1000.0)
    assert names.names(A, 1599.0) == ("a.good.test",)
    assert names.gave("a.good.test", A, 1599.0)
    assert not names.gave("a.good.test", B, 1001.0)
    assert not names.gave("b.good.test", A, 1001.0)
    assert names.names(A, 1602.0) == ()


def test_a_short_time_counts_as_a_minute_and_a_long_one_as_a_day() -> None:
    names = table()
    names.learn(said("a.good.test", ("a.good.test", A, 0)), 0.0)
    names.learn(said("b.good.test", ("b.good.test", B, 1 << 30)), 0.0)
    assert names.names(A, 60.0)
    assert not names.names(A, 62.0)
    assert names.names(B, 86400.0)
    assert not names.names(B, 86402.0)


def test_a_later_answer_does_not_shorten_an_earlier_one() -> None:
    names = table()
    names.learn(said("a.good.test", ("a.good.test", A, 600)), 0.0)
    names.learn(said("a.good.test", ("a.good.test", A, 5)), 10.0)
    assert names.names(A, 590.0) == ("a.good.test",)


def test_only_names_that_a_rule_asks_for_are_kept() -> None:
    names = table()
    names.learn(said("a.bad.test", ("a.bad.test", A, 60)), 0.0)
    assert names.names(A, 1.0) == ()


def test_a_chain_of_aliases_in_any_order_holds_as_long_as_its_shortest_part() -> None:
    names = table()
    aliases = (("b.cdn.test", "c.cdn.test", 300), ("a.good.test", "b.cdn.test", 100))
    names.learn(said("a.good.test", ("c.cdn.test", A, 900), aliases=aliases), 0.0)
    assert names.names(A, 100.0) == ("a.good.test",)
    assert names.names(A, 102.0) == ()


def test_an_owner_that_was_not_asked_for_proves_nothing() -> None:
    names = table()
    names.learn(said("a.good.test", ("b.good.test", A, 60)), 0.0)
    assert names.names(A, 1.0) == ()


def test_a_loop_of_aliases_ends() -> None:
    names = table()
    aliases = (("a.good.test", "b.good.test", 60), ("b.good.test", "a.good.test", 60))
    names.learn(said("a.good.test", ("b.good.test", A, 60), aliases=aliases), 0.0)
    assert set(names.names(A, 1.0)) == {"a.good.test", "b.good.test"}


def test_a_service_on_another_host_is_found_when_its_address_is_asked_for() -> None:
    names = table()
    names.learn(said("a.good.test", aliases=(("a.good.test", "edge.cdn.test", 300),), kind=65), 0.0)
    names.learn(said("edge.cdn.test", ("edge.cdn.test", A, 300)), 10.0)
    assert names.names(A, 11.0) == ("a.good.test",)


def test_all_workers_see_what_each_writes() -> None:
    memory = bytearray(SIZE)
    writers = [table(memory, number) for number in range(1, REGIONS + 1)]
    for number, each in enumerate(writers):
        assert each.writes
        each.learn(said(f"w{number}.good.test", (f"w{number}.good.test", A, 60)), 0.0)
    assert all(len(each.names(A, 1.0)) == REGIONS for each in writers)
    assert not table(memory, 99).writes
    assert len(table(memory, 99).names(A, 1.0)) == REGIONS
    # Its successor has the same region again.
    assert table(memory, 3).writes


def test_it_is_bounded() -> None:
    names = table()
    for number in range(2 * PLACES):
        name = f"n{number}.good.test"
        names.learn(said(name, (name, struct.pack("!I", number), 600)), float(number % 100))
    known = sum(bool(names.names(struct.pack("!I", number), 100.0)) for number in range(2 * PLACES))
    assert PLACES * 0.8 < known <= PLACES
    many = table()
    for number in range(200):
        many.learn(said(f"n{number}.good.test", (f"n{number}.good.test", A, 600)), 0.0)
    assert len(many.names(A, 1.0)) == 32


def test_a_name_that_is_too_long_is_not_kept() -> None:
    names = table()
    name = "x" * 60 + "." + "y" * 63 + "." + "z" * 63 + ".good.test"
    names.learn(said(name, (name, A, 60)), 0.0)
    assert names.names(A, 1.0) == ()


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    for read in (question, answer):
        read(data)
        read(b"\0\1\x81\x80\0\1\0\2\0\0\0\0\1a\4good\4test\0\0\1\0\1" + data)


@pytest.mark.parametrize("hint", [b"\0\4\0\4" + A, b"\0\6\0\x10" + A * 4], ids=["4", "6"])
def test_a_zone_proves_no_name_of_another_one_by_its_hints(hint: bytes) -> None:
    """Any zone may name a target of another one; RFC 9460 2.5.2 lets it publish addresses of that."""
    head = struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0) + b"\1a\4evil\4test\0\0\x41\0\1"
    record = b"\0\1\1a\4good\4test\0" + hint
    said = answer(head + b"\xc0\x0c\0\x41\0\1\0\0\0\x3c" + struct.pack("!H", len(record)) + record)
    assert said is not None
    names = table()
    names.learn(said, 0.0)
    assert names.names(hint[4:], 1.0) == ()


@pytest.mark.parametrize("flags", [0x0100, 0x8183, 0x9980])
def test_what_is_no_answer(flags: int) -> None:
    head = struct.pack("!6H", 7, flags, 1, 1, 0, 0) + b"\1a\4good\4test\0\0\1\0\1"
    assert answer(head + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + A) is None


def test_an_answer_as_it_is_sent() -> None:
    head = struct.pack("!6H", 7, 0x8180, 1, 1, 0, 1) + b"\1A\4good\4test\0\0\1\0\1"
    records = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + A + b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
    assert answer(head + records) == DnsAnswer(DnsQuestion(7, "a.good.test", 1), (("a.good.test", A, 60),), ())
