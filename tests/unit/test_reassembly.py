"""The bytes of one direction, however its segments come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.reassembly import Reassembly

TEXT = bytes(range(256)) * 4


@given(
    st.integers(0, 0xFFFFFFFF),
    st.lists(st.tuples(st.integers(0, len(TEXT)), st.integers(0, 300)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_any_order_overlap_and_repetition_gives_the_bytes(first: int, extra: list[tuple[int, int]], random: object) -> None:
    # A covering of the text, and any other pieces of it besides, over the wrap of the sequence numbers too.
    pieces = [(at, TEXT[at : at + 100]) for at in range(0, len(TEXT), 100)]
    pieces += [(at, TEXT[at : at + size]) for at, size in extra]
    random.shuffle(pieces)  # type: ignore[attr-defined]  # hypothesis's own kind of Random
    stream = Reassembly(first)
    for at, piece in pieces:
        stream.add(first + at & 0xFFFFFFFF, piece)
    assert stream.data == TEXT
    assert stream.held == len(TEXT)
    assert not stream.conflict
    assert not stream.full


@given(st.lists(st.tuples(st.integers(-5000, 40000), st.binary(max_size=2000)), max_size=30))
def test_never_holds_more_than_its_limit(segments: list[tuple[int, bytes]]) -> None:
    stream = Reassembly(7, 4096)
    for at, segment in segments:
        stream.add(7 + at & 0xFFFFFFFF, segment)
        assert stream.held == len(stream.data) + sum(len(each) for _, each in stream._waiting) <= 4096  # noqa: SLF001  # what is kept is what is bounded


def test_a_gap_waits() -> None:
    stream = Reassembly(100)
    assert not stream.add(103, b"def")
    assert stream.data == b""
    assert stream.add(100, b"abc")
    assert stream.data == b"abcdef"


def test_differing_overlaps_are_a_conflict() -> None:
    stream = Reassembly(0)
    stream.add(0, b"good.test")
    stream.add(0, b"evil.test")
    assert stream.conflict
    assert stream.data == b"good.test"


def test_differing_overlaps_that_waited_are_a_conflict() -> None:
    stream = Reassembly(0)
    stream.add(4, b"good")
    stream.add(4, b"evil")
    assert not stream.conflict
    stream.add(0, b"name")
    assert stream.conflict


def test_bytes_before_the_beginning_are_cut_off() -> None:
    stream = Reassembly(100)
    # A keep-alive probe (RFC 9293 3.8.4) carries a byte of no meaning before the first.
    assert not stream.add(99, b"\0")
    assert stream.add(99, b"\0a")
    assert stream.data == b"a"
    assert not stream.conflict


def test_beyond_the_limit_is_said() -> None:
    stream = Reassembly(0, 10)
    stream.add(0, b"0123456789")
    assert not stream.full
    stream.add(10, b"x")
    assert stream.full
    assert stream.data == b"0123456789"


def test_it_grows_by_what_is_new_alone() -> None:
    stream = Reassembly(0)
    assert stream.add(0, b"abc")
    assert not stream.add(0, b"abc")
    assert not stream.add(1, b"b")


def test_what_waits_is_within_the_limit() -> None:
    stream = Reassembly(0, 10)
    stream.add(1, b"12345678")
    stream.add(2, b"23")
    assert not stream.full
    for _ in range(3):
        stream.add(3, b"34")
        assert stream.full
        assert stream.held == 10


def test_there_is_room_again_behind_what_is_forgotten() -> None:
    stream = Reassembly(0, 10)
    stream.add(0, b"0123456789x")
    assert stream.full
    stream.forget(4)
    assert not stream.full
    assert stream.add(10, b"abcd")
    assert not stream.full
    assert stream.data == b"456789abcd"


def test_half_of_the_numbers_away_is_before_the_beginning() -> None:
    """RFC 9293 3.4: numbers are compared by a signed difference of 32 bits."""
    stream = Reassembly(7, 10)
    assert not stream.add(7 + (1 << 31), b"x")
    assert not stream.full
