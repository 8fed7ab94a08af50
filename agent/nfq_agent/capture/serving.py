"""Whether this host can serve the taps of a configuration, and which interfaces they would take now. Reads, writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from nfq_agent.capture.selection import Selection
from nfq_agent.config.capture import CaptureConfig
from nfq_agent.config.models import Config
from nfq_agent.host import packet_socket
from nfq_agent.host.links import links

_UNKNOWN: Final = "CAP_NET_RAW"


def selection_of(config: CaptureConfig) -> Selection:
    """The interfaces and ports that a table of the configuration names."""
    return Selection(
        config.interfaces,
        config.exclude,
        tuple((each.first, each.last) for each in config.tcp_ports),
        tuple((each.first, each.last) for each in config.udp_ports),
    )


def host_faults(config: Config) -> list[str]:
    """What this kernel or unit lacks for `[tap]`: a line each. What a plain user lacks is no fault."""
    if not config.tap or (what := packet_socket.missing()) is None:
        return []
    if what == _UNKNOWN and os.geteuid() != 0:
        return []
    return [f"tap.{name}: this host or unit can't serve it, it lacks {what}; allowed: with that" for name in config.tap]


def taken(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Each tap by its table's name, with the interfaces that it takes now."""
    there = links()
    for name, tap in config.tap.items():
        selection = selection_of(tap)
        yield f"tap.{name}", sorted(link.name for link in there if selection.chooses(link.name))
