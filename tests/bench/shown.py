"""What a new flow costs in CPU with `dpi` and a policy of a hundred names: every packet shown, and with the flow table.

No kernel, thread time, the two ways in turn on the same packets, the least of seven rounds, so that other work counts little.
Run: .venv/bin/python tests/bench/shown.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from openings import client_hello, dns_query

from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import ACCEPT, DROP

SERVER: Final = "198.51.100.1:443"
RESOLVER: Final = "198.51.100.1:53"
NAMES: Final = ["*.good.test", *(f"host-{number}.other.test" for number in range(99))]
RULES: Final = [{"action": "accept", key: NAMES} for key in ("http_host", "tls_sni", "dns_name")]
FIELDS: Final = b"".join(b"X-Header-%d: %s\r\n" % (number, b"v" * 45) for number in range(10))
# ChangeCipherSpec and an encrypted record.
REST: Final = b"\x14\3\3\0\1\1\x17\3\3\0\x45" + bytes(0x45)
COUNT: Final = 400
ROUNDS: Final = 7


def judge(rules: Sequence[Mapping[str, object]] = RULES) -> PacketJudge:
    """A worker's judge of the two elements, with a flow memory."""

    def emit(*_: object, **__: object) -> None:
        pass

    elements: list[PacketElement] = []
    for kind, options in (("dpi", {}), ("policy", {"default": "drop", "rule": [*rules]})):
        cls = packet_element(kind)
        elements.append(cls(kind, cls.Options.from_table(options), emit))
    context = Context(flows=FlowMemory(memoryview(bytearray(SIZE)), bytes(16)))
    settings = WorkerSettings(1, ACCEPT, DROP, monitor=False)
    return PacketJudge(ElementChain(elements, ACCEPT, context=context), settings, Counters(), emit, lambda *_: None)


def connection(number: int, opening: bytes, more: bytes = b"") -> Iterable[Packet]:
    """Its packets, from SYN to the last acknowledgement."""
    client = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:1024"
    at, answered = 6, 10
    yield tcp(client, SERVER, flags="S", seq=5)
    yield tcp(SERVER, client, flags="SA", seq=9, ack=at)
    yield tcp(client, SERVER, flags="A", seq=at, ack=answered)
    for message in filter(None, (opening, more)):
        yield tcp(client, SERVER, message, seq=at, ack=answered)
        at += len(message)
        yield tcp(SERVER, client, b"x" * 500, seq=answered, ack=at)
        answered += 500
    yield tcp(client, SERVER, flags="FA", seq=at, ack=answered)
    yield tcp(SERVER, client, flags="FA", seq=answered, ack=at + 1)
    yield tcp(client, SERVER, flags="A", seq=at + 1, ack=answered + 1)


def opening(number: int, hello: bytes, pieces: int) -> list[Packet]:
    """The packets of a flow up to its hello, which is in so many segments."""
    client = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:1024"
    step = -(-len(hello) // pieces)
    return [
        *list(connection(number, hello))[:3],
        *(tcp(client, SERVER, hello[at : at + step], seq=6 + at, ack=10) for at in range(0, len(hello), step)),
    ]


def identified(pieces: int, rules: Sequence[Mapping[str, object]] = RULES, *, differ: bool = False) -> float:
    """Microseconds of CPU for a TLS flow until its name is known and judged, in a worker: the least of the rounds.

    differ: each hello has a JA3 and a JA4 of its own, since its first cipher is another number.
    """
    hello = client_hello("www.good.test", alpn=("h2", "http/1.1"))
    # Behind the records' and the message's head, the version, the random value and the session (RFC 8446 4.1.2), and a length.
    at = 44 + hello[43] + 2
    packets = [
        packet
        for number in range(COUNT)
        for packet in opening(number, hello[:at] + number.to_bytes(2, "big") + hello[at + 2 :] if differ else hello, pieces)
    ]
    return min(cost(packets, True, rules)[0] / COUNT for _ in range(ROUNDS))


def cost(packets: list[Packet], with_table: bool, rules: Sequence[Mapping[str, object]] = RULES) -> tuple[float, int]:
    """Microseconds of all, and how many were shown."""
    judged = judge(rules)
    table = judged.settle_flows() if with_table else None
    assert table is None or isinstance(table, FlowTable)
    shown = 0
    for packet in packets:
        # The headers are decoded again.
        packet._headers = None  # noqa: SLF001  # what a new packet has
    begin = time.thread_time()
    for packet in packets:
        if table is None or table.look_up(packet.payload, packet.length, 1.0) is None:
            judged.verdict(packet)
            shown += 1
    return (time.thread_time() - begin) * 1e6, shown


def measure(name: str, packets: list[Packet]) -> None:
    """Print the time for each connection, both ways."""
    least = {False: float("inf"), True: float("inf")}
    for _ in range(ROUNDS):
        for with_table in least:
            spent, shown = cost(packets, with_table)
            least[with_table] = min(least[with_table], spent / COUNT)
    print(f"{name}: shown {least[False]:.1f} us, table {least[True]:.1f} us, {shown / COUNT:.2f} packets shown")


def main() -> None:
    """All of them."""
    head = b"GET /some/path HTTP/1.1\r\nHost: %s\r\n" + FIELDS + b"\r\n"
    hello = client_hello("www.good.test", alpn=("h2", "http/1.1"))
    numbers = range(COUNT)
    measure("new HTTP connection", [p for n in numbers for p in connection(n, head % b"www.good.test")])
    measure("new HTTP connection, each host new", [p for n in numbers for p in connection(n, head % (b"h%d.good.test" % n))])
    measure("new TLS connection", [p for n in numbers for p in connection(n, hello, REST)])
    measure("first four packets of a TLS connection", [p for n in numbers for p in list(connection(n, hello))[:4]])
    query = dns_query("www.good.test")
    clients = [f"10.0.{n >> 8}.{n & 255}:1024" for n in numbers]
    measure("DNS query, each a new flow", [udp(client, RESOLVER, query) for client in clients])
    asked = [(client, f"host-{n}.good.test") for n, client in enumerate(clients)]
    both = [
        packet
        for client, name in asked
        for packet in (udp(client, RESOLVER, dns_query(name)), udp(RESOLVER, client, dns_query(name, flags=0x8180)))
    ]
    measure("the same with its answer, each for a new name", both)
    measure("datagram that says nothing, each a new flow", [udp(client, SERVER, bytes(64)) for client in clients])
    many = [packet for client in clients for packet in [udp(client, SERVER, bytes(64))] * 32]
    measure("32 datagrams that say nothing, each a new flow", many)


if __name__ == "__main__":
    main()
