"""The kernel's figures for its packet queues: /proc/net/netfilter/nfnetlink_queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One line of /proc/net/netfilter/nfnetlink_queue.

    number: of the queue. portid: of the netlink socket that bound it. waiting: packets without a verdict. copy_mode: 0 none,
    1 meta, 2 packet. copy_range: bytes. dropped: because the queue was full. user_dropped: because the socket's buffer was.
    id_sequence: the number given to the latest packet. Source: seq_show() in net/netfilter/nfnetlink_queue.c.
    """

    number: int
    portid: int
    waiting: int
    copy_mode: int
    copy_range: int
    dropped: int
    user_dropped: int
    id_sequence: int


def statistics(process: int | str = "self") -> dict[int, QueueStatistics]:
    """The kernel's figures for every queue of the network namespace that `process` lives in, by queue number.

    Only root may read them (PermissionError otherwise). Empty where the kernel's module is not loaded.
    """
    try:
        lines = Path(f"/proc/{process}/net/netfilter/nfnetlink_queue").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {int(line.split()[0]): QueueStatistics(*map(int, line.split()[:8])) for line in lines}
