"""Samples: how many, which, and who gets to see them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import ACCEPT, DROP, Verdict

SAMPLED = [("sample", {"one_in": 10})]


def packets(count: int) -> list[Any]:
    return [tcp(f"10.0.{number // 256}.{number % 256}:{number + 1}", "192.0.2.1:80", id=number) for number in range(count)]


def shown(sample: dict[str, Any], count: int = 1000) -> list[str]:
    bench = Bench("log", before=[("sample", sample)], per_second=0)
    for packet in packets(count):
        bench.assert_accepted(packet)
    return bench.lines


def test_one_in_so_many_reaches_the_log() -> None:
    lines = shown({"one_in": 10})
    assert len(lines) == 100
    assert lines[0].startswith("tcp 10.0.0.9:10 ->")
    assert len(shown({"one_in": 1})) == 1000


def test_a_probability_with_a_seed() -> None:
    first = shown({"probability": 0.25, "seed": 7})
    assert 200 < len(first) < 300
    assert first == shown({"probability": 0.25, "seed": 7})
    assert first != shown({"probability": 0.25, "seed": 8})
    assert shown({"probability": 0.0}) == []
    assert len(shown({"probability": 1.0})) == 1000


def test_whole_flows_in_both_directions() -> None:
    bench = Bench("log", before=[("sample", {"one_in": 4, "per_flow": True})], per_second=0)
    seen = []
    for number in range(400):
        here, there = f"10.0.1.{number % 250}:{number + 1}", "192.0.2.1:80"
        before = len(bench.lines)
        for packet in (tcp(here, there), tcp(there, here), tcp(here, there)):
            bench.decide(packet)
        seen.append(len(bench.lines) - before)
    assert set(seen) == {0, 3}
    assert 60 < seen.count(3) < 140


@pytest.mark.parametrize(("rest", "verdict"), [("accept", ACCEPT), ("drop", DROP)])
def test_the_rest_may_be_answered_at_once(rest: str, verdict: Verdict) -> None:
    other = {"accept": "drop", "drop": "accept"}[rest]
    bench = Bench("policy", before=[("sample", {"one_in": 10, "rest": rest})], default=other)
    given = [bench.decide(packet) for packet in packets(1000)]
    assert given.count(verdict) == 900
    assert given[9] is not verdict


def test_what_was_decided_in_front_is_sampled_too() -> None:
    bench = Bench("log", before=[("policy", {"default": "drop"}), ("sample", {"one_in": 10, "rest": "accept"})], per_second=0)
    for packet in packets(100):
        bench.assert_dropped(packet)
    assert len(bench.lines) == 10


@pytest.mark.parametrize("options", [{}, {"one_in": 2, "probability": 0.5}])
def test_one_way_to_say_how_many(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"allowed: one_in = 100, or probability = 0\.01"):
        Bench("sample", **options)
