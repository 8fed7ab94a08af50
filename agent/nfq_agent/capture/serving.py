"""Whether this host can serve the taps of a configuration, and which interfaces they would take now. Reads, writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.config.capture import CaptureConfig, InlineConfig, TapConfig
from nfq_agent.config.models import Config
from nfq_agent.host import bpf, filters, packet_socket, pairs
from nfq_agent.host.links import Link, links


def selection_of(config: CaptureConfig) -> CaptureSelection:
    """The interfaces and ports that a table of the configuration names."""
    return CaptureSelection(
        config.interfaces,
        config.exclude,
        tuple((each.first, each.last) for each in config.tcp_ports),
        tuple((each.first, each.last) for each in config.udp_ports),
    )


def captures(config: Config) -> Iterator[tuple[str, TapConfig | InlineConfig]]:
    """Each tap and inline link by its table's name."""
    yield from ((f"tap.{name}", tap) for name, tap in config.tap.items())
    yield from ((f"inline.{name}", inline) for name, inline in config.inline.items())


def host_faults(config: Config) -> list[str]:
    """What this kernel or unit lacks for `[tap]` and `[inline]`: a line each.

    A capability that an unprivileged user lacks is not reported.
    """
    tables: list[tuple[str, Callable[[], str | None]]] = [(f"tap.{name}", packet_socket.missing) for name in config.tap]
    tables += [(f"inline.{name}", partial(_inline_missing, inline.attach)) for name, inline in config.inline.items()]
    missing = [(table, what) for table, look in tables if (what := look()) is not None]
    return [
        f"{table}: this host or unit cannot serve it, it lacks {what}; allowed: on a host and in a unit that have it"
        for table, what in missing
        if os.geteuid() == 0 or not what.startswith("CAP_")
    ]


def _inline_missing(attach: filters.Attach) -> str | None:
    if not bpf.OBJECT.exists():
        return f"{bpf.OBJECT.name}, which is compiled by clang when the agent is built"
    return packet_socket.missing() or filters.missing(attach)


def taken(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Each tap and inline link by its table's name, with the interfaces that it takes now."""
    present = [link for link in links() if not pairs.is_end(link)]
    for table, capture in captures(config):
        selection = selection_of(capture)
        kind = table.partition(".")[0]
        yield table, sorted(link.name for link in present if selection.chooses(link.name) and unfit(kind, link) is None)


def unfit(kind: str, link: Link) -> str | None:
    """Why a tap or an inline link (`kind`: its table) cannot take an interface, None if it can."""
    if not link.ethernet:
        return "its packets have no Ethernet header"
    # From there the kernel takes no packet of 127.0.0.0/8 that it has to find a route for (ip_route_input_slow()).
    return "the host's packets to itself cannot be sent on" if kind == "inline" and link.loopback else None
