"""The memory of decided connections: found by both directions, by another process too, bounded, and whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.flow_memory import PLACES, SIZE, FlowMemory
from nfq_agent.host.shared_file import shared_memory
from nfq_agent.packet import FiveTuple

FACTS = {"dpi": "decided", "protocol": "tls", "tls_sni": "www.good.test", "tls_alpn": ("h2", "http/1.1"), "ech": False}


def ends(number: int) -> FiveTuple:
    return FiveTuple(6, number.to_bytes(4, "big"), 1024 + number % 60000, b"\xc0\0\2\1", 443)


def memory() -> FlowMemory:
    return FlowMemory(memoryview(bytearray(SIZE)), b"0123456789abcdef")


@pytest.mark.parametrize("width", [4, 16])
def test_what_was_kept_is_found_by_both_directions(width: int) -> None:
    kept = memory()
    there = FiveTuple(6, b"\1" * width, 40000, b"\2" * width, 443)
    assert kept.recall(there) is None
    kept.keep(there, FACTS, True, 100.0)
    assert kept.recall(there) == kept.recall(there.reversed()) == (there, FACTS)
    assert kept.recall(there._replace(sport=40001)) is None
    kept.keep(there, {"dpi": "gave-up"}, True, 200.0)
    assert kept.recall(there) == (there, {"dpi": "gave-up"})
    kept.forget(there.reversed())
    assert kept.recall(there) is None


def test_another_process_finds_it_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "queue.flows"
    first = shared_memory(path, SIZE)
    FlowMemory(memoryview(first), b"a" * 16).keep(ends(1), FACTS, True, 1.0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert FlowMemory(memoryview(shared_memory(path, SIZE)), b"b" * 16).recall(ends(1)) == (ends(1), FACTS)


@pytest.mark.parametrize("spoil", ["size", "mode", "link", "symlink"])
def test_a_file_that_is_not_the_agents_own_is_made_again(tmp_path: Path, spoil: str) -> None:
    path, other = tmp_path / "f", tmp_path / "other"
    shared_memory(path, 4096)[:4] = b"mine"
    if spoil == "size":
        path.write_bytes(b"mine")
    elif spoil == "mode":
        path.chmod(0o620)
    elif spoil == "link":
        other.hardlink_to(path)
    else:
        path.rename(other)
        path.symlink_to(other)
    assert shared_memory(path, 4096)[:4] == b"\0\0\0\0"


def test_it_is_bounded_and_the_unanswered_go_first() -> None:
    kept = memory()
    settled = [ends(number) for number in range(2000)]
    for each in settled:
        kept.keep(each, FACTS, True, 1000.0)
    for number in range(10_000, 10_000 + 3 * PLACES // 2):
        kept.keep(ends(number), {"dpi": "decided"}, False, 2000.0)
    # A row that has more answered ones than places has lost some.
    assert sum(kept.recall(each) is not None for each in settled) > 1990


def test_a_name_is_kept_where_not_all_fits() -> None:
    kept = memory()
    facts = {**FACTS, "http_user_agent": "x" * 300, "http_path": "/" + "y" * 200}
    kept.keep(ends(1), facts, True, 1.0)
    found = kept.recall(ends(1))
    assert found is not None
    assert found[1]["tls_sni"] == "www.good.test"
    assert found[1]["dpi"] == "decided"


_ONE_MEMORY = memory()


@given(st.dictionaries(st.text(max_size=20), st.one_of(st.booleans(), st.integers(), st.text(max_size=300)), max_size=12))
def test_any_facts_can_be_kept(facts: dict[str, object]) -> None:
    kept = _ONE_MEMORY
    kept.keep(ends(7), {"dpi": "decided", **facts}, True, 1.0)
    found = kept.recall(ends(7))
    assert found is not None
    assert set(found[1]) <= {"dpi", *facts}
