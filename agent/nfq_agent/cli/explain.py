"""`explain`: what the configuration would do with a packet: which rule takes it, which element decides, what nearly matched.

Needs no root and no running agent: it asks the policy itself, and reads nothing but the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from nfq_agent.capture.selection import CaptureSelection
from nfq_agent.capture.serving import captures, selection_of
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.given_owner import GivenOwner
from nfq_agent.cli.loading import configuration
from nfq_agent.cli.question import Question
from nfq_agent.cli.show import wrapped
from nfq_agent.cli.taking import behind_redirect, matching, misses, own_uid
from nfq_agent.config.capture import InlineConfig, TapConfig
from nfq_agent.config.models import Config, ElementSpec, QueueConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.context import Context
from nfq_agent.element import Needs, PacketElement
from nfq_agent.elements.policy import Policy
from nfq_agent.flow import Flow
from nfq_agent.geography import Geography
from nfq_agent.host.users import find_user
from nfq_agent.match import PLACES, Conditions, Match
from nfq_agent.packet import Packet
from nfq_agent.patterns import Patterns
from nfq_agent.rules.kernel_policy import names_of, numbers_of, reasons
from nfq_agent.rules.model import chain_name, tag_prefix
from nfq_agent.rules.proxies import table_of
from nfq_agent.service.planned import for_kernel
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

_SHOWN: Final = 3
_BESIDES: Final = "          "
Served = QueueConfig | TapConfig | InlineConfig
# A tap or an inline link: its table, the packet as it sees it, and why it does not take it.
_Capture = tuple[str, TapConfig | InlineConfig, Question, list[str]]


def _line(text: str) -> None:
    wrapped(text, 10)


def explain(flags: Flags, question: Question) -> int:
    """Print what would happen to the packet."""
    config = configuration(flags)
    packet = question.packet()
    _line(f"{packet.headers.five_tuple}, hook {question.hook}" + (f", name {question.name}" if question.name else ""))
    for key in question.not_known:
        _line(f"{_BESIDES}{key} is not known of a packet in hook {question.hook}")
    captured = list(_captures(config, question))
    takers = [each for each in captured if not each[3]]
    # In the order in which the packet passes them: on its way in the links come before the rules, on its way out behind them.
    dropped = _by_captures(config, [each for each in takers if each[2].hook == "prerouting"], "")
    by_rules, dropped = _by_rules(config, question, dropped)
    _by_captures(config, [each for each in takers if each[2].hook == "postrouting"], dropped)
    if not (takers or by_rules):
        _line("Rule:     none takes it: it passes without the agent")
        missed = [(title, missing) for title, _, _, missing in captured]
        missed += [(f"rules.{name}", list(misses(config, name, question))) for name in config.rules]
        for name, missing in sorted((each for each in missed if each[1]), key=lambda each: len(each[1]))[:_SHOWN]:
            _line(f"Nearest:  [{name}]: {'; '.join(missing)}")
    return 0


def _by_captures(config: Config, takers: list[_Capture], dropped: str) -> str:
    """Print what the taps and inline links that take the packet do with it. dropped: see `_by_rules`.

    Returns where it is dropped now.
    """
    for title, table, seen, _ in takers:
        kind = title.partition(".")[0].capitalize() + ":"
        if dropped:
            _line(f"{_BESIDES}[{title}] never sees it: it is dropped {dropped}")
        else:
            _line(f"{kind:<10}[{title}], interface {seen.interface}")
            if _judge(config, table, seen, frozenset()) and isinstance(table, InlineConfig):
                dropped = f"by [{title}]"
    return dropped


def _by_rules(config: Config, question: Question, dropped: str) -> tuple[bool, str]:
    """Print what the rules do with the packet. dropped: where it is dropped before; empty where it is not, as far as is known.

    Returns whether a rule takes it, and where it is dropped now.
    """
    own = find_user(config.agent.user)
    if own_uid(question, None if own is None else own.uid):
        _line(f"Rule:     none takes it: packets of the agent's own user, {config.agent.user}, always pass")
        return True, dropped
    found = matching(config, question)
    for name, table, before, seen in found:
        if dropped:
            _line(f"{_BESIDES}[rules.{name}] matches too, and is not asked: the packet is dropped {dropped}")
        elif before is None:
            if _taken(config, name, table, config.rules[name], seen):
                dropped = f"in table {table}"
        else:
            _line(f"{_BESIDES}[rules.{name}] matches too, and is not asked: [rules.{before}] comes before it in table {table}")
    return bool(found), dropped


def _captures(config: Config, question: Question) -> Iterator[_Capture]:
    """Each tap and inline link: its table, the packet as it sees it, and why it does not take it (nothing if it does)."""
    for title, table in captures(config):
        selection = selection_of(table)
        sides = [(name, hook) for name, hook in ((question.enters, "prerouting"), (question.leaves, "postrouting")) if name]
        chosen = [side for side in sides if selection.chooses(side[0])]
        for interface, hook in chosen:
            seen = replace(question, hook=hook, interface=interface, to_interface="", unit="", exe="", cgroup="")
            yield title, table, seen, list(_port_misses(table, selection, seen))
        if not chosen:
            names = " or ".join(name for name, _ in sides) or "not given"
            yield title, table, question, [f"interface is {names}, wants {', '.join(table.interfaces)}"]


def _port_misses(table: TapConfig | InlineConfig, selection: CaptureSelection, seen: Question) -> Iterator[str]:
    origin = seen.packet().headers.five_tuple
    role = table.role if isinstance(table, InlineConfig) else "both"
    if role != "both":
        # The port of a server behind the interface is the source's on the way in; of one that is asked from there, the other's.
        asked = origin.sport if (role == "server") == (seen.hook == "prerouting") else origin.dport
        origin = origin._replace(sport=asked, dport=asked)
    if not selection.takes(origin):
        wanted = [f"{kind} {each}" for kind in ("tcp", "udp") for each in getattr(table, f"{kind}_ports")]
        found = f"{seen.sport} or {seen.dport}" if role == "both" else str(origin.dport)
        yield f"port is {seen.protocol} {found}, wants {', '.join(wanted)}"


def _taken(config: Config, name: str, table: str, rule: RuleConfig, question: Question) -> bool:
    """Print what happens to the packet; returns whether it is dropped for certain."""
    if rule.proxy is not None:
        proxy = config.proxy[rule.proxy]
        _line(f"Rule:     [rules.{name}], table {table} -> proxy {rule.proxy} on {', '.join(map(str, proxy.listen))}")
        _line(f"Chain:    {', '.join(proxy.elements) or 'no elements'}; the bytes of the connection decide")
        led = behind_redirect(config, name, question)
        if led is not question and any(table_of(config, each) == "filter" for each in config.rules.values()):
            _line(f"{_BESIDES}table filter sees it as {led.packet().headers.five_tuple}")
        return False
    assert rule.queue is not None
    queue = config.queue[rule.queue]
    numbers = f"{queue.numbers[0]}" if len(queue.numbers) == 1 else f"{queue.numbers[0]} to {queue.numbers[-1]}"
    _line(f"Rule:     [rules.{name}], table {table} -> queue {rule.queue}, number {numbers}")
    return _judge(
        config, queue, question, _in_kernel(config, rule, question), only_first=rule.tcp_syn and question.protocol == "tcp"
    )


def _in_kernel(config: Config, rule: RuleConfig, question: Question) -> frozenset[str]:
    """What decides in front of the queue where the backend takes lists (`compile`), as ELEMENT: RULE."""
    if config.agent.backend == "legacy":
        return frozenset()
    table = for_kernel(config, config.agent.user, lists=True)["inet" if question.version == 4 else "inet6"][rule.table_name]
    by_tag = reasons(config)
    prefix = tag_prefix(config.agent.instance)
    rules = table.chains[chain_name(config.agent.instance, question.hook)]
    names = [name for each in rules for name in names_of(each.tag.removeprefix(prefix), numbers_of(each))]
    found = (by_tag[name] for name in names if name in by_tag)
    return frozenset(f"{element}: {label}" for queue, element, label in found if queue == rule.queue)


def _judge(config: Config, table: Served, question: Question, in_kernel: frozenset[str], only_first: bool = False) -> bool:
    """Print what the elements do with the packet. only_first: the queue gets the first packet of a connection alone.

    Returns whether it is dropped for certain: by a policy, or by default, that no other element comes before.
    """
    _line(f"Chain:    {', '.join(table.elements) or 'no elements'}")
    packet = question.packet()
    flow = Flow(packet.headers.five_tuple, 1.0, 1.0)
    specs = config.packet_elements(table)
    finds = any(spec.name == "dpi" or is_dpi(spec) for spec in specs)
    policies = [_Asked(spec, question) for spec in specs if issubclass(spec.cls, Policy)]
    not_asked = [
        spec
        for spec in specs
        if not issubclass(spec.cls, Policy) and spec.cls.decide is not PacketElement.decide and not is_dpi(spec)
    ]
    for spec in not_asked:
        _line(f"{_BESIDES}{spec.name}: not asked; its answer depends on more than this packet")

    def tell(title: str, verdict: Verdict | None, by: str) -> None:
        _line(f"{title:<10}{_outcome(table, verdict)}" + (f" ({by})" if by else f" ({_default_of(table)})"))

    verdict, by = _decide(policies, packet, flow)
    tell("At first:", verdict, by)
    decider = next((place for place, spec in enumerate(specs) if by.startswith(f"{spec.name}: ")), len(specs))
    surely = _outcome(table, verdict) in ("drop", "reject") and not any(spec in not_asked for spec in specs[:decider])
    if by in in_kernel:
        where = "" if config.agent.backend == "owned" else ", where the backend is owned"
        first = isinstance(table, QueueConfig) and table.compile_mode == "first"
        behind = "; of each flow the first packet goes to the queue" if first else ""
        _line(f"{_BESIDES}a rule of the kernel decides it, in front of the queue{where}{behind}")
    if any(each.element.needs is Needs.FLOW for each in policies) and (question.name or flow.undecided):
        if only_first:
            _line(f"{_BESIDES}the rule takes the first packet of a connection alone (tcp_syn): its name is never seen")
        elif not finds:
            _line(f"{_BESIDES}no dpi in the chain: the name is never found")
        else:
            wanted = {fact for each in policies for fact in Policy.facts_of(each.options)}
            flow.facts.update(question.facts(wanted) if question.name else {"dpi": "decided"})
            tell("By name:" if question.name else "No name:", *_decide(policies, question.packet(b"data"), flow))
    for asked in policies:
        for line in asked.nearest(packet, flow):
            _line(f"Nearest:  {line}")
    return surely


def is_dpi(spec: ElementSpec) -> bool:
    """Whether it is the element that finds names, whatever name the configuration gives it."""
    return "dpi" in spec.cls.keeps_facts


def _default_of(table: Served) -> str:
    return "default of the queue" if isinstance(table, QueueConfig) else "default"


def _outcome(table: Served, verdict: Verdict | None) -> str:
    chosen = verdict or {"accept": ACCEPT, "drop": DROP}[getattr(table, "default", "accept")]
    if chosen.action is Action.DROP and isinstance(table, TapConfig):
        return "would drop; a tap only watches"
    if chosen.action is Action.DROP and getattr(table, "mode", "enforce") == "monitor":
        return "would drop; monitor mode accepts it"
    return chosen.action.name.lower()


class _Asked:
    """A policy of the chain, and the rule of its last decision."""

    def __init__(self, spec: ElementSpec, question: Question) -> None:
        self.rule = ""
        self._owner = question.owner
        self._name_of = question.interface_name
        self.element = Policy(spec.name, spec.options.model_copy(update={"explain": True}), self._emit)
        self.element.name_interfaces(self._name_of)
        self.element.context = Context(owners=GivenOwner(self._owner))
        self.options: Any = spec.options

    def _emit(self, message: str, level: str = "info", **fields: Any) -> None:
        del message, level
        self.rule = f"{self.element.name}: {fields.get('rule', '')}"

    def nearest(self, packet: Packet, flow: Flow) -> Iterator[str]:
        """The rules that did not match, with the conditions that failed; the closest first."""
        misses: dict[int, tuple[int, int, str | None, list[str]]] = {}
        for number, rule in self.options.numbered:
            missing = [*_unmet(rule, packet, flow, self.options.geo, self._name_of), *_unowned(rule, self._owner)]
            # The rule that matched, or the closest one, of those that one filter makes.
            misses[number] = min(
                misses.get(number, (99, number, None, [])), (len(missing), number, rule.name, missing), key=lambda each: each[0]
            )
        for _, number, name, missing in sorted((each for each in misses.values() if each[3]), key=lambda each: each[:2])[:_SHOWN]:
            yield f"{self.element.name}: rule {number}{f' ({name})' if name else ''}: {'; '.join(missing)}"


def _unmet(rule: Any, packet: Packet, flow: Flow, geography: Geography | None, name_of: Callable[[int], str]) -> Iterator[str]:
    for key in Conditions.model_fields:
        value = getattr(rule, key)
        if value is None or (key == "protocol" and rule.applications):
            continue
        alone = Conditions.model_construct(**{key: value})
        if not Match([alone], name_of, geography).bits(packet, flow.origin):
            yield _place(key, flow, geography) if geography and key in PLACES else f"{key} is not {_few(value)}"
    for fact, globs in rule.wanted:
        found = flow.facts.get(fact)
        if found is None:
            yield f"{fact} is not known, wants {_few(globs)}"
        elif not Patterns(globs, caseless=True).match(found):
            yield f"{fact} is {found}, wants {_few(globs)}"


def _unowned(rule: Any, owner: Mapping[str, str]) -> Iterator[str]:
    for key, globs in rule.owned_by:
        if not (key in owner and Patterns(globs).match(owner[key])):
            yield f"{key} is {owner.get(key, 'not given')}, wants {_few(globs)}"


def _place(key: str, flow: Flow, geography: Geography) -> str:
    end, _, kind = key.partition("_")
    found = getattr(geography.whereabouts(getattr(flow.origin, end)), kind)
    return f"{key} is {'not known' if found is None else found}"


def _few(values: Any) -> str:
    if not isinstance(values, tuple):
        return str(values)
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(map(str, values[:3])) + more


def _decide(policies: list[_Asked], packet: Packet, flow: Flow) -> tuple[Verdict | None, str]:
    for asked in policies:
        if (verdict := asked.element.decide(packet, flow if asked.element.needs is Needs.FLOW else None)) is not None:
            return verdict, asked.rule
    return None, ""
