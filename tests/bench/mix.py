"""The benchmark of new flows by HTTP, TLS and DNS, with the hellos of OpenSSL, beside Suricata and libndpi."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Final

import suricata
from bed import BUILT, MAX_LEN, QUEUE, Bed, BenchError, spent
from measure import Benchmark, Goal
from named import NAMED, NAMES
from queues import SERVED
from shown import FIELDS, REST, connection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from openings import client_hello, dns_query

from nfq_agent.packet import Packet
from nfq_agent.testing import udp

# Of each kind. A name fits fifty of them: OpenSSL makes each hello.
_EACH: Final = 6000
_HELLOS: Final = 120
_RESOLVER: Final = "198.51.100.1:53"
_RULES: Final = """
[rules.tcp]
queue = "main"
family = "inet"
hooks = ["prerouting"]
tcp_ports = [443]
[rules.udp]
queue = "main"
family = "inet"
hooks = ["prerouting"]
udp_ports = [53]
"""


@cache
def packets() -> list[bytes]:
    """The packets of all flows: three flows of each kind, one after the other, their clients in different networks."""
    hellos = [client_hello(f"host-{number}.good.test", alpn=("h2", "http/1.1")) for number in range(_HELLOS)]
    made: list[Packet] = []
    for number in range(_EACH):
        head = b"GET /some/path HTTP/1.1\r\nHost: host-%d.good.test\r\n" % number + FIELDS + b"\r\n"
        made += connection(number, head)
        made += connection(number + (1 << 20), hellos[number % _HELLOS], REST)
        client = f"10.128.{number >> 8}.{number & 255}:1024"
        made.append(udp(client, _RESOLVER, dns_query(f"host-{number}.good.test")))
        made.append(udp(_RESOLVER, client, dns_query(f"host-{number}.good.test", flags=0x8180)))
    return [packet.payload for packet in made]


def _replayed(serve: Callable[[Bed], list[int]], ours: bool = False) -> float:
    """Flows for each second of processor time of what answers: the replay itself is no quicker than they are.

    serve: starts it; its processes. ours: it has rules of its own.
    """
    with Bed() as bed:
        head = bed.link_address() + bytes(6) + b"\x08\x00"
        path = bed.folder / "frames"
        with path.open("wb") as file:
            for packet in packets():
                file.write((len(head) + len(packet)).to_bytes(2, "big") + head + packet)
        pids = serve(bed)
        if not ours:
            for protocol, port in (("tcp", 443), ("udp", 53)):
                for way in ("dport", "sport"):
                    bed.here.shell(
                        f"iptables-legacy -t mangle -A PREROUTING -p {protocol} --{way} {port} -j NFQUEUE --queue-num {QUEUE}"
                    )
        before, begin = bed.judged(), spent(pids)
        queues = f"/proc/{bed.here.pid}/net/netfilter/nfnetlink_queue"
        bed.load("replay", path, queues, MAX_LEN // 2, core=0, side=bed.there)
        if (judged := bed.judged() - before) < len(packets()):
            raise BenchError(f"{judged} of {len(packets())} packets were judged")
        return 3 * _EACH / (spent(pids) - begin)


def _agent(bed: Bed, elements: str) -> list[int]:
    return bed.agent(SERVED + elements + _RULES, core=1).family()[1:]


def _ndpi(bed: Bed) -> list[int]:
    return [bed.peer(str(BUILT / "queue-ndpi"), str(QUEUE), str(MAX_LEN), core=1).pid]


def _suricata(bed: Bed, batch: int) -> list[int]:
    return [suricata.serve(bed, NAMES, closed=True, batch=batch)]


BENCHMARKS: Final = (
    Benchmark(
        "mix", "new flows by HTTP, TLS and DNS, identified and judged by dpi and a policy of 100 names", "flows/s of CPU",
        {
            "bare accept": partial(_replayed, partial(_agent, elements=""), True),
            "names": partial(_replayed, partial(_agent, elements=NAMED), True),
            "Suricata": partial(_replayed, partial(_suricata, batch=20)),
            "Suricata, batches of 255": partial(_replayed, partial(_suricata, batch=255)),
            "C, libndpi": partial(_replayed, _ndpi),
        },
        (Goal("names", "at least", 1.5, "Suricata"), Goal("names", "at least", 1.5, "Suricata, batches of 255"),
         Goal("names", "at least", 3, "C, libndpi")),
    ),
)  # fmt: skip
