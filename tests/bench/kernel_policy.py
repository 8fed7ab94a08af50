"""The benchmarks of a policy that the kernel applies in front of the queue (`compile`)."""

from __future__ import annotations

from typing import Final

from bed import Bed
from measure import Benchmark, Goal
from queues import (
    FLOOD_PORT,
    FLOOD_RULE,
    SERVED,
    bulk_agent,
    bulk_free,
    connected,
    flood,
    policy,
)

from nfq_agent.host.nftables.owned import OwnedHost

_COMPILED: Final = 'compile = "auto"\n'
_BACKEND: Final = '[agent]\nbackend = "owned"\n'
_MEETS: Final = f'dst = ["127.0.0.0/8", "10.203.0.0/24"], dport = [{FLOOD_PORT}]'
# The sender is not told of what is dropped on its way in, and sends a batch with each system call, whatever drops it.
_RECEIVED: Final = FLOOD_RULE.replace('"output"', '"input"').replace('"client"', '"server"')
_RULE: Final = 501


def _dropped(compiled: bool, *cores: int, received: bool = False, logged: bool = True) -> float:
    """Datagrams a second that are sent from these processors and dropped by one of the thousand rules.

    received: on their way in, from another namespace. logged: some of them have lines in the log, as by default.
    """
    with Bed() as bed:
        queue = SERVED + (_COMPILED if compiled else "") + ("" if logged else "log_drops = false\n")
        config = queue + policy(meets=_MEETS) + (_RECEIVED if received else FLOOD_RULE)
        bed.agent(_BACKEND + config, core=1)
        return flood(bed, *cores, count=(lambda: bed.here.call(_in_kernel)) if compiled else None, received=received)


def _in_kernel() -> int:
    tables = OwnedHost("default").read("inet")
    return sum(dict(each.by_number).get(_RULE, 0) for table in tables.values() for each in table.installed)


BENCHMARKS: Final = (
    Benchmark(
        "kernel-policy-bulk", "header-only policy of 1,000 networks and ports, compiled: one TCP stream over veth", "Gbit/s",
        {
            "no rules": bulk_free,
            "in the queue": lambda: bulk_agent(policy(), backend=_BACKEND),
            "compiled": lambda: bulk_agent(_COMPILED + policy(), queued=False, backend=_BACKEND),
        },
        (Goal("compiled", "at least", 0.98, "no rules"),),
    ),
    Benchmark(
        "kernel-policy-connections", "the same: new TCP connections", "1/s",
        {
            "no rules": lambda: connected(None),
            "in the queue": lambda: connected(policy(), backend=_BACKEND),
            "compiled": lambda: connected(_COMPILED + policy(), backend=_BACKEND),
        },
        (Goal("compiled", "at least", 0.95, "no rules"),),
    ),
    Benchmark(
        "kernel-policy-flood", "the same: flood of what it drops, the worker on processor 1", "dropped/s",
        {
            "in the queue, sender on 0": lambda: _dropped(False, 0),
            "compiled, sender on 0": lambda: _dropped(True, 0),
            "compiled, senders on 0 and 1": lambda: _dropped(True, 0, 1),
            "compiled, no log_drops, sender on 0": lambda: _dropped(True, 0, logged=False),
            "compiled, no log_drops, senders on 0 and 1": lambda: _dropped(True, 0, 1, logged=False),
            "received, in the queue, sender on 0": lambda: _dropped(False, 0, received=True),
            "received, compiled, sender on 0": lambda: _dropped(True, 0, received=True),
            "received, compiled, senders on 0 and 1": lambda: _dropped(True, 0, 1, received=True),
            "received, compiled, no log_drops, sender on 0": lambda: _dropped(True, 0, received=True, logged=False),
            "received, compiled, no log_drops, senders on 0 and 1": lambda: _dropped(True, 0, 1, received=True, logged=False),
        },
        (Goal("compiled, sender on 0", "at least", 3, "in the queue, sender on 0"),
         Goal("compiled, senders on 0 and 1", "at least", 3, "in the queue, sender on 0"),
         Goal("received, compiled, sender on 0", "at least", 3, "received, in the queue, sender on 0"),
         Goal("received, compiled, senders on 0 and 1", "at least", 3, "received, in the queue, sender on 0")),
    ),
)  # fmt: skip
