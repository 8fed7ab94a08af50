"""What a worker reports about its flows while it is watched: snapshots of flows, and traced packets, as JSON records in a ring.

A share of its time bounds it: a million flows do not delay the worker. What does not fit is counted. No I/O, no clock.
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
from nfq_agent.service.watch_share import WatchShare
from nfq_agent.verdict import ACCEPT, WOULD_DROP, Verdict

# Flows that are followed.
_FOLLOWED: Final = 16384
# Flows whose figures are compared for each record that may be written.
_COMPARED: Final = 4
# Places of the table that are searched at each look for flows that were there before the watch.
_WALKED: Final = 1024
# Traced packets a second, of each filter.
PACKETS_PER_SECOND: Final = 1000
_RST: Final = 4
_HIDDEN: Final = frozenset(("reason", "dpi", "dns_verified"))


@dataclass(slots=True)
class _Seen:
    """What is known of a flow besides the flow itself. told: the last report. begun: the readers at that time."""

    flow: Flow
    place: dict[str, Any]
    outcome: dict[str, Any] = field(default_factory=dict)
    told: Account | None = None
    begun: int = 0

    @property
    def denied(self) -> bool:
        """Whether it was dropped, or would have been."""
        return "would" in self.outcome or self.outcome.get("verdict") in ("drop", "reject")


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

    def __init__(self, ring: FlowRing, chain: ElementChain, place: dict[str, Any], share: WatchShare | None = None) -> None:
        self.share = WatchShare() if share is None else share
        self._ring = ring
        self._chain = chain
        self._place = place
        self._table: FlowTable | None = None
        self._own = False
        # The next place of the search for flows that were there before, 0 when it is over; and what the table has passed by.
        self._next = self._passed_by = 0
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        # By their slots in the ring.
        self._traces: dict[int, _Trace] = {}
        self.on = False

    def tend(self, clock: int, table: FlowTable | None, caught_up: bool = True, used: float = 0.0) -> bool:
        """Begin or end as the ring asks, and report some flows. clock: nanoseconds, monotonic. Returns whether it is watched.

        caught_up, used: see `WatchShare.renew`.
        """
        if self._ring.until <= clock:
            if self.on:
                self._end()
            return False
        share = self.share
        share.renew(caught_up, clock / 1e9, used)
        if not self.on:
            self._begin(table)
        assert self._table is not None
        self._read_filters(clock)
        if self._next:
            self._find_earlier(self._table)
        if self._ring.flows_until > clock:
            self._tell_some()
            self._ring.leave_out(self._table.passed_by - self._passed_by)
        self._passed_by = self._table.passed_by
        self._table.shows_openings = share.flows
        return True

    def _begin(self, table: FlowTable | None) -> None:
        self.on, self._own = True, table is None
        self._table = FlowTable() if table is None else table
        self._next, self._passed_by = 1, self._table.passed_by

    def _end(self) -> None:
        assert self._table is not None
        self._table.shows_openings = 0
        self._ring.unshown = 0
        self.on, self._table = False, None
        self._seen.clear()
        self._traces.clear()

    def _find_earlier(self, table: FlowTable) -> None:
        """Follow some of the flows that were there before the watch."""
        flows, self._next = table.flows_from(self._next, _WALKED)
        for flow in flows[: _FOLLOWED - len(self._seen)]:
            if id(flow) not in self._seen:
                self._seen[id(flow)] = _Seen(flow, {}, _reason_of(flow))

    @property
    def own_flows(self) -> FlowTable | None:
        """The flows of a chain that follows none, where packets count that are not looked at; None without a watch, and else."""
        return self._table if self._own else None

    @property
    def has_time(self) -> bool:
        """Whether more packets may be looked at before the next look."""
        return self.share.packets > 0

    def leave_unlooked(self, count: int) -> None:
        """Packets passed without a look, since there was no time."""
        if self._traces:
            self._ring.leave_unlooked(count)

    @property
    def room(self) -> int:
        """Flows that may be taken over now by `follow`."""
        table = self._table
        return 0 if table is None else max(0, min(table.shows_openings, _FOLLOWED - len(self._seen)))

    def follow(self, flows: Iterable[Flow]) -> None:
        """Connections that were accepted by their openings before they were watched, at most as many as there is `room` for.

        Called at each look, also with none.
        """
        for flow in flows:
            if self._table is not None:
                self._table.shows_openings -= 1
            self._seen[id(flow)] = _Seen(flow, {}, {"verdict": ACCEPT.word, **_reason_of(flow)})
        if self._table is not None:
            self._ring.unshown = max(0, len(self._table) - len(self._seen))

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
        table, share = self._table, self.share
        if table is None:
            return
        if flow is None:
            if not self._own:
                return
            share.packets -= 1
            flow = table.observe(packet.headers.five_tuple, now, packet.length)
        seen = self._seen.get(id(flow))
        if seen is None:
            if share.flows <= 0 and not (self._traces and share.packets > 0):
                # It is followed from a later packet on, or not at all.
                self.leave_unlooked(1)
                return
            seen = _Seen(flow, {})
            if share.flows > 0:
                share.flows -= 1
                self._follow(seen, table)
        if not seen.place:
            seen.place = {"hook": hook_name(packet.hook), **self._chain.context.owners.names(packet)}
        element, rule = self._chain.reason(packet, flow)
        outcome = {
            "verdict": verdict.word,
            "element": element,
            "rule": rule,
            "reason": f"{element}: {rule}" if rule else element,
        }
        if verdict is WOULD_DROP:
            outcome["would"] = "drop"
        # A reset that passes ends what was rejected; it does not turn that.
        if not (verdict is ACCEPT and seen.denied and (packet.headers.tcp_flags or 0) & _RST):
            seen.outcome = outcome
        if self._traces:
            self._trace_some(packet, seen, outcome, table, now)

    def _follow(self, seen: _Seen, table: FlowTable) -> None:
        self._seen[id(seen.flow)] = seen
        if len(self._seen) > _FOLLOWED:
            _, oldest = self._seen.popitem(last=False)
            if table.account(oldest.flow) != oldest.told:
                self._ring.leave_out()

    def _trace_some(self, packet: Packet, seen: _Seen, outcome: dict[str, Any], table: FlowTable, now: float) -> None:
        if not self._own:
            if self.share.packets <= 0:
                self.leave_unlooked(1)
                return
            self.share.packets -= 1
        self._trace(packet, seen, self._record(seen, table.account(seen.flow), outcome), now)

    def _trace(self, packet: Packet, seen: _Seen, record: dict[str, Any], now: float) -> None:
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
        for _ in range(min(len(self._seen), _COMPARED * self.share.records)):
            if self.share.records <= 0:
                break
            key, seen = self._seen.popitem(last=False)
            account = self._table.account(seen.flow)
            if account is None:
                self._write({**self._record(seen, seen.told), "kind": "end"})
                continue
            self._seen[key] = seen
            if account != seen.told or seen.begun != begun:
                seen.told, seen.begun = account, begun
                self._write({**self._record(seen, account), "kind": "flow"})

    def _record(self, seen: _Seen, account: Account | None, outcome: dict[str, Any] | None = None) -> dict[str, Any]:
        """A flow as it is reported. outcome: that of one packet, where it is not that of the flow."""
        flow = seen.flow
        client = flow.origin if flow.origin_is_client else flow.origin.reversed()
        record: dict[str, Any] = {
            **{name: value for name, value in flow.facts.items() if name not in _HIDDEN},
            **self._place,
            **seen.place,
            **(seen.outcome if outcome is None else outcome),
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
        self.share.records -= 1
        self._ring.write(json.dumps(record, default=str).encode())


def _reason_of(flow: Flow) -> dict[str, Any]:
    """The report of a flow that began before the watch: the reason, but no verdict."""
    reason = flow.facts.get("reason")
    if not reason:
        return {}
    element, rule = element_and_rule(str(reason))
    return {"element": element, "rule": rule, "reason": reason}
