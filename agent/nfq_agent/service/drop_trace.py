"""The log line of a dropped flow: the flow, its owner, the name that it showed, and the rule that decided. No I/O, no clock.

One line for each flow and reason, within a rate; flows beyond the rate are counted, and the count is logged. Nothing here is
called for a packet that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from nfq_agent.element import Emit
from nfq_agent.element_chain import ON_ERROR, ElementChain
from nfq_agent.facts import ends, who, words
from nfq_agent.facts import fields as fields_of
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet, PacketError, hook_name
from nfq_agent.rate import Bucket, Suppressed
from nfq_agent.verdict import WOULD_DROP, Verdict

# Lines a second and worker.
PER_SECOND: Final = 100
# Dropped flows that are remembered where the chain follows no flows, and for how many seconds.
_REMEMBERED: Final = 4096
_FORGOTTEN_AFTER: Final = 60.0


class DropTrace:
    """Makes the lines of one worker.

    own: names of the elements that log their drops themselves. emit: writes one event. suppress: called for each flow that gets
    no line.
    """

    def __init__(self, chain: ElementChain, own: Collection[str], emit: Emit, suppress: Callable[[], None]) -> None:
        self._chain = chain
        self._own = own
        self._emit = emit
        self._suppress = suppress
        self._bucket = Bucket(PER_SECOND, PER_SECOND, 0.0)
        self._suppressed = Suppressed()
        self._told: dict[object, float] = {}

    def line(self, packet: Packet, flow: Flow | None, verdict: Verdict, failed: bool, now: float) -> Callable[[], None] | None:
        """What writes the line of a packet that was just dropped; None if its flow has one, or the rate is exceeded.

        failed: the elements failed on it. now: monotonic seconds.
        """
        if flow is not None and (flow.ahead or flow.unsound) and not failed:
            # It is sent again, or its receiver would discard it: the flow is not denied.
            return None
        element, rule = (ON_ERROR, "") if failed else self._chain.reason(packet, flow)
        if element in self._own or not self._is_news(packet, flow, (element, rule), now):
            return None
        if not self._bucket.take(now):
            self._suppressed.add(now)
            self._suppress()
            return None
        known = dict(flow.facts) if flow is not None else {}
        outcome = "would drop" if verdict is WOULD_DROP else "dropped"
        fields: dict[str, Any] = {"event": "drop", "hook": hook_name(packet.hook), "verdict": verdict.word}
        if verdict is WOULD_DROP:
            fields["would"] = "drop"
        fields |= {"reason": f"{element}: {rule}" if rule else element, "element": element} | ({"rule": rule} if rule else {})
        try:
            subject = str(packet.headers.five_tuple)
            fields |= ends(packet.headers.five_tuple)
            if not {"unit", "container", "cgroup"} & known.keys():
                known |= self._chain.context.owners.names(packet)
        except PacketError:
            subject = f"packet of {packet.length} bytes"
        fields = fields_of({name: value for name, value in known.items() if name not in ("reason", "dpi")}) | fields
        said = (f"{outcome} {subject} {fields['hook']}", words(known), who(known), f"by {fields['reason']}")
        message = ", ".join(filter(None, said))
        return lambda: self._emit(message, **fields)

    def count_left(self, now: float, stopping: bool = False) -> None:
        """Log how many flows got no line, if it is time for that."""
        if count := self._suppressed.take() if stopping else self._suppressed.due(now):
            self._emit(
                f"{count} more flows were dropped, or would be, without a line: more than {PER_SECOND} a second",
                level="warning",
                suppressed=count,
            )

    def _is_news(self, packet: Packet, flow: Flow | None, reason: tuple[str, str], now: float) -> bool:
        """Whether its flow has no line yet with this reason."""
        if flow is not None:
            known = flow.state.get(self)
            flow.state[self] = reason
            return bool(known != reason)
        try:
            key: object = packet.headers.five_tuple
        except PacketError:
            key = packet.hook, packet.indev, packet.outdev
        told = self._told.pop(key, None)
        self._told[key] = now
        if len(self._told) > _REMEMBERED:
            del self._told[next(iter(self._told))]
        return told is None or now - told > _FORGOTTEN_AFTER
