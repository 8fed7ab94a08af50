"""The processors of this host and how its network cards reach them, from sysfs."""

from __future__ import annotations

import functools
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CARDS: Final = Path("/sys/class/net")
_NODES: Final = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Card:
    """A network card. receivers: processors that its packets come in on, at most. node: of NUMA, None where there is none."""

    name: str
    receivers: int
    node: int | None


def processors() -> frozenset[int]:
    """The processors that this process may use."""
    return frozenset(os.sched_getaffinity(0))


def cards(folder: Path = _CARDS) -> list[Card]:
    """The interfaces with a device behind them; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("*/device")):
        if queues := list(path.parent.glob("queues/rx-*")):
            steered = functools.reduce(operator.or_, map(_steered, queues))
            found.append(Card(path.parent.name, max(len(queues), steered.bit_count()), _node(path)))
    return found


def node_processors(node: int, folder: Path = _NODES) -> frozenset[int]:
    """The processors of a NUMA node; none where it cannot be read."""
    try:
        text = (folder / f"node{node}" / "cpulist").read_text().strip()
    except OSError:
        return frozenset()
    spans = (word.partition("-") for word in text.split(",") if word)
    return frozenset(number for first, _, last in spans for number in range(int(first), int(last or first) + 1))


def _steered(queue: Path) -> int:
    """The processors that the kernel spreads the packets of a receive queue over, a bit each: rps_cpus."""
    try:
        mask = (queue / "rps_cpus").read_text()
    except OSError:
        return 0
    return int(mask.strip().replace(",", "") or "0", 16)


def _node(device: Path) -> int | None:
    try:
        node = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
