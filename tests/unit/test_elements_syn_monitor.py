"""The SYN monitor's lines, its limit for each source and its memory."""

from __future__ import annotations

import ipaddress
import re
import tracemalloc

import pytest
from pydantic import ValidationError

from nfq_agent.elements.syn_monitor import SynMonitorOptions
from nfq_agent.packet import Packet
from nfq_agent.testing import Bench, tcp, udp


def syn(src: str, dst: str = "192.0.2.1:22", seq: int = 1, time: float = 0.0) -> Packet:
    return tcp(src, dst, flags="S", seq=seq, time=time)


def test_the_line_in_both_families() -> None:
    bench = Bench("syn-monitor")
    bench.assert_accepted(syn("192.0.2.7:40000"))
    bench.assert_accepted(syn("[2001:db8::7]:40000", "[2001:db8::1]:22"))
    assert bench.lines == [
        "A new tcp connection will be established: 192.0.2.7:40000 -> 192.0.2.1:22",
        "A new tcp connection will be established: [2001:db8::7]:40000 -> [2001:db8::1]:22",
    ]
    assert bench.said[0].level == "info"
    assert bench.said[0].fields == {
        "src": "192.0.2.7", "sport": 40000, "dst": "192.0.2.1", "dport": 22, "proto": "tcp", "hook": "INPUT",
        "verdict": "accept",
    }  # fmt: skip


@pytest.mark.parametrize("flags", ["SA", "A", "R", "RA", "F", "FA", "SF", "SR", ""])
def test_what_opens_no_connection(flags: str) -> None:
    bench = Bench("syn-monitor")
    bench.decide(tcp("192.0.2.7:40000", "192.0.2.1:22", flags=flags))
    bench.decide(udp("192.0.2.7:40000", "192.0.2.1:22"))
    bench.decide(Packet(b"\x45"))
    bench.decide(Packet(b""))
    assert bench.lines == []


def test_a_syn_with_ecn_flags_opens_one() -> None:
    bench = Bench("syn-monitor")
    bench.decide(tcp("192.0.2.7:40000", "192.0.2.1:22", flags="SEC"))
    assert len(bench.lines) == 1


def test_a_syn_that_is_sent_again_is_no_new_connection() -> None:
    bench = Bench("syn-monitor", memory=2)
    for _ in range(3):
        bench.decide(syn("192.0.2.7:40000", seq=77))
    assert len(bench.lines) == 1
    bench.decide(syn("192.0.2.7:40000", seq=78))
    assert len(bench.lines) == 2


def test_at_most_so_many_lines_for_one_source_in_any_second() -> None:
    bench = Bench("syn-monitor", per_source="5/s")
    shown: list[float] = []
    for number in range(1000):
        before = len(bench.lines)
        now = 1000.0 + number / 37
        bench.decide(syn("192.0.2.7:40000", seq=number, time=now))
        if any(line.startswith("A new") for line in bench.lines[before:]):
            shown.append(now)
    assert all(later - earlier >= 1.0 for earlier, later in zip(shown, shown[5:], strict=False))
    assert 5 * 26 <= len(shown) <= 5 * 28
    bench.stop()
    summaries = [said for said in bench.said if "not shown" in said.message]
    assert re.fullmatch(r"syn-monitor: \d+ new connections were not shown: more than 5/s from one source", summaries[0].message)
    assert len(shown) + sum(said.fields["suppressed"] for said in summaries) == 1000
    # 27 seconds: two summaries on the way, and one at the end.
    assert len(summaries) == 3


def test_one_source_takes_nothing_from_another() -> None:
    bench = Bench("syn-monitor", per_source="1/m")
    for number in range(50):
        bench.decide(syn("192.0.2.7:40000", seq=number))
    bench.decide(syn("192.0.2.8:40000"))
    bench.decide(syn("[2001:db8::7]:40000", "[2001:db8::1]:22"))
    assert len(bench.lines) == 3


def of_source(number: int, seq: int = 1, time: float = 1000.0) -> Packet:
    """A SYN of one of many sources."""
    source = ipaddress.ip_address(int(ipaddress.ip_address("2001:db8::")) + (number << 16))
    return syn(f"[{source}]:40000", "[2001:db8::1]:22", seq, time)


def test_ten_thousand_sources_are_remembered_in_ten_megabytes() -> None:
    assert SynMonitorOptions().memory >= 10_000
    remembered = 500
    bench = Bench("syn-monitor", per_source="5/s", memory=remembered)

    def flood(first: int, count: int) -> int:
        """Bytes in use after SYNs of so many new sources; each has its line."""
        for number in range(first, first + count):
            bench.decide(of_source(number))
            assert len(bench.said) == 1
            bench.said.clear()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = flood(0, 1)
        full = flood(1, remembered - 1)
        later = flood(remembered, 3 * remembered)
    finally:
        tracemalloc.stop()
    assert (full - before) / remembered * SynMonitorOptions().memory < 10_000_000
    # Three times as many more take the place of the first.
    assert later - full < (full - before) / 2


@pytest.mark.parametrize("memory", [1, 7, 100])
def test_the_connection_seen_longest_ago_is_forgotten_first(memory: int) -> None:
    bench = Bench("syn-monitor", memory=memory)
    for number in range(memory):
        bench.decide(of_source(number))
    bench.decide(of_source(0))
    assert len(bench.lines) == memory, "the first is remembered while there is room"
    bench.decide(of_source(memory))
    bench.decide(of_source(0))
    assert len(bench.lines) == memory + 2, "the first was forgotten for one more"


@pytest.mark.parametrize("memory", [1, 7, 100])
def test_the_source_seen_longest_ago_is_forgotten_first(memory: int) -> None:
    bench = Bench("syn-monitor", per_source="1/h", memory=memory)
    for number in range(memory):
        bench.decide(of_source(number))
    bench.decide(of_source(0, seq=2))
    assert len(bench.lines) == memory, "the first is limited while there is room"
    # As many others as are remembered: each has a line, and the first has another one then.
    for number in range(1, memory + 1):
        bench.decide(of_source(memory + number))
    bench.decide(of_source(0, seq=3))
    assert len(bench.lines) == memory + memory + 1, "the first was forgotten for the others"


def test_a_clock_that_is_set_back_silences_no_source() -> None:
    bench = Bench("syn-monitor", per_source="1/h")
    bench.decide(syn("192.0.2.7:1", seq=1, time=1e9))
    bench.decide(syn("192.0.2.7:1", seq=2, time=1e9 - 86400))
    assert len(bench.lines) == 2


@pytest.mark.parametrize("rate", ["0/s", "5", "5/d", "-1/s", 5, "1.5/s"])
def test_what_is_not_a_rate(rate: object) -> None:
    with pytest.raises(ValidationError, match=r"is not a valid rate; allowed: a whole number from 1 on with /s, /m or /h"):
        Bench("syn-monitor", per_source=rate)
