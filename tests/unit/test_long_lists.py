"""A list of a hundred thousand entries costs a packet what a list of ten costs: the same lines of code, counted and not timed."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from openings import client_hello

from nfq_agent.packet import Packet
from nfq_agent.patterns import Patterns
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import ACCEPT, Action, Verdict

MANY = 100_000
SERVER = "198.51.100.1:443"


def judged(bench: Bench, packets: list[Packet]) -> tuple[int, Verdict]:
    """How many lines of Python it takes to judge these packets, and the last verdict."""
    verdict = ACCEPT
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal count
        # Sets and dictionaries are not lines: they cost the same whatever their size.
        count += event == "line" and "nfq_agent" in frame.f_code.co_filename
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]  # what it returns is one of it
    try:
        for each in packets:
            verdict = bench.decide(each)
    finally:
        sys.settrace(before)
    return count, verdict


def networks(count: int) -> list[str]:
    hosts = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(count - 2)]
    return [*hosts, "192.0.2.0/24", "2001:db8::/32"]


def ports(count: int) -> list[str]:
    """As many as there are: every other port, so that none are neighbours, and the one that is asked for."""
    return [str(port) for port in range(1, min(2 * count, 65535), 2)] + ["53"]


def names(count: int) -> list[str]:
    return [f"host-{number}.other.test" for number in range(count - 2)] + ["*.good.test", "www-*.fine.test"]


def policy(**rule: object) -> Bench:
    return Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", **rule}])


def hello(name: str) -> list[Packet]:
    return [
        tcp("192.0.2.9:1024", SERVER, flags="S", seq=5),
        tcp(SERVER, "192.0.2.9:1024", flags="SA", seq=9, ack=6),
        tcp("192.0.2.9:1024", SERVER, client_hello(name), seq=6, ack=10),
    ]


@pytest.mark.parametrize(
    ("key", "entries", "packets"),
    [
        ("src", networks, lambda: [udp("192.0.2.7:1024", "198.51.100.1:9")]),
        ("src", networks, lambda: [udp("[2001:db8::7]:1024", "[2001:db9::1]:9")]),
        ("dport", ports, lambda: [udp("192.0.2.7:1024", "198.51.100.1:53")]),
        ("tls_sni", names, lambda: hello("www.good.test")),
        ("tls_sni", names, lambda: hello("www-7.fine.test")),
    ],
    ids=["IPv4", "IPv6", "ports", "names", "patterns"],
)
def test_a_packet_costs_the_same_lines(
    tmp_path: Path, key: str, entries: Callable[[int], list[str]], packets: Callable[[], list[Packet]]
) -> None:
    counted = {}
    for count in (10, MANY):
        path = tmp_path / f"{count}.txt"
        path.write_text("\n".join(entries(count)))
        bench = policy(**{key: f"file:{path}"})
        # What is made at the first packet, as a compiled pattern, is not of each packet.
        for again in (False, True):
            given = packets()
            for packet in given:
                packet.time = 1000.0 + 100 * again
            counted[count], verdict = judged(bench, given)
            assert verdict.action is Action.DROP
    assert counted[MANY] == counted[10] > 0


def test_patterns_with_a_plain_end_are_not_compared_one_by_one() -> None:
    globs = [f"www-*.name-{number}.test" for number in range(1000)]
    patterns = Patterns(globs)
    assert patterns.match("www-1.name-999.test")
    assert not patterns.match("web-1.name-999.test")
    # Of all of them one was compared.
    compiled = [each for each in patterns._by_tail.values() if not isinstance(each, list)]  # noqa: SLF001  # what it has made
    assert len(compiled) == 1
    assert patterns.plain is None


@pytest.mark.parametrize(
    "glob",
    [
        "www-*.a.test", "w*w.a.test", "*", "*.a.test", "*a.test", "w?w.a.test", "[ab].a.test", "[a.test", "*[.]a.test", "*.",
        "*.a.", "a*",
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["www-1.a.test", "www.a.test", "a.test", "b.a.test", "[a.test", ".a.test", "x.a.", "a", ""])
def test_a_pattern_matches_as_a_shell_s(glob: str, text: str) -> None:
    assert Patterns([glob, "other"]).match(text) == fnmatch.fnmatchcase(text, glob)
