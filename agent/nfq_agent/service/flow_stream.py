"""The supervisor's answer to a client that watches flows: the records since its last question, and how many it missed.

The agent waits for no client: a question is answered with what there is, and the workers stop telling when no question comes.
The records are in memory that the worker writes. A worker that was taken over can write anything there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from nfq_agent.flow_filter import FilterError, parse
from nfq_agent.flow_ring import MOST_FILTER, RingPlace
from nfq_agent.service.worker import Worker

# For how long workers tell after a question, in nanoseconds.
_LASTS: Final = 5_000_000_000


def answer(workers: Iterable[Worker], question: Mapping[str, Any], clock: int) -> dict[str, Any]:
    """The records of flows, or of traced packets. clock: nanoseconds, monotonic.

    The question holds `places`, as the answer before gave them, and `packets`, a filter, if packets are to be traced.
    """
    packets = question.get("packets")
    if packets is not None:
        try:
            parse(str(packets))
        except FilterError as error:
            return {"ok": False, "message": str(error)}
        if len(str(packets).encode()) > MOST_FILTER:
            return {"ok": False, "message": f"the filter is longer than {MOST_FILTER} bytes"}
    given = question.get("places")
    given = given if isinstance(given, dict) else {}
    records: list[Any] = []
    places: dict[str, list[int]] = {}
    missed = 0
    for worker in workers:
        worker.ring.want(clock + _LASTS, None if packets is None else str(packets))
        known = given.get(worker.title)
        if known is None:
            # What was told to others before is not for this client.
            _, place, _ = worker.ring.read(RingPlace())
            found: list[bytes] = []
        else:
            found, place, more = worker.ring.read(RingPlace(*map(int, known)))
            missed += more
        places[worker.title] = [place.written, place.records, place.left_out]
        read = [record for each in found if (record := _record(each)) is not None]
        records += read
        missed += len(found) - len(read)
    return {"ok": True, "records": records, "places": places, "missed": missed}


def _record(data: bytes) -> dict[str, Any] | None:
    """The record, None if it is no JSON object: then its worker has a fault, or was taken over."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
