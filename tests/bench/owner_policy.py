"""The benchmarks of a policy by owner: in the queue, and with its rules compiled into the kernel (`compile`)."""

from __future__ import annotations

from typing import Final

from bed import Bed
from measure import Benchmark, Goal
from queues import FLOOD_RULE, SERVED, bulk_agent, bulk_free, bulk_marked, connected, connected_marked, flood

from nfq_agent.host.nftables.owned import OwnedHost

_BACKEND: Final = '[agent]\nbackend = "owned"\n'
_COMPILED: Final = 'compile = "auto"\n'
# Ten services may connect elsewhere; an eleventh rule is for every group of this host.
_OTHERS: Final = ",\n".join(f'  {{ action = "accept", unit = "service-{number}.service", dport = 443 }}' for number in range(10))


def _policy(action: str, behind: str = "") -> str:
    """Elements of a queue: the list, with this action for every group."""
    rules = f'{_OTHERS},\n  {{ action = "{action}", cgroup = "*" }}'
    return f'elements = ["gate"{behind}]\n[element.gate]\ntype = "policy"\ndefault = "drop"\nrule = [\n{rules}\n]\n'


_QUEUED: Final = _policy("accept")
_OFFLOAD: Final = _policy("accept", ', "offload"') + '[element.offload]\nmark = "0x4e000000/0xff000000"\n'


def _dropped(compiled: bool) -> float:
    """Datagrams a second that are sent from processor 0 and dropped by a rule on the sender's group."""
    with Bed() as bed:
        bed.agent(_BACKEND + SERVED + (_COMPILED if compiled else "") + _policy("drop") + FLOOD_RULE, core=1)
        return flood(bed, 0, count=(lambda: bed.here.call(_in_kernel)) if compiled else None)


def _in_kernel() -> int:
    tables = OwnedHost("default").read("inet")
    rules = (each for table in tables.values() for each in table.installed)
    return sum(each.packets for each in rules if each.rule.tag.endswith(".gate.11") and not each.rule.queues)


BENCHMARKS: Final = (
    Benchmark(
        "owner-connections", "allow-list of eleven rules by unit and group: new TCP connections", "1/s",
        {
            "no rules": lambda: connected(None),
            "one connmark rule": connected_marked,
            "in the queue": lambda: connected(_QUEUED, backend=_BACKEND),
            "offload": lambda: connected(_OFFLOAD, backend=_BACKEND),
            "offload, compiled": lambda: connected(_COMPILED + _OFFLOAD, backend=_BACKEND),
        },
        (Goal("offload, compiled", "at least", 0.85, "no rules"),),
    ),
    Benchmark(
        "owner-bulk", "the same: one TCP stream over veth", "Gbit/s",
        {
            "no rules": bulk_free,
            "one connmark rule": bulk_marked,
            "offload": lambda: bulk_agent(_OFFLOAD, backend=_BACKEND),
            "offload, compiled": lambda: bulk_agent(_COMPILED + _OFFLOAD, queued=False, backend=_BACKEND),
        },
        (Goal("offload, compiled", "at least", 0.98, "no rules"),),
    ),
    Benchmark(
        "owner-flood", "the same: flood of what it drops, the worker on processor 1", "dropped/s",
        {"in the queue": lambda: _dropped(False), "compiled": lambda: _dropped(True)},
        (Goal("compiled", "at least", 3, "in the queue"),),
    ),
)  # fmt: skip
