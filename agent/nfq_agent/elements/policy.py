"""`policy`: ordered rules on the headers of a packet and on the facts of its flow; the first that matches decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.elements.interface_names import name_lookup
from nfq_agent.facts import ends
from nfq_agent.flow import NAME_FACTS, Exchange, Flow, Watch
from nfq_agent.foresight import BEGUN_BYTES, BEGUN_PACKETS, Foreseen
from nfq_agent.link_local import needed_by_link
from nfq_agent.match import Match
from nfq_agent.packet import TCP, FiveTuple, Packet, PacketError, hook_name
from nfq_agent.patterns import Patterns
from nfq_agent.policy_case import PolicyCase, begins_again, renewed, taken_over, turned
from nfq_agent.policy_memory import begun, keep, keep_unfinished, name_destination
from nfq_agent.policy_options import PolicyOptions
from nfq_agent.policy_rule import (
    BY_LINK,
    CLAIMS,
    CONFLICT,
    DST_NAME,
    MIDSTREAM,
    VERIFIED,
    ActionName,
    PolicyRule,
    default_label,
    outcome,
    policy_rule,
    rule_label,
)
from nfq_agent.reject import Allowance, reject
from nfq_agent.verdict import ACCEPT, DROP, Verdict

# For conditions that read none.
NO_PACKET: Final = Packet(b"")
# Names kept as proven for one connection.
_VERIFIED_NAMES: Final = 16


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
        self._rules = tuple(
            policy_rule(number, rule.name, rule.action, rule.wanted, rule.owned_by, rule.verify is not None)
            for number, rule in options.numbered
        )
        asked = {fact for rule in self._rules for fact, _ in rule.facts}
        self._asks_names, self._by_flow = DST_NAME in asked, self.needs is Needs.FLOW
        self._by_owner = self.reads_owner_of(options)
        # Whether all facts are there and readable is a part of the outcome's key.
        self._facts = self.facts_read = tuple(sorted(asked | {"dpi", "conflict"})) if asked else ()
        self._match = Match(options.rules, name_lookup(), options.geo)
        self._explain, self._default, self._otherwise = options.explain, options.default, default_label(options.default)
        self._allowance, self._closed = Allowance(), options.default in ("drop", "reject")
        self.reads_process = self._match.by_process
        self.patience = options.within, options.within_bytes
        self.questions_fit = None not in [p.plain for rule in self._rules for fact, p in rule.facts if fact == NAME_FACTS["dns"]]
        # A refusal answers this one packet.
        self.pure = not (self._by_flow or options.explain or self._match.by_process or self.injects_of(options))

    def name_interfaces(self, name_of: Callable[[int], str]) -> None:
        """Ask this for the names of interfaces, and not the kernel: for packets that are not of this host."""
        self._match = Match(self.options.rules, name_of, self.options.geo)

    @classmethod
    def logs_drops_of(cls, options: PolicyOptions) -> Literal["all", "own", "none"]:
        """Its own with `explain`."""
        return "own" if options.explain else "none"

    @classmethod
    def needs_of(cls, options: PolicyOptions) -> Needs:
        """The headers; the flow where a rule names a fact or an owner."""
        by_flow = cls.reads_owner_of(options) or any(rule.wanted for rule in options.rules)
        return Needs.FLOW if by_flow else Needs.HEADERS

    @classmethod
    def reads_owner_of(cls, options: PolicyOptions) -> bool:
        """True where a rule names a unit, a container, a control group or a program."""
        return any(rule.owned_by for rule in options.rules)

    @classmethod
    def reads_program_of(cls, options: PolicyOptions) -> bool:
        """True where a rule names a program."""
        return any(rule.exe is not None for rule in options.rules)

    @classmethod
    def keeps_flows_of(cls, options: PolicyOptions) -> bool:
        """Where a rule names a fact."""
        return any(rule.wanted for rule in options.rules)

    @classmethod
    def denies_of(cls, options: PolicyOptions) -> bool:
        """True if anything is dropped or rejected."""
        return {"drop", "reject"} & {options.default, *(rule.action for rule in options.rules)} != set()

    @classmethod
    def injects_of(cls, options: PolicyOptions) -> bool:
        """True if anything is rejected."""
        return "reject" in (options.default, options.undecided, options.conflict, *(rule.action for rule in options.rules))

    @classmethod
    def facts_of(cls, options: PolicyOptions) -> tuple[str, ...]:
        """The facts that its rules name."""
        return tuple(dict.fromkeys(fact for rule in options.rules for fact, _ in rule.wanted if fact != DST_NAME))

    @classmethod
    def names_of(cls, options: PolicyOptions) -> tuple[str, ...]:
        """The names for which DNS answers have to show addresses."""
        names: list[str] = []
        for rule in options.rules:
            names += rule.dst_name or ()
            if rule.verify is not None:
                names += [name for fact, globs in rule.wanted if fact in CLAIMS for name in globs]
        return tuple(dict.fromkeys(names))

    @classmethod
    def rules_of(cls, options: PolicyOptions) -> tuple[str, ...]:
        """Its rules, its default, and what decides in place of a rule."""
        rules = (rule_label(number, rule.name) for number, rule in options.numbered)
        return (*dict.fromkeys(rules), default_label(options.default), CONFLICT, MIDSTREAM, BY_LINK)

    @classmethod
    def reads_process_of(cls, options: PolicyOptions) -> bool:
        """True where a rule names a uid or gid."""
        return any(rule.uid is not None or rule.gid is not None for rule in options.rules)

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """The action of the first rule that matches, else the default's."""
        if self._closed and self._leaves_to_link(packet):
            self._count(BY_LINK)
            return ACCEPT
        if flow is not None and self._by_flow:
            return self._decide_flow(packet, flow)
        found = self._by_headers(packet)
        action, label = (self._default, self._otherwise) if found is None else (found.action, found.label)
        self._count(label)
        return self._answer(packet, action, label)

    def _by_headers(self, packet: Packet) -> PolicyRule | None:
        """The first rule that this packet matches by its headers alone."""
        bits = self._match.bits(packet, packet.headers.five_tuple)
        while bits:
            lowest = bits & -bits
            rule = self._rules[lowest.bit_length() - 1]
            if not (rule.facts or rule.owned_by):
                return rule
            # A packet without a flow has no facts.
            bits ^= lowest
        return None

    def rule(self, packet: Packet, flow: Flow | None) -> str:
        """The label of the rule that decided: its number, with its name if it has one."""
        if flow is not None and self._by_flow:
            case: PolicyCase | None = flow.state.get(self)
            if case is None or not case.label:
                return MIDSTREAM if flow.midstream else "undecided"
            return "undecided" if flow.undecided else case.label
        if self._closed and self._leaves_to_link(packet):
            return BY_LINK
        return self._otherwise if (found := self._by_headers(packet)) is None else found.label

    def watches(self, flow: Flow) -> int:
        """While the outcome is open, the packets that count towards `within`; none where it follows from the facts."""
        case: PolicyCase | None = flow.state.get(self)
        if case is None or not self._facts or self._explain:
            return Watch.ALL
        judged = case.denied or case.decided
        # A refusal answers one particular packet.
        if (case.action if judged else self.options.undecided) == "reject":
            return Watch.ALL
        return Watch.NOTHING if judged else Watch.DATA

    def parts_read(self) -> tuple[str, ...] | None:
        """The fields that its conditions read, if they read nothing else: no other header, no owner, no proof, no time."""
        by_more = self._asks_names or self._by_owner or any(rule.verify for rule in self._rules)
        if not self._facts or self._explain or by_more:
            return None
        return self._match.parts

    def patterns_read(self) -> Sequence[Patterns]:
        """The patterns of its rules, if they tell names apart."""
        named = (*CLAIMS, NAME_FACTS["dns"]) if self.questions_fit else CLAIMS
        return [patterns for rule in self._rules for fact, patterns in rule.facts if fact in named]

    def foresee(self, origin: FiveTuple, facts: Mapping[str, Any]) -> Foreseen:
        """The outcome of its rules, as far as they match the five-tuple."""
        candidates = self._candidates(NO_PACKET, origin)
        is_patient = facts["dpi"] == "undecided"
        action, label, is_open = outcome(candidates, facts, is_patient, self._default, self.options.conflict)
        kept = begun(facts) if is_open and "protocol" in facts else None
        if is_open:
            action = self.options.undecided
        if kept is not None and (self.options.within < BEGUN_PACKETS or self.options.within_bytes < BEGUN_BYTES):
            action = None
        verdict = ACCEPT if action == "accept" else None if action is None else DROP
        return Foreseen(verdict, is_open, f"{self.name}: {label}", kept)

    def adopt(self, flow: Flow) -> None:
        """Judge the first message of a flow that was accepted for it, or take over the part of it that has come, if any."""
        opening = flow.opening
        if opening is None or not (opening.protocol or isinstance(opening, Exchange)):
            return
        case = flow.state[self] = taken_over(opening, self._candidates(NO_PACKET, flow.origin), self.context.flows is not None)
        known = tuple([flow.facts.get(fact) for fact in self._facts])
        action, label, flow.undecided = self._outcome(flow, case, flow.facts, flow.facts["dpi"] == "undecided")
        if flow.undecided:
            case.open = known
        else:
            flow.facts["reason"] = f"{self.name}: {label}"
            case.action, case.label, case.known, case.decided = action, label, known, True

    def _leaves_to_link(self, packet: Packet) -> bool:
        """Whether the default does not apply: the link needs the packet, and no rule decides by its headers alone."""
        if not needed_by_link(packet):
            return False
        bits = self._match.bits(packet, packet.headers.five_tuple)
        return not any(bits >> place & 1 and not (rule.facts or rule.owned_by) for place, rule in enumerate(self._rules))

    def _decide_flow(self, packet: Packet, flow: Flow) -> Verdict | None:
        facts = flow.facts
        case: PolicyCase | None = flow.state.get(self)
        if case is None:
            if self._asks_names:
                name_destination(self.context, flow)
            case = flow.state[self] = PolicyCase(self._candidates(packet, flow.origin, flow), hooks={flow.origin: packet.hook})
        elif self._by_owner and begins_again(packet, flow, case, bool(self._facts) or self.context.monitor):
            case = flow.state[self] = renewed(case, self._candidates(packet, packet.headers.five_tuple, flow))
        if case.denied:
            return self._verdict(packet, case.action)
        if flow.ahead or flow.unsound:
            # It comes again, behind what has to be read first; or its receiver discards it. A reset would end a connection that
            # may be allowed.
            return ACCEPT if self.context.copies and flow.origin.protocol == TCP else DROP
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
            case.message, case.packets, case.size = flow.message, 0, 0
            case.decided = case.kept = False
            case.open = None
        return self._judge(packet, flow, case, known)

    def _judge(self, packet: Packet, flow: Flow, case: PolicyCase, known: tuple[Any, ...]) -> Verdict | None:
        """Judge the current message."""
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
        action, label, is_open = self._outcome(flow, case, facts, patient or flow.midstream)
        if flow.midstream:
            mode = self.context.midstream
            # What it says now does not prove its first claim.
            if mode == "drop":
                is_open = self._outcome(flow, case, {DST_NAME: facts.get(DST_NAME)}, patient=True)[2]
            if is_open and mode != "judge":
                return self._unseen(packet, flow, case, mode)
            if not patient:
                action, label, is_open = self._outcome(flow, case, facts, patient=False)
        if is_open:
            flow.undecided = True
            if data and not case.kept and options.undecided == "accept":
                case.kept = keep_unfinished(self.context.flows, packet, flow)
            case.open = known
            return self._answer(packet, options.undecided, "undecided")
        flow.undecided = False
        self._count(label)
        before = case.action, case.label
        was_decided = case.known is not None
        flow.facts["reason"] = f"{self.name}: {label}"
        case.known, case.action, case.label, case.decided = known, action, label, True
        keep(self.context.flows, flow, facts)
        if was_decided and action == before[0]:
            return self._verdict(packet, action)
        if was_decided:
            self._say_turned(flow, before, case)
        return self._answer(packet, action, label)

    def _outcome(
        self, flow: Flow, case: PolicyCase, facts: Mapping[str, Any], patient: bool
    ) -> tuple[ActionName | None, str, bool]:
        verified: dict[str, None] = {}

        def proven(name: str) -> bool:
            """Whether a DNS answer gave the destination's address for this name, now or when the connection first claimed it."""
            names = self.context.names
            before = name in flow.facts.get(VERIFIED, ())
            if before or (names is not None and names.gave(name, flow.origin.dst, flow.last)):
                verified[name] = None
                return True
            return False

        found = outcome(case.candidates, facts, patient, self._default, self.options.conflict, proven)
        if verified and not set(verified) <= set(flow.facts.get(VERIFIED, ())):
            flow.facts[VERIFIED] = (*flow.facts.get(VERIFIED, ()), *verified)[-_VERIFIED_NAMES:]
        return found

    def _unseen(self, packet: Packet, flow: Flow, case: PolicyCase, action: ActionName) -> Verdict | None:
        """A connection whose beginning was not seen, where a name that is not known would decide."""
        # It may still show a name: the kernel keeps the verdict only after a long time without one.
        flow.undecided = case.packets <= self.options.within
        if case.action is None:
            case.action = action
            self._count(MIDSTREAM)
            return self._answer(packet, action, MIDSTREAM)
        return self._verdict(packet, action)

    def _earlier(self, packet: Packet, flow: Flow, case: PolicyCase, facts: Mapping[str, Any]) -> Verdict | None:
        """The denial of a message that came in the same packet as later ones; None where it may pass."""
        action, label, _ = self._outcome(flow, case, facts, patient=False)
        if action not in ("drop", "reject"):
            return None
        self._count(label)
        before = case.action, case.label
        flow.facts["reason"] = f"{self.name}: {label}"
        case.known, case.action, case.label = tuple([facts.get(fact) for fact in self._facts]), action, label
        case.decided = case.denied = True
        keep(self.context.flows, flow, facts)
        if before[0] is not None and before[0] != action:
            self._say_turned(flow, before, case)
        return self._answer(packet, action, label)

    def _candidates(self, packet: Packet, origin: FiveTuple, flow: Flow | None = None) -> tuple[PolicyRule, ...]:
        """The rules that the flow's first packet meets, as far as the first that asks for no fact. flow: for its owner."""
        bits = self._match.bits(packet, origin)
        found = []
        owner: Mapping[str, str] | None = None
        while bits:
            lowest = bits & -bits
            rule = self._rules[lowest.bit_length() - 1]
            bits ^= lowest
            if rule.owned_by and flow is not None:
                owner = self._owner(packet, flow) if owner is None else owner
                if not rule.belongs(owner):
                    continue
            found.append(rule)
            if not rule.facts:
                break
        return tuple(found)

    def _owner(self, packet: Packet, flow: Flow) -> Mapping[str, Any]:
        """The owner of the flow; empty where it is not known. The log shows it with the facts."""
        owner = self.context.owners.names(packet)
        flow.facts |= owner
        return owner

    def _count(self, label: str) -> None:
        """Count a decision. The text of a message in conflict is not part of the counter's name."""
        self.context.decisions.count(self.name, CONFLICT if label.startswith(f"{CONFLICT}:") else label)

    def _verdict(self, packet: Packet, action: ActionName | None) -> Verdict | None:
        if action == "accept":
            return ACCEPT
        if action == "drop":
            return DROP
        return None if action is None else reject(packet, self._allowance)

    def _answer(self, packet: Packet, action: ActionName | None, label: str) -> Verdict | None:
        if self._explain:
            try:
                five_tuple = packet.headers.five_tuple
                who, fields = str(five_tuple), ends(five_tuple)
            except PacketError:
                who, fields = "malformed packet", {}
            hook = hook_name(packet.hook)
            outcome = action or "left to the next element"
            fields |= {"hook": hook, "rule": label, "verdict": outcome}
            self.emit(f"{self.name}: {who} {hook} {outcome} by {label}", **fields)
        return self._verdict(packet, action)

    def _say_turned(self, flow: Flow, before: tuple[ActionName | None, str], case: PolicyCase) -> None:
        what = turned(before, case, self._facts)
        self.emit(f"{self.name}: {flow.origin}: {what}", level="warning", rule=case.label, **ends(flow.origin))
