"""What a packet costs by the length of the list that it is looked up in: no kernel, thread time, lists of ten and of 100,000 in
turn on the same packets."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, Final

from bed import HERE  # it makes the modules of tests/ known
from measure import Benchmark, Goal
from openings import client_hello

from nfq_agent.packet import Packet
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import Action

assert HERE.is_dir()
_FEW: Final = 10
_MANY: Final = 100_000
_PACKETS: Final = 2_000
_ROUNDS: Final = 7
_SERVER: Final = "198.51.100.1:443"


@functools.cache
def _bench(key: str, count: int) -> Bench:
    """A policy of one rule with a list of so many entries, of which the last ten are met."""
    entries: list[Any]
    if key == "dst":
        entries = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(_MANY)]
    elif key == "dport":
        entries = [*range(1, 65536, 2)]
    else:
        entries = [f"host-{number}.other.test" for number in range(_MANY)]
    return Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", key: entries[-count:]}])


@functools.cache
def _packets(key: str) -> Sequence[Packet]:
    """Every other one meets the list."""
    found: list[Packet] = []
    for number in range(_PACKETS):
        client = f"10.9.{number >> 8}.{number & 255}:1024"
        meets = number % 2 == 0
        if key == "dst":
            found.append(udp(client, f"10.1.134.{150 + number % 10}:9" if meets else _SERVER))
        elif key == "dport":
            found.append(udp(client, "198.51.100.1:65535" if meets else "198.51.100.1:2"))
        else:
            name = f"host-{_MANY - 1 - number % 10}.other.test" if meets else f"other-{number}.other.test"
            found.append(tcp(client, _SERVER, client_hello(name), seq=6))
    return found


def cost(key: str, count: int) -> float:
    """Microseconds of CPU for a packet of a new flow: the least of the rounds."""
    bench, packets = _bench(key, count), _packets(key)
    least = float("inf")
    for _ in range(_ROUNDS):
        # Flows are new in each round, and headers are decoded again.
        bench.now += 1_000_000.0
        for packet in packets:
            packet._headers, packet.time = None, 0.0  # noqa: SLF001  # what a new packet has
        dropped = 0
        begin = time.thread_time()
        for packet in packets:
            dropped += bench.decide(packet).action is Action.DROP
        least = min(least, (time.thread_time() - begin) * 1e6 / len(packets))
        assert dropped == len(packets) // 2, dropped
    return least


_KINDS: Final = {"networks": ("dst", _MANY), "ports": ("dport", 32_768), "names": ("tls_sni", _MANY)}
BENCHMARKS: Final = (
    Benchmark(
        "lists", "a packet looked up in a list of ten, and in one of 100,000 (ports: 32,768)", "us of CPU a packet",
        {
            f"{count:,} {kind}": functools.partial(cost, key, count)
            for kind, (key, many) in _KINDS.items()
            for count in (_FEW, many)
        },
        tuple(Goal(f"{many:,} {kind}", "at most", 1.1, f"{_FEW} {kind}") for kind, (_, many) in _KINDS.items()),
    ),
)  # fmt: skip
