"""The chain of elements: asks them in order, for one packet at a time, and names the element and the rule that decided.

It catches no exception of an element; its caller does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from nfq_agent.compiled import Compiled, compiled_beside, compiled_of, step_of
from nfq_agent.context import Context
from nfq_agent.element import Needs, PacketElement
from nfq_agent.flow import Account, Flow, Watch
from nfq_agent.flow_table import FlowTable
from nfq_agent.foresight import Foresight, foresight_of
from nfq_agent.link_local import needed_by_link
from nfq_agent.packet import Packet
from nfq_agent.protocols import http1
from nfq_agent.steps import Step
from nfq_agent.verdict import ACCEPT, Action, Verdict

# The reason where an element failed.
ON_ERROR: Final = "on_error"
_REASONED: Final = object()
# What an HTTP request says besides its host.
_DETAILS: Final = frozenset(http1.PROTOCOL.facts) - {"http_host"}


class ElementChain:
    """Elements in their order. The first that answers wins; then those that amend verdicts are asked, in the same order.

    monitor: drops are not amended, since they will be accepts; and elements that amend get no verdict as lasting that would keep
    another drop from being counted: none on a packet alone, none on a flow that would have been dropped. context: for elements.
    """

    def __init__(
        self, elements: Sequence[PacketElement], default: Verdict, monitor: bool = False, context: Context | None = None
    ) -> None:
        self._elements = tuple(elements)
        if context is not None:
            context = replace(context, monitor=monitor) if monitor else context
            for element in self._elements:
                element.context = context
        self._monitor = monitor
        # Only those that override it are called; a call that does nothing costs as much as one that does.
        self._deciding = asked = tuple(e for e in self._elements if _overrides(e, "decide"))
        self._amending = tuple(e for e in self._elements if _overrides(e, "amend"))
        self._deciders = tuple(e.decide for e in asked)
        self._listeners = tuple(e.judged for e in self._elements if _overrides(e, "judged"))
        self._followers = tuple(e for e in self._elements if _overrides(e, "follow"))
        self._ticked = tuple(e for e in self._elements if _overrides(e, "tick"))
        self._amenders = tuple(e.amend for e in self._amending)
        self._default = default
        # For the listeners: the flows of the packets of this turn, by the packet's number.
        self._flows: dict[int, Flow] = {}
        # Whether the answer of each is lasting: if it is, and all before it are, which left the packet to it.
        self._lasting = tuple((e.decide, all(other.lasting for other in asked[: end + 1])) for end, e in enumerate(asked))
        self._default_lasting = all(e.lasting for e in asked)
        # The place in `_deciding` of the element that answered last; None where all were asked and none answered.
        self._answered: int | None = None
        self.context = context or Context()
        # Where others follow flows: those that judge and hear without them, in their compiled form.
        self._steps: dict[PacketElement, Step] = {}
        if self.needs is Needs.FLOW:
            self._steps = {e: step for e in self._elements if (step := step_of(e)) is not None}
        # Which packets of a flow have to be shown: to the elements up to the one that answers, and to those that amend or listen.
        self._watches = tuple(_unwatched if e in self._steps else e.watches for e in asked)
        self._later_watches = tuple(e.watches for e in self._amending if e not in self._steps) + tuple(
            e.watches for e in self._steps if _overrides(e, "watches")
        )
        # Whether a packet was changed by an element that changes each by itself.
        self._changed = False
        # The element that turned the accept of another into a drop for the latest packet; empty where none did.
        self._dropped_by = ""
        self._changes = any(e in self._steps for e in self._amending)
        # Whether the answers to two HTTP requests for the same host are the same.
        self._by_host = all(e.facts_read is not None and _DETAILS.isdisjoint(e.facts_read) for e in self._elements)
        self._amended_lasting = all(e.lasting for e in self._amending)

    def __len__(self) -> int:
        return len(self._elements)

    @property
    def needs(self) -> Needs:
        """The most that any element reads."""
        return max((element.needs for element in self._elements), default=Needs.METADATA)

    @property
    def reads_process(self) -> bool:
        """True where an element looks at the uid or gid of the sending process."""
        return any(element.reads_process for element in self._elements)

    @property
    def pure(self) -> bool:
        """True where a verdict follows from protocol, addresses, ports, hook and interfaces, and is remembered by them."""
        return not self._amenders and all(element.pure for element in self._elements)

    @property
    def watched(self) -> bool:
        """True where every element says which packets of a flow it has to be shown, so that others need not be."""
        others = [e for e in self._elements if e not in self._steps]
        active = (e for e in others if _overrides(e, "decide") or _overrides(e, "amend"))
        if self.needs is not Needs.FLOW or any(_overrides(e, "judged") for e in others):
            return False
        # What such a step changes would stay unknown to those who follow flows.
        changed = any(step.changes for step in self._steps.values())
        return all(_overrides(e, "watches") for e in active) and not (changed and self._followers)

    def watch(self, flow: Flow) -> int:
        """Which packets of the flow of the packet that was decided last have to be shown from now on."""
        if flow.ahead or flow.unsound:
            # The answer was for that packet alone.
            return Watch.ALL
        if self._changed or (self._answered is not None and self._deciding[self._answered] in self._steps):
            return Watch.ALL
        flow.expects = None
        watch: int = Watch.NOTHING
        # While the answer is for the packet alone, that to a request may last.
        requests = self._by_host and not flow.undecided
        for watches in (*self._watches[: self._asked_count], *self._later_watches):
            wanted = watches(flow)
            watch |= wanted
            # One that reads the client's payload for itself is shown all of it.
            requests = requests and (not wanted & Watch.CLIENT or bool(wanted & Watch.REQUEST))
        return watch if requests else watch & ~Watch.REQUEST

    def foresight(self) -> Foresight | None:
        """What the elements answer to openings, where that can be told."""
        if not self.watched or not self._by_host or self._followers or any(s.shows_openings for s in self._steps.values()):
            return None
        # An element in between may drop a packet: the elements behind it are not asked about it.
        places = self._judging_places()
        if places != list(range(len(places))):
            return None
        deciding, amending = ([e for e in group if e not in self._steps] for group in (self._deciding, self._amending))
        lasts = self._default_lasting and self._amended_lasting and not self._changes
        return foresight_of(deciding, amending, self._default, self.context.flows, self.context.decisions, lasts)

    def compiled_beside(self, table: FlowTable, monitor: bool, own_lines: Collection[str] | None, whole: bool) -> Compiled | None:
        """The elements that follow no flow in their compiled form, beside `table`; None where that is not possible.

        whole: all packets are judged here, whatever flow they are of. Raises no exception.
        """
        asked, places = self._asked_with_steps(), self._judging_places()
        first = places == list(range(len(places)))
        if places and first and not whole:
            return None
        # Those that judge stand in front of all others, or between those that never answer and those that may.
        silent = next((place for place, e in enumerate(asked) if e.answers and e not in self._steps), len(asked))
        if not first and places != list(range(silent - len(places), silent)):
            return None
        return compiled_beside(self._steps, table, first, monitor, own_lines)

    def compiled(self, monitor: bool, own_lines: Collection[str] | None) -> Compiled | None:
        """The elements in their compiled form, where each has one and none follows flows (see `compiled_of`)."""
        if self.needs is Needs.FLOW:
            return None
        return compiled_of(self._elements, self._default, monitor, own_lines)

    def _asked_with_steps(self) -> list[PacketElement]:
        """The elements that may judge or find facts."""
        return [e for e in self._deciding if e not in self._steps or self._steps[e].judges]

    def _judging_places(self) -> list[int]:
        """Where among them those stand that follow no flow."""
        return [place for place, e in enumerate(self._asked_with_steps()) if e in self._steps]

    @property
    def has_steps(self) -> bool:
        """True where elements in their compiled form stand beside those that follow flows."""
        return bool(self._steps)

    @property
    def follows(self) -> bool:
        """True if an element follows flows to their end."""
        return bool(self._followers)

    def follow(
        self, packet: Packet, flow: Flow, verdict: Verdict, account: Callable[[Flow], Account | None], failed: bool = False
    ) -> None:
        """Tell the elements that follow flows the verdict of a packet that was shown. failed: an element failed on it."""
        if failed:
            flow.state[_REASONED] = None
            flow.facts["reason"] = ON_ERROR
        elif flow.undecided or flow.state.get(_REASONED) is not verdict:
            flow.state[_REASONED] = verdict
            flow.facts["reason"] = ": ".join(filter(None, self.reason(packet, flow)))
        for element in self._followers:
            element.follow(packet, flow, verdict, account)

    def ends(self, ended: Iterable[tuple[Flow, Account]], stopped: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
        """What tells the elements that follow flows that these have ended: calls, each with the name of its element."""
        for flow, total in ended:
            yield from ((e.name, partial(e.forgotten, flow, total, stopped)) for e in self._followers)

    def ticks(self, now: float, account: Callable[[Flow], Account | None]) -> Iterator[tuple[str, Callable[[], None]]]:
        """What tells elements the time, likewise."""
        return ((e.name, partial(e.tick, now, account)) for e in self._ticked)

    def stops(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What stops the elements, in reverse order, likewise."""
        return ((e.name, e.stop) for e in reversed(self._elements))

    @property
    def listens(self) -> bool:
        """True if an element listens to every packet."""
        return bool(self._listeners)

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict:
        """The first answer, else the default. An exception of an element is passed to the caller."""
        if flow is not None and self._listeners:
            self._flows[packet.id] = flow
        if self._amenders:
            return self._decide_and_amend(packet, flow)
        for place, decide in enumerate(self._deciders):
            verdict = decide(packet, flow)
            if verdict is not None:
                self._answered = place
                return verdict
        self._answered = None
        return self._by_default(packet)

    def _by_default(self, packet: Packet) -> Verdict:
        return ACCEPT if self._default.action is Action.DROP and needed_by_link(packet) else self._default

    def _decide_and_amend(self, packet: Packet, flow: Flow | None) -> Verdict:
        self._changed = False
        lasting = self._default_lasting
        for place, (decide, all_lasting) in enumerate(self._lasting):
            verdict = decide(packet, flow)
            if verdict is not None:
                self._answered, lasting = place, all_lasting
                break
        else:
            self._answered = None
            verdict = self._by_default(packet)
        # What a receiver discards, or what waits for bytes before it, is answered by itself.
        if not self._amended_lasting or (flow is not None and (flow.undecided or flow.ahead or flow.unsound)):
            lasting = False
        if self._monitor:
            if verdict.action is Action.DROP:
                if flow is not None and lasting:
                    flow.state[self] = verdict
                return verdict
            # The other direction of a denied flow may be accepted, packet by packet.
            lasting = lasting and flow is not None and self not in flow.state
        before = verdict
        self._dropped_by = ""
        for place, amend in enumerate(self._amenders):
            amended = amend(packet, flow, verdict, lasting)
            if amended.action is Action.DROP and verdict.action is Action.ACCEPT:
                self._dropped_by = self._amending[place].name
            verdict = amended
        self._changed = self._changes and verdict is not before
        return verdict

    def asked(self) -> tuple[PacketElement, ...]:
        """The elements that `decide` asked the last time, in order; the last one answered, unless `reason` says "default"."""
        return self._deciding[: self._asked_count]

    @property
    def _asked_count(self) -> int:
        """How many elements were asked the last time."""
        return len(self._deciding) if self._answered is None else self._answered + 1

    def reason(self, packet: Packet, flow: Flow | None) -> tuple[str, str]:
        """The element and the rule of the latest answer; "default" where no element answered, an empty rule where it has none."""
        if self._dropped_by:
            return self._dropped_by, ""
        if self._answered is None:
            return "default", ""
        element = self._deciding[self._answered]
        return element.name, element.rule(packet, flow)

    def judged(self, packet: Packet, verdict: Verdict) -> None:
        """Tell the elements that listen the verdict of the packet."""
        flow = self._flows.pop(packet.id, None) if self._flows else None
        for listener in self._listeners:
            if listener(packet, flow, verdict) is False:
                return

    def start(self) -> None:
        """Start the elements in order."""
        for element in self._elements:
            element.start()

    def stop(self) -> None:
        """Stop them in reverse order."""
        for _, stop in self.stops():
            stop()


def _unwatched(_: Flow) -> int:
    return Watch.NOTHING


def _overrides(element: PacketElement, method: str) -> bool:
    return getattr(type(element), method) is not getattr(PacketElement, method)
