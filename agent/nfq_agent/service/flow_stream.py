"""The supervisor's answer to a client that watches flows: the records since its last question, and how many it missed.

The agent waits for no client: a question is answered with the records at hand, and the workers stop reporting when no question
comes. Each client has its own filter of packets; clients with equal filters share what the workers keep for it. The records are
in memory that the worker writes. A worker that was taken over can write anything there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from nfq_agent.flow_filter import FilterError, parse
from nfq_agent.flow_ring import MOST_FILTER, SLOTS, RingPlace
from nfq_agent.service.flow_watch import filter_number
from nfq_agent.service.worker import Worker

# For how long workers report after a question, in nanoseconds.
_LASTS: Final = 5_000_000_000


def answer(workers: Iterable[Worker], question: Mapping[str, Any], clock: int) -> dict[str, Any]:
    """The records of flows, or of traced packets. clock: nanoseconds, monotonic.

    The question, which `question.parse` has checked, holds `places`, as the answer before gave them, and `packets`, a filter, if
    packets are traced instead of flows. In the answer, `missed` counts records since the last question, `unshown` flows that are
    not reported now, and `unlooked` packets that no trace looked at so far.
    """
    packets: str | None = question.get("packets")
    if packets is not None and (wrong := _wrong(packets)):
        return {"ok": False, "message": wrong}
    given = question.get("places") or {}
    records: list[Any] = []
    places: dict[str, list[int]] = {}
    missed = unshown = unlooked = 0
    for worker in workers:
        slot = None
        if packets is None:
            worker.ring.want_flows(clock + _LASTS)
            if worker.title not in given:
                worker.ring.begin()
        elif (slot := worker.ring.want_packets(clock + _LASTS, packets, clock)) is None:
            return {"ok": False, "message": f"{SLOTS} other filters are traced now; allowed: {SLOTS} at the same time"}
        known = given.get(worker.title)
        # A new client gets no records of earlier questions by others.
        place = worker.ring.read(RingPlace(), slot)[1] if known is None else RingPlace(*known)
        found, place, more = worker.ring.read(place, slot)
        missed += more
        unshown += worker.ring.unshown
        unlooked += worker.ring.unlooked
        places[worker.title] = [place.written, place.records, place.left_out]
        read = [record for each in found if (record := _record(each)) is not None]
        records += _selected(read, packets)
        missed += len(found) - len(read)
    return {"ok": True, "records": records, "places": places, "missed": missed, "unshown": unshown, "unlooked": unlooked}


def _wrong(packets: str) -> str:
    """What is wrong with a filter."""
    try:
        parse(packets)
    except FilterError as error:
        return str(error)
    return f"the filter is longer than {MOST_FILTER} bytes" if len(packets.encode()) > MOST_FILTER else ""


def _record(data: bytes) -> dict[str, Any] | None:
    """The record, None if it is not a JSON object: then its worker has a fault, or was taken over."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _selected(records: Iterable[dict[str, Any]], packets: str | None) -> list[dict[str, Any]]:
    """Those for one client: traced packets that match its filter, or flows."""
    if packets is None:
        return [record for record in records if record.get("kind") != "packet"]
    number = filter_number(packets)
    return [record for record in records if isinstance(told := record.pop("filters", None), list) and number in told]
