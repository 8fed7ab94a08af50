#!/usr/bin/env python3
"""One line for each new TCP connection to this host, from NFQUEUE number 1. Run it as root, with a rule that queues SYNs:

iptables -t raw -A PREROUTING -p tcp --syn -j NFQUEUE --queue-num 1 --queue-bypass
"""

import signal

from nfq_agent import ACCEPT, Packet, PacketError, Queue, Verdict, endpoint


def judge(packet: Packet) -> Verdict:
    try:
        flow = packet.headers.five_tuple
        print(
            f"A new tcp connection will be established: {endpoint(flow.src, flow.sport)} -> {endpoint(flow.dst, flow.dport)}",
            flush=True,
        )
    except PacketError as error:
        print(f"packet {packet.id} cannot be read: {error}", flush=True)
    return ACCEPT


with Queue(1, copy_range=128) as queue:
    signal.signal(signal.SIGTERM, lambda *_: queue.stop())
    signal.signal(signal.SIGINT, lambda *_: queue.stop())
    queue.run(judge)
