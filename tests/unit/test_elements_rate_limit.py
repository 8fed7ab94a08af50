"""The rate limit against a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from nfq_agent.packet import Packet, PacketError
from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import ACCEPT


def passed(bench: Bench, src: str, dst: str, count: int, apart: float) -> int:
    total = 0
    for _ in range(count):
        bench.now += apart
        total += bench.decide(tcp(src, dst)) is ACCEPT
    return total


@pytest.mark.parametrize(("src", "dst"), [("192.0.2.7:1", "192.0.2.1:2"), ("[2001:db8::7]:1", "[2001:db8::1]:2")])
def test_burst_first_then_the_rate(src: str, dst: str) -> None:
    bench = Bench("rate-limit", rate="100/s", burst=20)
    assert passed(bench, src, dst, 20, 0.0) == 20
    assert passed(bench, src, dst, 20, 0.0) == 0
    assert 499 <= passed(bench, src, dst, 5000, 0.001) <= 501
    bench.now += 3600
    assert passed(bench, src, dst, 100, 0.0) == 20


def test_below_the_rate_nothing_is_dropped() -> None:
    assert passed(Bench("rate-limit", rate="100/s", burst=1), "192.0.2.7:1", "192.0.2.1:2", 1000, 0.0101) == 1000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"per": "source"}, [1, 1, 0, 1]),
        ({"per": "destination"}, [1, 0, 1, 1]),
        ({"per": "all"}, [1, 0, 0, 0]),
        ({"per": "source", "prefix": 24, "prefix6": 64}, [1, 0, 0, 1]),
        ({"per": "source", "prefix": 0}, [1, 0, 0, 1]),
    ],
)
def test_what_has_a_bucket_of_its_own(options: dict[str, Any], expected: list[int]) -> None:
    bench = Bench("rate-limit", rate="1/h", **options)
    ends = [
        ("192.0.2.7:1", "192.0.2.1:2"), ("192.0.2.8:1", "192.0.2.1:2"), ("192.0.2.7:1", "192.0.2.2:2"),
        ("[2001:db8::7]:1", "[2001:db8::1]:2"),
    ]  # fmt: skip
    assert [passed(bench, src, dst, 1, 0.0) for src, dst in ends] == expected


def test_memory_is_bounded_and_a_forgotten_source_starts_fresh() -> None:
    bench = Bench("rate-limit", rate="1/h", memory=100)
    sources = [f"10.0.{number // 256}.{number % 256}:1" for number in range(1000)]
    assert sum(passed(bench, source, "192.0.2.1:2", 1, 0.0) for source in sources) == 1000
    assert passed(bench, sources[0], "192.0.2.1:2", 1, 0.0) == 1
    assert passed(bench, sources[-1], "192.0.2.1:2", 1, 0.0) == 0


def test_what_was_dropped_is_said() -> None:
    bench = Bench("rate-limit", rate="10/s", burst=1)
    let = passed(bench, "192.0.2.7:1", "192.0.2.1:2", 2500, 0.01)
    bench.stop()
    assert len(bench.said) == 3
    assert let + sum(said.fields["dropped"] for said in bench.said) == 2500
    assert bench.lines[0].endswith("packets dropped: more than 10/s for one source")


def test_a_malformed_packet_is_the_queue_s_business() -> None:
    with pytest.raises(PacketError):
        Bench("rate-limit", rate="1/s").decide(Packet(b"\x45"))
