"""`policy`: ordered rules on the headers of a packet and on the facts of its flow; the first that matches decides."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, create_model

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow, Watch
from nfq_agent.link_local import needed_by_link
from nfq_agent.match import Conditions, Match
from nfq_agent.packet import TCP, FiveTuple, Packet, PacketError, address, hook_name, protocol_name
from nfq_agent.patterns import Patterns
from nfq_agent.protocols.known import BY_NAME, HOSTS, OWNERS
from nfq_agent.rate import LINES, WARNINGS, LimitedEmit
from nfq_agent.reject import Allowance, reject
from nfq_agent.values import listed
from nfq_agent.verdict import ACCEPT, DROP, Verdict

# Rule keys that name a fact: every fact that a protocol sets, by its own name, and one short form.
ATTRIBUTES: Final = {**{fact: fact for fact in OWNERS}, "alpn": "tls_alpn", "encrypted": "encrypted"}

ActionName = Literal["accept", "drop", "reject"]
DEFAULT: Final = "default"


def _spelled(value: object) -> object:
    """True and false as TOML writes them."""
    return str(value).lower() if isinstance(value, bool) else value


# Rule keys about who a flow belongs to.
OWNED_BY: Final = ("unit", "container", "cgroup")
Globs = Annotated[tuple[str, ...], BeforeValidator(listed(str)), BeforeValidator(_spelled), Field(min_length=1, strict=False)]


class _Rules(Conditions):
    """One rule: an action and its conditions. facts: patterns for facts of any other name, of elements of others.

    unit, container, cgroup: who has the flow's socket on this host; where that is not known, the rule does not match.
    """

    action: ActionName
    name: str | None = None
    unit: Globs | None = None
    container: Globs | None = None
    cgroup: Globs | None = None
    facts: dict[str, Globs] = Field(default_factory=dict)

    @property
    def wanted(self) -> list[tuple[str, tuple[str, ...]]]:
        """The facts that the rule asks for, with the patterns of each."""
        wanted = [(fact, globs) for key, fact in ATTRIBUTES.items() if (globs := getattr(self, key)) is not None]
        if self.applications:
            wanted.append(("protocol", self.applications))
        return wanted + list(self.facts.items())


if TYPE_CHECKING:
    RuleOptions = _Rules
else:
    # The keys follow from the table of protocols.
    RuleOptions = create_model(
        "RuleOptions", __base__=_Rules, __doc__=_Rules.__doc__, **dict.fromkeys(ATTRIBUTES, (Globs | None, None))
    )


class PolicyOptions(element.Options):
    """default: when no rule matches; if left out, the next elements are asked. undecided: while a fact is awaited.

    within, within_bytes: packets with payload, and bytes of payload, both ways, for which a fact is awaited: what passes until
    then if `undecided` is "accept". conflict: where a rule asks for a name of a message that servers read in different ways.
    """

    default: ActionName | None = None
    undecided: ActionName = "accept"
    within: Annotated[int, Field(ge=1, le=1000)] = 32
    within_bytes: Annotated[int, Field(ge=1, le=1 << 20)] = 16384
    conflict: ActionName = "drop"
    explain: bool = False
    rule: Annotated[tuple[RuleOptions, ...], Field(strict=False)] = ()


@dataclass(frozen=True, slots=True)
class _Rule:
    """A rule as it is applied. label: its name in the log. facts, owned_by: the patterns, by the name of the fact."""

    label: str
    action: ActionName
    facts: tuple[tuple[str, Patterns], ...]
    owned_by: tuple[tuple[str, Patterns], ...]

    def belongs(self, owner: Mapping[str, str]) -> bool:
        """Whether a flow of this owner meets it."""
        return all(key in owner and patterns.match(owner[key]) for key, patterns in self.owned_by)


@dataclass(slots=True)
class _Case:
    """A policy's view of one flow: the rules that its first packet meets, and how far the message at hand has come.

    message: its number. packets, size: with payload, and their bytes, while it was open. known: the facts that the outcome
    follows from. open: those with which it was open the last time. denied: a message of a TCP connection was denied. What comes
    later can't arrive without it, and what is sent again must not arrive, so that is final.
    """

    candidates: tuple[_Rule, ...]
    message: int = 0
    packets: int = 0
    size: int = 0
    known: tuple[Any, ...] | None = None
    open: tuple[Any, ...] | None = None
    action: ActionName | None = None
    label: str = ""
    decided: bool = False
    denied: bool = False


class Policy(PacketElement[PolicyOptions]):
    """Answers with the action of the first rule that matches.

    Without facts in any rule each packet is judged by itself. With them a flow is judged, by the headers of its first packet
    and by what each of its messages says: as long as the outcome is open the answer is `undecided`, for `within` packets with
    payload at most; a fact that has not come by then, or that the message does not have, matches nothing. A default
    of drop or reject does not apply to the ICMPv6 that the link needs, unless a rule names it.
    """

    lasting = True

    def __init__(self, name: str, options: PolicyOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.needs = self.needs_of(options)
        self._rules = tuple(_rule(number, rule) for number, rule in enumerate(options.rule, 1))
        asked = {fact for rule in self._rules for fact, _ in rule.facts}
        # Whether all facts are there and readable is a part of the outcome's key.
        self._facts = tuple(sorted(asked | {"dpi", "conflict"})) if asked else ()
        self._by_flow = self.needs is Needs.FLOW
        self._match = Match(options.rule, socket.if_indextoname)
        self._explain = options.explain
        self._default = options.default
        self._allowance = Allowance()
        self._warn = LimitedEmit(emit, WARNINGS, WARNINGS)
        self._line = LimitedEmit(emit, LINES, LINES)
        self._closed = options.default in ("drop", "reject")
        self.reads_process = self._match.by_process
        # A refusal answers this one packet.
        self.pure = not (self._by_flow or options.explain or self._match.by_process or self.injects_of(options))

    @classmethod
    def needs_of(cls, options: PolicyOptions) -> Needs:
        """The headers; the flow where a rule names a fact or an owner."""
        by_flow = cls.reads_owner_of(options) or any(rule.wanted for rule in options.rule)
        return Needs.FLOW if by_flow else Needs.HEADERS

    @classmethod
    def reads_owner_of(cls, options: PolicyOptions) -> bool:
        """True where a rule names a unit, a container or a control group."""
        return any(getattr(rule, key) is not None for rule in options.rule for key in OWNED_BY)

    @classmethod
    def keeps_flows_of(cls, options: PolicyOptions) -> bool:
        """Where a rule names a fact."""
        return any(rule.wanted for rule in options.rule)

    @classmethod
    def denies_of(cls, options: PolicyOptions) -> bool:
        """True if anything is dropped or rejected."""
        return {"drop", "reject"} & {options.default, *(rule.action for rule in options.rule)} != set()

    @classmethod
    def injects_of(cls, options: PolicyOptions) -> bool:
        """True if anything is rejected."""
        return "reject" in (options.default, options.undecided, options.conflict, *(rule.action for rule in options.rule))

    @classmethod
    def facts_of(cls, options: PolicyOptions) -> tuple[str, ...]:
        """The facts that its rules name."""
        return tuple(dict.fromkeys(fact for rule in options.rule for fact, _ in rule.wanted))

    @classmethod
    def reads_process_of(cls, options: PolicyOptions) -> bool:
        """True where a rule names a uid or gid."""
        return any(rule.uid is not None or rule.gid is not None for rule in options.rule)

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """The action of the first rule that matches, else the default's."""
        if self._closed and packet.payload[:1] >= b"\x60" and needed_by_link(packet) and not self._names(packet):
            return ACCEPT
        if flow is not None and self._by_flow:
            return self._decide_flow(packet, flow)
        bits = self._match.bits(packet, packet.headers.five_tuple)
        while bits:
            lowest = bits & -bits
            rule = self._rules[lowest.bit_length() - 1]
            if not (rule.facts or rule.owned_by):
                return self._answer(packet, rule.action, rule.label)
            # A packet without a flow has no facts.
            bits ^= lowest
        return self._answer(packet, self._default, DEFAULT)

    def watches(self, flow: Flow) -> int:
        """While the outcome is open, the packets that count towards `within`; none where it follows from the facts."""
        case: _Case | None = flow.state.get(self)
        if case is None or not self._facts or self._explain:
            return Watch.ALL
        judged = case.denied or case.decided
        # A refusal is made for the very packet.
        if (case.action if judged else self.options.undecided) == "reject":
            return Watch.ALL
        return Watch.NOTHING if judged else Watch.DATA

    def _names(self, packet: Packet) -> bool:
        """Whether a rule decides by this packet's headers alone."""
        bits = self._match.bits(packet, packet.headers.five_tuple)
        return any(bits >> place & 1 and not (rule.facts or rule.owned_by) for place, rule in enumerate(self._rules))

    def _decide_flow(self, packet: Packet, flow: Flow) -> Verdict | None:
        facts = flow.facts
        case: _Case | None = flow.state.get(self)
        if case is None:
            case = flow.state[self] = _Case(self._candidates(packet, flow))
        elif case.denied:
            return self._verdict(packet, case.action)
        if flow.ahead or flow.unsound:
            # It comes again, behind what has to be read first; or its receiver discards it. A reset would end a connection that
            # may be allowed.
            return DROP
        for earlier in flow.earlier:
            if (denial := self._earlier(packet, flow, case, earlier)) is not None:
                return denial
        known = tuple([facts.get(fact) for fact in self._facts])
        if case.decided:
            if known == case.known:
                case.message = flow.message
                return self._verdict(packet, case.action)
            if flow.message != case.message and case.action in ("drop", "reject") and flow.origin.protocol == TCP:
                case.denied = True
                return self._verdict(packet, case.action)
        if flow.message != case.message:
            case.message, case.packets, case.size, case.decided, case.open = flow.message, 0, 0, False, None
        return self._judge(packet, flow, case, known)

    def _judge(self, packet: Packet, flow: Flow, case: _Case, known: tuple[Any, ...]) -> Verdict | None:
        """Judge the message at hand."""
        facts, options = flow.facts, self.options
        if data := packet.data:
            case.packets += 1
            case.size += len(data)
        elif known == case.open:
            # A packet without payload adds nothing.
            flow.undecided = True
            return self._answer(packet, options.undecided, "undecided")
        patient = facts.get("dpi", "undecided") == "undecided" and not case.decided
        patient = patient and case.packets <= options.within and case.size <= options.within_bytes
        action, label, is_open = _outcome(case.candidates, facts, patient or flow.midstream, self._default, options.conflict)
        if flow.midstream:
            mode = self.context.midstream
            # What it says now is no proof of what it said first.
            if mode == "drop":
                is_open = _outcome(case.candidates, {}, True, self._default, options.conflict)[2]
            if is_open and mode != "judge":
                return self._unseen(packet, flow, case, mode)
            if not patient:
                action, label, is_open = _outcome(case.candidates, facts, False, self._default, options.conflict)
        if is_open:
            flow.undecided = True
            case.open = known
            return self._answer(packet, options.undecided, "undecided")
        flow.undecided = False
        before = case.action, case.label
        was_decided = case.known is not None
        flow.facts["reason"] = f"{self.name}: {label}"
        case.known, case.action, case.label, case.decided = known, action, label, True
        self._keep(flow, facts)
        if was_decided and action == before[0]:
            return self._verdict(packet, action)
        if was_decided:
            self._say_turned(flow, before, case)
        return self._answer(packet, action, label)

    def _unseen(self, packet: Packet, flow: Flow, case: _Case, action: ActionName) -> Verdict | None:
        """A connection whose beginning was not seen, where a name that is not known would decide."""
        # It may still say one: the kernel is told to keep the verdict only when it has long not done so.
        flow.undecided = case.packets <= self.options.within
        if case.action is None:
            case.action = action
            return self._answer(packet, action, "midstream")
        return self._verdict(packet, action)

    def _keep(self, flow: Flow, facts: Mapping[str, Any]) -> None:
        """Let what a connection said outlive this worker."""
        if self.context.flows is not None and flow.origin.protocol == TCP and not flow.midstream:
            self.context.flows.keep(flow.origin, facts, flow.answered, flow.last)

    def _earlier(self, packet: Packet, flow: Flow, case: _Case, facts: Mapping[str, Any]) -> Verdict | None:
        """The denial of a message that came in the same packet as later ones; None where it may pass."""
        action, label, _ = _outcome(case.candidates, facts, False, self._default, self.options.conflict)
        if action not in ("drop", "reject"):
            return None
        before = case.action, case.label
        flow.facts["reason"] = f"{self.name}: {label}"
        case.known, case.action, case.label = tuple([facts.get(fact) for fact in self._facts]), action, label
        case.decided = case.denied = True
        self._keep(flow, facts)
        if before[0] is not None and before[0] != action:
            self._say_turned(flow, before, case)
        return self._answer(packet, action, label)

    def _candidates(self, packet: Packet, flow: Flow) -> tuple[_Rule, ...]:
        """The rules that the flow's first packet meets, as far as the first that asks for no fact."""
        bits = self._match.bits(packet, flow.origin)
        found = []
        owner: Mapping[str, str] | None = None
        while bits:
            lowest = bits & -bits
            rule = self._rules[lowest.bit_length() - 1]
            bits ^= lowest
            if rule.owned_by:
                owner = self._owner(packet, flow) if owner is None else owner
                if not rule.belongs(owner):
                    continue
            found.append(rule)
            if not rule.facts:
                break
        return tuple(found)

    def _owner(self, packet: Packet, flow: Flow) -> Mapping[str, str]:
        """Who the flow belongs to; nothing where it is not known. The log tells it with the facts."""
        owner = self.context.owners.names(packet)
        flow.facts |= owner
        return owner

    def _verdict(self, packet: Packet, action: ActionName | None) -> Verdict | None:
        if action == "accept":
            return ACCEPT
        if action == "drop":
            return DROP
        return None if action is None else self._reject(packet)

    def _reject(self, packet: Packet) -> Verdict:
        """Drop the packet, and let its sender know."""
        return reject(packet, self._allowance)

    def _answer(self, packet: Packet, action: ActionName | None, label: str) -> Verdict | None:
        if self._explain:
            try:
                five_tuple = packet.headers.five_tuple
                who, fields = str(five_tuple), _fields(five_tuple)
            except PacketError:
                who, fields = "malformed packet", {}
            hook = hook_name(packet.hook)
            outcome = action or "left to the next element"
            fields |= {"hook": hook, "rule": label, "verdict": outcome}
            self._line(packet.time, f"{self.name}: {who} {hook} {outcome} by {label}", **fields)
        return self._verdict(packet, action)

    def _say_turned(self, flow: Flow, before: tuple[ActionName | None, str], case: _Case) -> None:
        assert case.known is not None
        seen = ", ".join(
            f"{fact} {value}" for fact, value in zip(self._facts, case.known, strict=True) if value is not None and fact != "dpi"
        )
        self._warn(
            flow.last,
            f"{self.name}: {flow.origin}: {before[0] or 'no verdict'} by {before[1]} before, "
            f"{case.action or 'no verdict'} by {case.label} from now on; seen: {seen or 'nothing'}",
            level="warning",
            rule=case.label,
            **_fields(flow.origin),
        )


def _rule(number: int, options: RuleOptions) -> _Rule:
    label = f"rule {number}" + (f" ({options.name})" if options.name else "")
    facts = []
    for fact, globs in options.wanted:
        # An allowed name must not let another name in the same message pass.
        every = options.action == "accept" and fact == "dns_name"
        facts.append((fact, Patterns(globs, fact in HOSTS, every)))
    owned_by = tuple((key, Patterns(globs)) for key in OWNED_BY if (globs := getattr(options, key)) is not None)
    return _Rule(label, options.action, tuple(facts), owned_by)


def _outcome(
    candidates: Iterable[_Rule],
    facts: Mapping[str, Any],
    patient: bool,
    default: ActionName | None,
    conflict: ActionName,
) -> tuple[ActionName | None, str, bool]:
    """(action, label, open): what the rules come to with these facts. Not open where all that may still come agrees.

    A rule that asks for a name that a message in conflict hides ends the search: whether it matches is not known.
    """
    possible: list[ActionName] = []
    action, label = default, DEFAULT
    for rule in candidates:
        missing = matches = False
        for fact, patterns in rule.facts:
            value = facts.get(fact)
            if value is None:
                if "conflict" in facts and _hides(facts, fact):
                    return conflict, f"conflict: {facts['conflict']}", False
                missing = True
            elif not patterns.match(value):
                break
        else:
            matches = not missing
            if missing and patient:
                possible.append(rule.action)
        if matches:
            action, label = rule.action, rule.label
            break
    return action, label, any(each != action for each in possible)


def _hides(facts: Mapping[str, Any], fact: str) -> bool:
    """Whether a message in conflict may have a fact: any, where its protocol is not known."""
    protocol, owner = BY_NAME.get(facts.get("protocol", "")), OWNERS.get(fact)
    if protocol is None or owner is None:
        return protocol is None
    return owner is protocol or owner.name in protocol.carries


def _fields(five_tuple: FiveTuple) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "proto": protocol_name(five_tuple.protocol), "src": address(five_tuple.src), "dst": address(five_tuple.dst),
    }  # fmt: skip
    if five_tuple.sport is not None:
        fields |= {"sport": five_tuple.sport, "dport": five_tuple.dport}
    return fields
