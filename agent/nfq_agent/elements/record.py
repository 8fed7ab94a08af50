"""`record`: one record of each flow, when its verdict is known and when it has ended. It decides nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from nfq_agent import element
from nfq_agent.decisions import element_and_rule
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.facts import ends, who, words
from nfq_agent.facts import fields as fields_of
from nfq_agent.flow import Account, Flow
from nfq_agent.packet import TCP, Packet, hook_name
from nfq_agent.rate import LimitedEmit
from nfq_agent.verdict import WOULD_DROP, Action, Verdict

# After how many packets a flow gets its first record although it is not decided yet.
_WAITS: Final = 10
# Seconds after the end of a connection, in which its last packets still come.
_LINGERS: Final = 1.0
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_NOTHING: Final = Account(0, 0, 0, 0, 0.0)
Accounts = Callable[[Flow], Account | None]


class RecordOptions(element.Options):
    """only: "drop" leaves out flows that are accepted. events: when there is a record: the verdict is known, the flow has ended.

    who: ask the kernel for the unit or container that has the socket. exe: look for its program as well. per_second: records a
    second on average, 0 for no limit.
    """

    only: Literal["all", "drop"] = "all"
    events: Literal["both", "begin", "end"] = "both"
    who: bool = True
    exe: bool = False
    per_second: Annotated[int, Field(ge=0)] = 1000


@dataclass(slots=True)
class _Case:
    """What is kept of a connection. began: seconds of the flow's clock. start: since the epoch. base: what passed before it."""

    began: float
    start: float
    base: Account
    place: dict[str, Any]
    initial: int | None
    facts: dict[str, Any]
    packets: int = 0
    outcome: str = ""
    reason: str = ""
    told: bool = False
    finished: int = 0
    end: str = ""
    closed: bool = False


class FlowRecord(PacketElement[RecordOptions]):
    """Emits five-tuple, owner, name, verdict, reason, packets and bytes both ways, start and duration of every flow.

    A TCP connection has ended a second after both FIN or its RST; any flow when the flow table forgets it, or the worker stops.
    """

    needs = Needs.FLOW
    limits_itself = True

    def __init__(self, name: str, options: RecordOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        rate = options.per_second or math.inf
        self._limited = LimitedEmit(emit, rate, rate)
        # By the identity of the flow; the flow is kept beside it, so that the identity is not reused.
        self._cases: dict[int, tuple[Flow, _Case]] = {}
        self._closing: deque[tuple[float, Flow, _Case]] = deque()
        # Connections of which only the first packet was shown, until a record of their beginning is due.
        self._opened: deque[tuple[float, Flow, _Case]] = deque()

    @classmethod
    def logs_drops_of(cls, options: RecordOptions) -> Literal["all", "own", "none"]:  # noqa: ARG003  # with any
        """All: a dropped flow has a record."""
        return "all"

    @classmethod
    def reads_owner_of(cls, options: RecordOptions) -> bool:
        """Where it says who a flow belongs to."""
        return options.who

    @classmethod
    def reads_program_of(cls, options: RecordOptions) -> bool:
        """Where it says which program that is."""
        return options.who and options.exe

    def follow(self, packet: Packet, flow: Flow, verdict: Verdict, account: Accounts) -> None:
        """Note what a packet changes."""
        headers = packet.headers
        flags = headers.tcp_flags or 0 if headers.five_tuple.protocol == TCP else 0
        case = self._case(packet, flow, flags, account)
        if case.closed:
            return
        case.packets += 1
        case.facts = dict(flow.facts)
        outcome = _outcome(verdict)
        # A handshake that passes says nothing yet; it may still be judged by the previous connection of its five-tuple. A reset
        # that passes ends what was rejected.
        ends = flags & _RST and case.outcome not in ("", "accept")
        passes = outcome == "accept" and (flow.undecided or flags & _SYN or ends)
        if not passes or flow.undecided:
            # Also of the same outcome: another message may be judged by another rule.
            case.reason = str(flow.facts.get("reason", ""))
        if not passes and outcome != case.outcome:
            changed = bool(case.outcome)
            case.outcome = outcome
            self._tell(flow, case, "change" if changed and case.told else "begin", account(flow), flow.last)
        elif not case.told and case.packets >= _WAITS:
            self._tell(flow, case, "begin", account(flow), flow.last)
        elif case.packets == 1 and outcome == "accept" and flags & _SYN and not flow.undecided:
            self._opened.append((flow.last + _LINGERS, flow, case))
        if flags & (_FIN | _RST):
            self._note_end(flow, case, flags, headers.five_tuple == flow.origin)

    def forgotten(self, flow: Flow, account: Account, stopped: bool) -> None:
        """The flow has ended, unless it had ended before."""
        known = self._cases.pop(id(flow), None)
        if known is not None and not known[1].closed:
            self._close(flow, known[1], known[1].end or ("stopped" if stopped else "idle"), account, max(flow.last, account.last))

    def tick(self, now: float, account: Accounts) -> None:
        """Record connections whose last packets have come, and those that pass without being shown again."""
        while self._opened and self._opened[0][0] <= now:
            _, flow, case = self._opened.popleft()
            if not case.told and not case.closed and not flow.undecided and (total := account(flow)) is not None:
                case.outcome, case.reason = "accept", str(flow.facts.get("reason", ""))
                self._tell(flow, case, "begin", total, now)
        while self._closing and self._closing[0][0] <= now:
            _, flow, case = self._closing.popleft()
            if not case.closed and (total := account(flow)) is not None:
                self._close(flow, case, case.end, total, now)

    def stop(self) -> None:
        """Log how many records were left out since the last such line."""
        self._limited.finish(f"{self.name}: records left out: more than {self.options.per_second} a second")

    def _case(self, packet: Packet, flow: Flow, flags: int, account: Accounts) -> _Case:
        """The connection that a packet belongs to. Another one begins where the flow was emptied, or after an end."""
        known = self._cases.get(id(flow))
        begins = flags & (_SYN | _ACK) == _SYN
        initial = (
            int.from_bytes(packet.payload[(start := packet.headers.transport or 0) + 4 : start + 8], "big") if begins else None
        )
        if known is not None:
            latest = known[1]
            another = begins and latest.end and latest.initial != initial
            if self in flow.state and not another:
                return latest
        base = _NOTHING
        if known is not None or flow.packets > 1:
            base = _before(packet, flow, account(flow) or _NOTHING)
        if known is not None and not known[1].closed:
            self._close(flow, known[1], known[1].end or "replaced", base, flow.last)
        place = {"hook": hook_name(packet.hook)} | ({"mark": f"{packet.mark:#x}"} if packet.mark else {})
        case = _Case(flow.last, packet.time, base, place, initial, {})
        self._cases[id(flow)] = flow, case
        flow.state[self] = case
        if not {"unit", "container", "cgroup"} & flow.facts.keys():
            owners = self.context.owners
            case.place |= owners.names(packet) if self.options.who else owners.known(packet)
        return case

    def _note_end(self, flow: Flow, case: _Case, flags: int, from_origin: bool) -> None:
        if case.end:
            return
        case.finished |= 1 if from_origin else 2
        if flags & _RST or case.finished == 3:
            case.end = "reset" if flags & _RST else "closed"
            self._closing.append((flow.last + _LINGERS, flow, case))

    def _close(self, flow: Flow, case: _Case, end: str, total: Account, now: float) -> None:
        case.closed, case.end = True, end
        self._tell(flow, case, "end", total, now)

    def _tell(self, flow: Flow, case: _Case, event: str, total: Account | None, now: float) -> None:
        case.told = True
        options = self.options
        outcome = case.outcome or "accept"
        if (options.only == "drop" and outcome == "accept") or (options.events not in ("both", event) and event != "change"):
            return
        passed = (total or _NOTHING).since(case.base)
        client, server = flow.origin, flow.origin.reversed()
        if not flow.origin_is_client:
            client, server = server, client
        known = case.place | {name: value for name, value in case.facts.items() if name not in ("reason", "dpi")}
        fields: dict[str, Any] = {
            **fields_of(known),
            "event": event,
            **ends(client),
            "verdict": "accept" if outcome == "would drop" else outcome,
            "start": datetime.fromtimestamp(case.start, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "duration": round(max(flow.last, passed.last) - case.began, 3),
            "pkts_toserver": passed.packets_sent,
            "bytes_toserver": passed.bytes_sent,
            "pkts_toclient": passed.packets_received,
            "bytes_toclient": passed.bytes_received,
        }
        if outcome == "would drop":
            fields["would"] = "drop"
        if case.reason:
            fields["reason"] = case.reason
            fields["element"], fields["rule"] = element_and_rule(case.reason)
        said = [outcome, words(known), who(known), f"by {case.reason}" if case.reason else ""]
        if event == "end":
            fields["end"] = case.end
            said += [
                f"{passed.bytes_sent} bytes sent in {passed.packets_sent} packets",
                f"{passed.bytes_received} received in {passed.packets_received}",
                f"{fields['duration']:g} s",
                case.end,
            ]
        self._limited(now, f"flow {event} {client}: {', '.join(filter(None, said))}", **fields)


def _outcome(verdict: Verdict) -> str:
    if verdict is WOULD_DROP:
        return "would drop"
    return verdict.word if verdict.outcome is Action.DROP else "accept"


def _before(packet: Packet, flow: Flow, total: Account) -> Account:
    """What had passed before this packet."""
    if (packet.headers.five_tuple == flow.origin) == flow.origin_is_client:
        return total._replace(packets_sent=total.packets_sent - 1, bytes_sent=total.bytes_sent - packet.length)
    return total._replace(packets_received=total.packets_received - 1, bytes_received=total.bytes_received - packet.length)
