"""What `dpi` and a name policy cost together: microseconds of CPU, without a kernel, the best of seven rounds."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nfq_agent.packet import Packet
from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import Action

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from openings import client_hello, dns_query

CLIENT, SERVER, RESOLVER = "192.0.2.1:40000", "198.51.100.1:443", "198.51.100.1:53"
RULES = [{"action": "accept", key: ["*.good.test"]} for key in ("http_host", "tls_sni", "dns_name")]
HEAD = (
    b"GET /some/path HTTP/1.1\r\nHost: www.good.test\r\n"
    + b"".join(b"X-Header-%d: %s\r\n" % (number, b"v" * 45) for number in range(10))
    + b"\r\n"
)
ROUNDS = 7


def measure(name: str, packets: Sequence[Packet], count: int) -> None:
    """Print the time for one of `count` of what the packets are."""
    best = float("inf")
    for _ in range(ROUNDS):
        bench = Bench("policy", before=[("dpi", {})], default="drop", rule=RULES)
        for packet in packets:
            # The headers are decoded again.
            packet._headers = None  # noqa: SLF001  # what a new packet has
        begin = time.process_time()
        for packet in packets:
            assert bench.decide(packet).action is Action.ACCEPT
        best = min(best, time.process_time() - begin)
    print(f"{name}: {best / count * 1e6:.1f} us")


def connections(opening: bytes, count: int) -> list[Packet]:
    """SYN, SYN and ACK, ACK and the opening, from as many addresses."""
    packets = []
    for number in range(count):
        src = f"10.0.{number >> 8}.{number & 255}:1024"
        packets += [
            tcp(src, SERVER, flags="S", seq=5), tcp(SERVER, src, flags="SA", seq=9, ack=6), tcp(src, SERVER, flags="A", seq=6),
            tcp(src, SERVER, opening, seq=6),
        ]  # fmt: skip
    return packets


def main() -> None:
    """All of them."""
    hello, query = client_hello("www.good.test"), dns_query("www.good.test")
    kept = [tcp(CLIENT, SERVER, flags="S", seq=0)]
    for number in range(2000):
        kept += [tcp(CLIENT, SERVER, HEAD, seq=1 + number * len(HEAD)), tcp(SERVER, CLIENT, b"x" * 100, seq=1 + 100 * number)]
    measure("keep-alive request of 700 bytes, and its answer", kept, 2000)
    measure("new HTTP connection, four packets", connections(HEAD, 1000), 1000)
    measure("new TLS connection, four packets", connections(hello, 1000), 1000)
    new = [udp(f"10.0.{number >> 8}.{number & 255}:1024", RESOLVER, query) for number in range(2000)]
    measure("DNS query, each a new flow", new, 2000)
    measure("DNS query, one flow", [udp(CLIENT, RESOLVER, query) for _ in range(2000)], 2000)
    data = b"\x17\3\3\4\0" + b"x" * 1024
    bulk = [tcp(CLIENT, SERVER, data, seq=1 + len(hello) + len(data) * number) for number in range(3000)]
    measure(
        "TLS data in a decided connection",
        [tcp(CLIENT, SERVER, flags="S", seq=0), tcp(CLIENT, SERVER, hello, seq=1), *bulk],
        3000,
    )


if __name__ == "__main__":
    main()
