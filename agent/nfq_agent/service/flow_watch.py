"""What a worker reports about its flows while it is watched: snapshots of flows, and traced packets, as JSON records in a ring.

Bounded in every turn: a million flows do not delay the worker. What does not fit is left out and counted. No I/O, no clock.
A traced packet is written once, with the numbers (`filter_number`) of all filters that match it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from zlib import crc32

from nfq_agent.decisions import element_and_rule
from nfq_agent.element_chain import ElementChain
from nfq_agent.facts import ends
from nfq_agent.flow import Account, Flow
from nfq_agent.flow_filter import EVERYTHING, FilterError, FilterPart, parse
from nfq_agent.flow_ring import FlowRing
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet, hook_name
from nfq_agent.rate import Bucket
from nfq_agent.verdict import ACCEPT, WOULD_DROP, Verdict

# Flows that are reported in each pass (50 ms), and flows that are followed.
PER_LOOK: Final = 200
_FOLLOWED: Final = 16384
# A table with more flows is not walked through when the watch begins: that would take too long.
_WALKED: Final = 4096
# Traced packets a second, of each filter.
PACKETS_PER_SECOND: Final = 1000
_HIDDEN: Final = frozenset(("reason", "dpi", "dns_verified"))


@dataclass(slots=True)
class _Seen:
    """What is known of a flow besides the flow itself. told: the last report. begun: the readers at that time."""

    flow: Flow
    place: dict[str, Any]
    outcome: dict[str, Any] = field(default_factory=dict)
    told: Account | None = None
    begun: int = 0


def filter_number(text: str) -> int:
    """The number by which a traced packet names a filter that matches it."""
    return crc32(text.encode())


@dataclass(slots=True)
class _Trace:
    """One filter of packets."""

    text: str
    part: FilterPart
    bucket: Bucket


class FlowWatch:
    """Follows the flows of one worker while the ring is wanted."""

    def __init__(self, ring: FlowRing, chain: ElementChain, place: dict[str, Any]) -> None:
        self._ring = ring
        self._chain = chain
        self._place = place
        self._table: FlowTable | None = None
        self._own = False
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        # By their slots in the ring.
        self._traces: dict[int, _Trace] = {}
        self.on = False

    def tend(self, clock: int, table: FlowTable | None) -> bool:
        """Begin or end as the ring asks, and report some flows. clock: nanoseconds, monotonic. Returns whether it is watched."""
        if self._ring.until <= clock:
            if self.on:
                if table is not None:
                    table.shows_openings = False
                self.on, self._table = False, None
                self._seen.clear()
                self._traces.clear()
            return False
        if not self.on:
            self.on, self._own = True, table is None
            self._table = FlowTable() if table is None else table
            self._table.shows_openings = True
            if table is not None and len(table) <= _WALKED:
                for flow, _ in table.flows():
                    self._seen[id(flow)] = _Seen(flow, {}, _reason_of(flow))
            elif table is not None:
                self._ring.leave_out(len(table))
        self._read_filters(clock)
        if self._ring.flows_until > clock:
            self._tell_some()
        return True

    def follow(self, flows: Iterable[Flow]) -> None:
        """Connections that were accepted by their openings before they were watched."""
        for flow in flows:
            if len(self._seen) >= _FOLLOWED:
                self._ring.leave_out()
                continue
            self._seen[id(flow)] = _Seen(flow, {}, {"verdict": ACCEPT.word, **_reason_of(flow)})

    def _read_filters(self, clock: int) -> None:
        wanted = self._ring.filters(clock)
        for slot in self._traces.keys() - wanted.keys():
            del self._traces[slot]
        for slot, text in wanted.items():
            if slot in self._traces and self._traces[slot].text == text:
                continue
            try:
                part = parse(text)
            except FilterError:
                part = EVERYTHING
            self._traces[slot] = _Trace(text, part, Bucket(PACKETS_PER_SECOND, PACKETS_PER_SECOND, 0.0))

    def saw(self, packet: Packet, flow: Flow | None, verdict: Verdict, now: float) -> None:
        """A packet got this verdict of the elements. now: monotonic seconds. Raises PacketError."""
        table = self._table
        if table is None:
            return
        if flow is None:
            if not self._own:
                return
            flow = table.observe(packet.headers.five_tuple, now, packet.length)
        seen = self._seen.get(id(flow))
        if seen is None:
            seen = self._seen[id(flow)] = _Seen(flow, {})
            if len(self._seen) > _FOLLOWED:
                _, oldest = self._seen.popitem(last=False)
                if table.account(oldest.flow) != oldest.told:
                    self._ring.leave_out()
        if not seen.place:
            seen.place = {"hook": hook_name(packet.hook), **self._chain.context.owners.names(packet)}
        element, rule = self._chain.reason(packet, flow)
        seen.outcome = {
            "verdict": verdict.word,
            "element": element,
            "rule": rule,
            "reason": f"{element}: {rule}" if rule else element,
        }
        if verdict is WOULD_DROP:
            seen.outcome["would"] = "drop"
        if self._traces:
            self._trace(packet, seen, table, now)

    def _trace(self, packet: Packet, seen: _Seen, table: FlowTable, now: float) -> None:
        record = self._record(seen, table.account(seen.flow))
        told = []
        for slot, trace in self._traces.items():
            if not trace.part.match(record):
                continue
            if trace.bucket.take(now):
                told.append(filter_number(trace.text))
            else:
                self._ring.leave_out_packet(slot)
        if not told:
            return
        asked = self._chain.asked()
        steps = [[element.name, element.rule(packet, seen.flow)] for element in asked]
        shown = str(packet.headers.five_tuple)
        self._write({**record, "kind": "packet", "packet": shown, "length": packet.length, "steps": steps, "filters": told})

    def _tell_some(self) -> None:
        """Report flows whose figures have changed, a bounded number of them; the others follow later.

        A flow without a change is reported again where a reader has begun since.
        """
        assert self._table is not None
        begun = self._ring.begun
        for _ in range(min(PER_LOOK, len(self._seen))):
            key, seen = self._seen.popitem(last=False)
            account = self._table.account(seen.flow)
            if account is None:
                self._write({**self._record(seen, seen.told), "kind": "end"})
                continue
            self._seen[key] = seen
            if account != seen.told or seen.begun != begun:
                seen.told, seen.begun = account, begun
                self._write({**self._record(seen, account), "kind": "flow"})

    def _record(self, seen: _Seen, account: Account | None) -> dict[str, Any]:
        flow = seen.flow
        client = flow.origin if flow.origin_is_client else flow.origin.reversed()
        record: dict[str, Any] = {
            **{name: value for name, value in flow.facts.items() if name not in _HIDDEN},
            **self._place,
            **seen.place,
            **seen.outcome,
            **ends(client),
        }
        if account is not None:
            record |= {
                "packets": account.packets_sent + account.packets_received,
                "bytes": account.bytes_sent + account.bytes_received,
                "pkts_toserver": account.packets_sent,
                "bytes_toserver": account.bytes_sent,
                "pkts_toclient": account.packets_received,
                "bytes_toclient": account.bytes_received,
                # Seconds of the monotonic clock, which a client on this host has too.
                "first": round(flow.first, 3),
                "duration": round(max(flow.last, account.last) - flow.first, 3),
            }
        return record

    def _write(self, record: dict[str, Any]) -> None:
        self._ring.write(json.dumps(record, default=str).encode())


def _reason_of(flow: Flow) -> dict[str, Any]:
    """The report of a flow that began before the watch: the reason, but no verdict."""
    reason = flow.facts.get("reason")
    if not reason:
        return {}
    element, rule = element_and_rule(str(reason))
    return {"element": element, "rule": rule, "reason": reason}
