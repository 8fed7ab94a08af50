"""The parsers, reassembly and the element under bytes without end. Run: .venv/bin/python tests/fuzz/fuzz_protocols.py [SECONDS]

Mutates real openings, cuts them into segments and datagrams, and stops at the first exception, at a parse that takes longer
than 50 ms of CPU, or at more bytes kept than the limits allow. Prints the seed, with which a run can be had again.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from openings import OPENINGS, dns_query

from nfq_agent.conversation import Conversation
from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.flow_table import FlowTable
from nfq_agent.message_events import BYTES
from nfq_agent.packet import Packet
from nfq_agent.protocols import dns, quic
from nfq_agent.protocols.known import PARSERS
from nfq_agent.reject import Allowance, reject
from nfq_agent.testing import tcp, udp

SLOWEST = 0.05
SEEDS = [part for client, server, _ in OPENINGS.values() for part in (client, server) if part]
DATAGRAMS = [dns_query("a.test"), b"\xc3\0\0\0\1\x08" + bytes(8) + b"\0\0\x44\x9c" + bytes(1180)]


def mutated(source: random.Random, data: bytes) -> bytes:
    """A few bytes changed, put in, cut out, or repeated."""
    changed = bytearray(data)
    for _ in range(source.randrange(6)):
        at = source.randrange(len(changed) + 1)
        kind = source.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = source.choice((0, 1, 0x0A, 0x16, 0x20, 0x7F, 0x80, 0xC0, 0xFF, source.randrange(256)))
        elif kind == 1:
            changed[at:at] = source.randbytes(source.randrange(9))
        elif kind == 2:
            del changed[at : at + source.randrange(9)]
        elif kind == 3:
            changed += bytes(changed[at : at + 40]) * source.randrange(60)
        else:
            other = source.choice(SEEDS)
            changed[at:] = other[source.randrange(len(other)) :]
    return bytes(changed[:20000])


def parse(data: bytes, other: bytes) -> None:
    """Every parser; none may be slow."""
    every: tuple[Callable[[bytes, bytes], object], ...] = (
        *PARSERS,
        lambda client, _: dns.datagram(client, True),
        lambda client, _: quic.Connections().add(client, 1.0),
    )
    for parser in every:
        begin = time.process_time()
        parser(data, other)
        if time.process_time() - begin > SLOWEST:
            raise AssertionError(f"{parser} took longer than {SLOWEST} s for {data!r}, {other!r}")


def talk(source: random.Random, element: Dpi, table: FlowTable, now: float, client: bytes, server: bytes) -> None:
    """The same through the element, cut, shuffled and repeated."""
    src, dst = f"192.0.2.{source.randrange(250)}:{source.randrange(1, 9)}", f"198.51.100.1:{source.choice((53, 443))}"
    isn = source.randrange(1 << 32)
    packets: list[Packet] = [tcp(src, dst, flags="S", seq=isn), tcp(dst, src, flags="SA", seq=7, ack=isn + 1)]
    pieces = []
    for data, one, two, base in ((client, src, dst, isn + 1), (server, dst, src, 8)):
        at = 0
        while at < len(data):
            size = source.choice((1, 7, 100, 1460, 20000))
            pieces.append(tcp(one, two, data[at : at + size], seq=base + at, flags=source.choice(("PA", "PA", "FPA", "SPA"))))
            at += size
    if source.random() < 0.5:
        source.shuffle(pieces)
    packets += pieces[:20]
    packets.append(udp(src, dst, mutated(source, source.choice(DATAGRAMS))))
    for packet in packets:
        flow = table.observe(packet.headers.five_tuple, now)
        element.decide(packet, flow)
        reject(packet, Allowance())
        reject(Packet(mutated(source, packet.payload)), Allowance())
        state = flow.state.get(element)
        kept = state.held if isinstance(state, Conversation) else 0
        assert kept <= 2 * BYTES, kept
        assert flow.facts["dpi"] in ("undecided", "decided", "gave-up")


def main(seconds: float) -> None:
    """Until the time is over."""
    seed = time.time_ns()
    print(f"seed {seed}, {seconds:g} s")
    source = random.Random(seed)
    element, table = Dpi("dpi", DpiOptions(openings=100), lambda *_, **__: None), FlowTable(1000)
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end:
        client, server = mutated(source, source.choice(SEEDS)), mutated(source, source.choice(SEEDS))
        parse(client, server if source.random() < 0.5 else b"")
        talk(source, element, table, rounds * 0.01, client, server)
        assert len(element.kept.open) <= 100
        rounds += 1
    print(f"{rounds} rounds, nothing found")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 3600)
