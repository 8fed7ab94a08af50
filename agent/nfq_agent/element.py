"""Elements: small classes that examine a packet or a stream and may answer; and the chain that asks them in order.

An element knows no other element, reads no clock and does no I/O of its own: events go through `emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, Final, Generic, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypeVar

from nfq_agent.access import HasAccess
from nfq_agent.context import Context
from nfq_agent.fitting import fit
from nfq_agent.flow import Account, Flow, Watch
from nfq_agent.foresight import Foreseeable, Foresight, foresight_of
from nfq_agent.link_local import needed_by_link
from nfq_agent.mark import Kept
from nfq_agent.packet import Packet
from nfq_agent.protocols import http1
from nfq_agent.verdict import ACCEPT, Action, Verdict

Emit = Callable[..., None]


class Needs(IntEnum):
    """How much of a packet an element reads; copy range and decoding follow from the most that a chain asks for."""

    METADATA = 0
    HEADERS = 1
    PAYLOAD = 2
    FLOW = 3


class Options(BaseModel):
    """The keys of an element's table in the configuration. An element adds its own in a subclass.

    Values are checked strictly (a string is not a number), and every type has a form in TOML: an array for a tuple or set, a
    string for a Path, an address, a network or a member of an Enum, and `"5s"` for a timedelta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], context: Any = None) -> Self:
        """The options of a table as TOML gives it. context: `Lookups`, for names. Raises pydantic's ValidationError."""
        return cls.model_validate(fit(cls, dict(table)), context=context)


O = TypeVar("O", bound=Options, default=Any)  # noqa: E741  # a type variable


def options_of(cls: type[Any]) -> type[Options] | None:
    """The model that an element names as its parameter, as in `PacketElement[MyOptions]`; None if it names none."""
    for base in cls.__dict__.get("__orig_bases__", ()):
        for argument in get_args(base):
            if isinstance(argument, type) and issubclass(argument, Options):
                return argument
    return None


class PacketElement(HasAccess, Foreseeable, Generic[O]):
    """Base of every element that judges packets.

    The model of its table is the parameter of its base, as in `class MyElement(PacketElement[MyOptions])`, or its attribute
    `Options`. `emit(message, level="info", **fields)` emits one event; it never blocks, and may suppress events that come too
    fast.

    `needs`: how much of the packet it reads. `rewrites`: it may answer with a changed payload.
    `rewrites_small`: it may, for packets alone that no offload joins (a SYN). `pure`: the answer follows from
    protocol, addresses, ports, hook and interfaces alone, so that the worker may remember it. `lasting`: the answer, None too,
    holds for the whole flow from then on, unless `flow.undecided`. `reads_process`: it reads uid or gid. `degrades`: it works,
    with less to report, where the kernel shows metadata alone. An instance may set `needs`, `pure`, `lasting` and
    `reads_process` for itself, by its options. `keeps_facts`: the facts that it puts into flows; a rule on a fact needs such an
    element before it. `access`: what it needs besides packets, as files or sockets (`nfq_agent.access`).

    `context`: what the worker lends, set before `start`. `facts_read`: the facts that its answers follow from, None for any.
    Where each element of a chain names them, later HTTP requests for the same host need not be shown to it if it reads no more
    than the host.

    The time is `packet.time`: the worker stamps packets that the kernel
    did not stamp.
    """

    context: Context = Context()
    needs: Needs = Needs.HEADERS
    rewrites: ClassVar[bool] = False
    rewrites_small: ClassVar[bool] = False
    pure: bool = False
    lasting: bool = False
    reads_process: bool = False
    degrades: ClassVar[bool] = False
    keeps_facts: ClassVar[tuple[str, ...]] = ()
    facts_read: tuple[str, ...] | None = None
    Options: ClassVar[type[Options]] = Options

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Options" not in cls.__dict__ and (model := options_of(cls)) is not None:
            cls.Options = model

    def __init__(self, name: str, options: O, emit: Emit) -> None:
        self.name = name
        self.options = options
        self.emit = emit

    @classmethod
    def needs_of(cls, options: O) -> Needs:
        """How much an element with these options reads: `needs`, unless a subclass knows it more exactly."""
        return cls.needs

    @classmethod
    def logs_drops_of(cls, options: O) -> Literal["all", "own", "none"]:
        """Which drops an element with these options logs or records: all of its chain, its own, or none."""
        return "none"

    @classmethod
    def reads_process_of(cls, options: O) -> bool:
        """Whether an element with these options looks at uid or gid: `reads_process`, unless a subclass knows it more exactly."""
        return cls.reads_process

    @classmethod
    def reads_owner_of(cls, options: O) -> bool:
        """Whether an element with these options asks who a flow belongs to (`context.owners`)."""
        return False

    @classmethod
    def facts_of(cls, options: O) -> tuple[str, ...]:
        """The facts that an element with these options needs another one, before it in the chain, to put into flows."""
        return ()

    @classmethod
    def rewrites_of(cls, options: O) -> bool:
        """Whether an element with these options may change payloads: `rewrites`, unless a subclass knows it more exactly."""
        return cls.rewrites

    @classmethod
    def kept_of(cls, options: O) -> Kept | None:
        """The connection marks by which the kernel keeps verdicts on flows, None if the element keeps none there."""
        return None

    @classmethod
    def keeps_flows_of(cls, options: O) -> bool:
        """Whether an element with these options judges flows by what they said, which is to outlive the worker."""
        return False

    @classmethod
    def names_of(cls, options: O) -> tuple[str, ...]:
        """Patterns of the names for which an element with these options has to know the addresses that DNS answers gave."""
        return ()

    @classmethod
    def denies_of(cls, options: O) -> bool:
        """Whether an element with these options blocks traffic by a policy, which overload must not undo without a warning."""
        return False

    @classmethod
    def injects_of(cls, options: O) -> bool:
        """Whether an element with these options gives verdicts with packets to be sent besides (`Verdict.inject`)."""
        return False

    def start(self) -> None:
        """Called once in the worker, before the first packet."""

    def stop(self) -> None:
        """Called once in the worker, after the last packet."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """The verdict on this packet, or None to leave it to the next elements. `flow` is None unless needs is FLOW."""
        return None

    def rule(self, packet: Packet, flow: Flow | None) -> str:
        """The rule of its latest answer, which was for this packet; empty for an element without rules."""
        return ""

    def watches(self, flow: Flow) -> int:
        """Which packets of this flow it has to be shown from now on; asked after each packet of the flow that it was shown.

        What it does not ask for, it promises to answer as it answered that packet, in either direction and at any hook: it is not
        called for it. All packets, unless a subclass knows it more exactly. The beginning and the end of a TCP connection,
        and the first two datagrams of a UDP flow, are always shown.
        """
        return Watch.ALL

    def amend(self, packet: Packet, flow: Flow | None, verdict: Verdict, lasting: bool) -> Verdict:
        """The verdict that was chosen, or another in its place. lasting: it holds for the whole flow."""
        return verdict

    def follow(self, packet: Packet, flow: Flow, verdict: Verdict, account: Callable[[Flow], Account | None]) -> None:
        """Called after each packet that the chain was shown, with its verdict. account: what has passed of a flow so far.

        It hides nothing from the flow table: packets that no element has to be shown still pass without the chain.
        """

    def forgotten(self, flow: Flow, account: Account, stopped: bool) -> None:
        """Called when a flow is forgotten, or the worker stops."""

    def tick(self, now: float, account: Callable[[Flow], Account | None]) -> None:
        """Called a few times a second. now: seconds, on the clock of `Flow.last`."""

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> bool | None:
        """Called with the verdict of a packet of this element's chain, after it was given.

        flow: the packet's, where some element of the chain needs FLOW. With False the later elements that listen are not
        called for this packet.
        """


_REASONED: Final = object()
# What an HTTP request says besides its host.
_DETAILS: Final = frozenset(http1.PROTOCOL.facts) - {"http_host"}


class ElementChain:
    """Elements in their order. The first that answers wins; then those that amend verdicts are asked, in the same order.

    monitor: a drop is not to be amended, since it will be an accept; and to those that amend, nothing lasts that would hide
    another drop from being counted: no verdict on a packet alone, none on a flow that would have been dropped. context: lent.
    """

    def __init__(
        self, elements: Sequence[PacketElement], default: Verdict, monitor: bool = False, context: Context | None = None
    ) -> None:
        self._elements = tuple(elements)
        if context is not None:
            for element in self._elements:
                element.context = context
        self._monitor = monitor
        # Only those that override it are called; a call that does nothing costs as much as one that does.
        self._deciding = asked = tuple(e for e in self._elements if _overrides(e, "decide"))
        self._amending = tuple(e for e in self._elements if _overrides(e, "amend"))
        self._deciders = tuple(e.decide for e in asked)
        self._listeners = tuple(e.judged for e in self._elements if _overrides(e, "judged"))
        self._followers = tuple(e for e in self._elements if _overrides(e, "follow"))
        self._amenders = tuple(e.amend for e in self._amending)
        self._default = default
        # For the listeners: the flows of the packets of this turn, by the packet's number.
        self._flows: dict[int, Flow] = {}
        # Whether the answer of each is lasting: if it is, and all before it are, which left the packet to it.
        self._lasting = tuple((e.decide, all(other.lasting for other in asked[: end + 1])) for end, e in enumerate(asked))
        self._default_lasting = all(e.lasting for e in asked)
        # Which packets of a flow have to be shown: to the elements up to the one that answers, and to those that amend.
        self._watches = tuple(e.watches for e in asked)
        self._amended_watches = tuple(e.watches for e in self._amending)
        self._asked = 0
        self.context = context or Context()
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
        active = (e for e in self._elements if _overrides(e, "decide") or _overrides(e, "amend"))
        return self.needs is Needs.FLOW and not self._listeners and all(_overrides(e, "watches") for e in active)

    def watch(self, flow: Flow) -> int:
        """Which packets of the flow of the packet that was decided last have to be shown from now on."""
        if flow.ahead or flow.unsound:
            # The answer was for that packet alone.
            return Watch.ALL
        flow.expects = None
        watch: int = Watch.NOTHING
        requests = self._by_host
        for watches in (*self._watches[: self._asked], *self._amended_watches):
            wanted = watches(flow)
            watch |= wanted
            # One that reads the client's payload for itself is shown all of it.
            requests = requests and (not wanted & Watch.CLIENT or bool(wanted & Watch.REQUEST))
        return watch if requests else watch & ~Watch.REQUEST

    def foresight(self) -> Foresight | None:
        """What the elements answer to openings, where that can be told."""
        can = self.watched and self._by_host and not self._followers
        return foresight_of(self._deciding, self._amending, self._default, self.context.flows) if can else None

    @property
    def follows(self) -> bool:
        """True if an element follows flows to their end."""
        return bool(self._followers)

    def follow(self, packet: Packet, flow: Flow, verdict: Verdict, account: Callable[[Flow], Account | None]) -> None:
        """Tell the elements that follow flows the verdict of a packet that was shown."""
        if flow.state.get(_REASONED) is not verdict:
            flow.state[_REASONED] = verdict
            flow.facts["reason"] = ": ".join(filter(None, self.reason(packet, flow)))
        for element in self._followers:
            element.follow(packet, flow, verdict, account)

    def tick(
        self, now: float, ended: Sequence[tuple[Flow, Account]], account: Callable[[Flow], Account | None], stopped: bool = False
    ) -> None:
        """Tell them which flows have ended, and the time."""
        for element in self._followers:
            for flow, total in ended:
                element.forgotten(flow, total, stopped)
            element.tick(now, account)

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
        asked = 0
        for decide in self._deciders:
            asked += 1
            verdict = decide(packet, flow)
            if verdict is not None:
                self._asked = asked
                return verdict
        self._asked = asked + 1
        return self._by_default(packet)

    def _by_default(self, packet: Packet) -> Verdict:
        return ACCEPT if self._default.action is Action.DROP and needed_by_link(packet) else self._default

    def _decide_and_amend(self, packet: Packet, flow: Flow | None) -> Verdict:
        verdict: Verdict | None = None
        asked, lasting = 0, self._default_lasting
        for decide, holds in self._lasting:
            asked += 1
            verdict = decide(packet, flow)
            if verdict is not None:
                lasting = holds
                break
        self._asked = asked
        if verdict is None:
            self._asked = asked + 1
            verdict = self._by_default(packet)
        if not self._amended_lasting or (flow is not None and flow.undecided):
            lasting = False
        if self._monitor:
            if verdict.action is Action.DROP:
                if flow is not None and lasting:
                    flow.state[self] = verdict
                return verdict
            # The other direction of a denied flow may be accepted, packet by packet.
            lasting = lasting and flow is not None and self not in flow.state
        for amend in self._amenders:
            verdict = amend(packet, flow, verdict, lasting)
        return verdict

    def asked(self) -> tuple[PacketElement, ...]:
        """The elements that `decide` asked the last time, in order; the last one answered, unless `reason` says "default"."""
        return self._deciding[: self._asked]

    def reason(self, packet: Packet, flow: Flow | None) -> tuple[str, str]:
        """The element and the rule of the latest answer; "default" where no element answered, an empty rule where it has none."""
        if not 0 < self._asked <= len(self._deciding):
            return "default", ""
        element = self._deciding[self._asked - 1]
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
        for element in reversed(self._elements):
            element.stop()


def _overrides(element: PacketElement, method: str) -> bool:
    return getattr(type(element), method) is not getattr(PacketElement, method)
