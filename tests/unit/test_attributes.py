"""Netlink attributes: what is written is read again, and what is cut off is refused."""

from __future__ import annotations

import pytest

from nfq_agent.host.attributes import attribute, attributes
from nfq_agent.host.rtnetlink import by_type


def test_what_is_written_is_read_again_whatever_its_length() -> None:
    values = [(kind, b"x" * kind) for kind in range(9)]
    data = b"".join(attribute(kind, value) for kind, value in values)
    assert len(data) % 4 == 0
    assert list(attributes(data)) == values
    assert by_type(data) == dict(values)


def test_the_flags_of_a_type_are_no_part_of_it() -> None:
    assert list(attributes(attribute(0x8000 | 7, b"nested") + attribute(0x4000 | 8, b"order"))) == [(7, b"nested"), (8, b"order")]


@pytest.mark.parametrize("tail", [b"\x03\0\1\0", b"\xff\0\1\0four"])
def test_one_that_is_cut_off_is_refused_or_left_out(tail: bytes) -> None:
    whole = attribute(5, b"five")
    with pytest.raises(ValueError, match="an attribute is cut off"):
        list(attributes(whole + tail))
    assert by_type(whole + tail + whole) == {5: b"five"}
