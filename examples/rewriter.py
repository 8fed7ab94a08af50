#!/usr/bin/env python3
"""Replaces one word by another of the same or another length in UDP packets of NFQUEUE number 2. Run it as root:

iptables -t mangle -A OUTPUT -p udp --dport 9999 -j NFQUEUE --queue-num 2
examples/rewriter.py cat dog
"""

import signal
import sys

from nfq_agent import ACCEPT, Action, Packet, PacketError, Queue, Verdict, mend

if len(sys.argv) != 3:
    sys.exit("usage: rewriter.py OLD NEW")
old, new = (word.encode() for word in sys.argv[1:3])


def judge(packet: Packet) -> Verdict:
    try:
        if old not in packet.data:
            return ACCEPT
        start = packet.headers.data
        changed = packet.payload[:start] + packet.data.replace(old, new)
        # Lengths and checksums of the IP and UDP headers; without this the receiver's kernel drops the packet.
        return Verdict(Action.ACCEPT, payload=mend(changed))
    except PacketError:
        # A fragment has no checksum of its own to mend.
        return ACCEPT


# gso=False, the default: the kernel cuts offloaded packets before they get here, so that each can be changed.
with Queue(2) as queue:
    signal.signal(signal.SIGTERM, lambda *_: queue.stop())
    signal.signal(signal.SIGINT, lambda *_: queue.stop())
    queue.run(judge)
