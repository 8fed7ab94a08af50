"""The findings of `doctor` about queues, workers and processors: settings that give less throughput than the host allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nfq_agent.cli.finding import Finding
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.host.cores import Card, cards, node_processors, processors
from nfq_agent.service.status import Status

# From this many processors on, one worker is not enough for what the others can send (tests/bench/NOTES.md, "Several cores").
_SEVERAL: Final = 4


def core_findings(config: Config, running: Status | None) -> Iterator[Finding]:
    """All of them, for this host."""
    yield from found(config, running, processors(), cards(), node_processors)


def found(
    config: Config,
    running: Status | None,
    usable: frozenset[int],
    there: Sequence[Card],
    of_node: Callable[[int], frozenset[int]],
) -> Iterator[Finding]:
    """usable: the processors. there: the network cards. of_node: the processors of a NUMA node."""
    named = [
        finding
        for name, queue in config.queue.items()
        for finding in (*_workers(name, queue, running, len(usable)), *_spread(name, queue, there))
    ]
    named += _far(usable, there, of_node) if config.queue else []
    yield from named
    if config.queue and not named:
        yield Finding("good", "processors", f"the queues suit {len(usable)} processors")


def _workers(name: str, queue: QueueConfig, running: Status | None, count: int) -> Iterator[Finding]:
    workers = len(queue.numbers)
    if workers > count:
        yield Finding(
            "warning", "processors", f"[queue.{name}] has {workers} workers, and there are {count} processors: they take turns",
            f"a balance of {count} numbers at most",
        )  # fmt: skip
    lost = _without_room(name, running)
    if lost and workers == 1 and count >= _SEVERAL:
        yield Finding(
            "warning", "processors",
            f"[queue.{name}] had no room for {lost} packets; one worker serves it, and there are {count} processors",
            f'balance = "{queue.numbers[0]}:{queue.numbers[0] + count // 2 - 1}" and cpu_fanout = true',
        )  # fmt: skip


def _without_room(name: str, running: Status | None) -> int:
    """The packets that the kernel dropped or let pass since the queue, or the socket of its worker, was full."""
    for queue in () if running is None else running.queues:
        if queue.name == name:
            return sum(count for count in (queue.kernel_dropped, queue.user_dropped, queue.uninspected) if isinstance(count, int))
    return 0


def _spread(name: str, queue: QueueConfig, there: Sequence[Card]) -> Iterator[Finding]:
    """With cpu_fanout a packet goes to the worker of the processor that it comes in on."""
    workers = len(queue.numbers)
    for card in there if queue.cpu_fanout else ():
        if card.receivers < workers:
            yield Finding(
                "warning", "processors",
                f"packets of {card.name} come in on {card.receivers} processors at most: {workers - card.receivers} of the "
                f"{workers} workers of [queue.{name}] get none of them",
                f"ethtool -L {card.name} combined {workers}, or processors in /sys/class/net/{card.name}/queues/rx-*/rps_cpus",
            )  # fmt: skip


def _far(usable: frozenset[int], there: Sequence[Card], of_node: Callable[[int], frozenset[int]]) -> Iterator[Finding]:
    for card in there:
        near = frozenset() if card.node is None else of_node(card.node)
        if near and not near & usable:
            yield Finding(
                "warning", "processors",
                f"{card.name} is on NUMA node {card.node}, and the agent may use no processor of it",
                f"AllowedCPUs= in a drop-in of the unit, with processors of node {card.node}",
            )  # fmt: skip
