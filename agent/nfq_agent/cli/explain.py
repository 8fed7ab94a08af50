"""`explain`: what the configuration would do with a packet: which rule takes it, which element decides, what nearly matched.

Needs no root and no running agent: it asks the policy itself, and reads nothing but the configuration.
"""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nfq_agent.cli.flags import Flags
from nfq_agent.cli.loading import configuration
from nfq_agent.cli.show import wrapped
from nfq_agent.config.models import Config, ElementSpec, QueueConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.config.selection import Identities
from nfq_agent.context import Context
from nfq_agent.element import Needs, PacketElement
from nfq_agent.elements.policy import Policy
from nfq_agent.flow import Flow
from nfq_agent.geography import Geography
from nfq_agent.match import PLACES, Conditions, Match
from nfq_agent.owner import Owners
from nfq_agent.packet import PROTOCOL_NAMES, Hook, Packet, protocol_name
from nfq_agent.patterns import Patterns
from nfq_agent.policy_options import OWNED_BY
from nfq_agent.rules.kernel_policy import names_of, numbers_of, reasons
from nfq_agent.rules.model import chain_name, tag_prefix
from nfq_agent.rules.plan import plan
from nfq_agent.testing import icmp, tcp, udp
from nfq_agent.values import Endpoint
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

_INWARD: Final = ("prerouting", "input")
_SHOWN: Final = 3
_PROTOCOLS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
# The facts that hold a name, by protocol and port.
_NAMES: Final[Mapping[tuple[str, int], tuple[str, str]]] = {
    ("tcp", 80): ("http", "http_host"), ("udp", 53): ("dns", "dns_name"), ("tcp", 53): ("dns", "dns_name"),
    ("udp", 443): ("quic", "tls_sni"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """The packet of the question. source, destination: ADDRESS:PORT; without ports for icmp. name: in its first bytes."""

    protocol: str
    source: str
    destination: str
    name: str = ""
    hook: str = "output"
    interface: str = ""
    uid: int | None = None
    unit: str = ""
    container: str = ""
    exe: str = ""

    @property
    def owner(self) -> dict[str, str]:
        """The owner of the socket, as far as it is given."""
        known = {"unit": self.unit, "container": self.container, "exe": self.exe}
        return {key: value for key, value in known.items() if value}

    @property
    def version(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self._ends[1][0]).version

    def check(self) -> None:
        """Raises ValueError if an end is not an address and a port, or if the two are not of one family."""
        if self.source_address.version != self.version:
            raise ValueError(
                f"{self.source} and {self.destination} are of different families; allowed: two of IPv4, or two of IPv6"
            )

    @property
    def _ends(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return self._end(self.source), self._end(self.destination)

    def _end(self, text: str) -> tuple[str, int]:
        host, port = text, 0
        try:
            if self.protocol != "icmp":
                end = Endpoint.parse(text, lowest=0)
                host, port = end.host, end.port
            ipaddress.ip_address(host)
        except ValueError:
            what = "an address" if self.protocol == "icmp" else "an address with a port"
            examples = ("192.0.2.1", "2001:db8::1") if self.protocol == "icmp" else ("192.0.2.1:443", "[2001:db8::1]:443")
            raise ValueError(f"{text!r} is not {what}; allowed: one as {examples[0]} or {examples[1]}") from None
        return host, port

    @property
    def source_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The source."""
        return ipaddress.ip_address(self._ends[0][0])

    @property
    def destination_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The destination."""
        return ipaddress.ip_address(self._ends[1][0])

    @property
    def sport(self) -> int:
        """Source port."""
        return self._ends[0][1]

    @property
    def dport(self) -> int:
        """Destination port."""
        return self._ends[1][1]

    def packet(self, data: bytes = b"") -> Packet:
        """The first packet of the flow, or one with data."""
        shown: dict[str, Any] = {"hook": Hook[self.hook.upper()], "uid": self.uid, "time": 1.0}
        if self.protocol == "icmp":
            return icmp(self.source, self.destination, **shown)
        if self.protocol == "udp":
            return udp(self.source, self.destination, data, **shown)
        return tcp(self.source, self.destination, data, flags="PA" if data else "S", **shown)

    def facts(self, asked: Iterable[str]) -> dict[str, Any]:
        """What `dpi` would find. asked: the facts that the rules ask for; they decide on a port without a known protocol."""
        protocol, fact = _NAMES.get((self.protocol, self.dport)) or next(
            (each for each in _NAMES.values() if each[1] in asked and self.dport != 443), ("tls", "tls_sni")
        )
        value: Any = (self.name,) if fact == "dns_name" else self.name
        return {"dpi": "decided", "protocol": protocol, fact: value}


def _line(text: str) -> None:
    wrapped(text, 10)


def explain(flags: Flags, question: Question) -> int:
    """Print what would happen to the packet."""
    config = configuration(flags)
    packet = question.packet()
    _line(f"{packet.headers.five_tuple}, hook {question.hook}" + (f", name {question.name}" if question.name else ""))
    missed = {name: list(misses(rule, question)) for name, rule in config.rules.items()}
    taken = [name for name, missing in missed.items() if not missing]
    for name in taken:
        _taken(config, name, config.rules[name], question)
    if not taken:
        _line("Rule:     none takes it: it passes without the agent")
    nearest = sorted((name for name in missed if missed[name]), key=lambda name: len(missed[name]))
    for name in nearest[: 0 if taken else _SHOWN]:
        _line(f"Nearest:  [rules.{name}]: {'; '.join(missed[name])}")
    return 0


def misses(rule: RuleConfig, question: Question) -> Iterator[str]:
    """The reasons why a rule does not take the packet; none if it does."""
    family = "inet" if question.version == 4 else "inet6"
    if family not in rule.families:
        yield f"family is {family}, wants {rule.family}"
    if question.hook not in rule.hooks:
        yield f"hook is {question.hook}, wants {', '.join(rule.hooks)}"
    if not rule.all:
        yield from _port_misses(rule, question)
    excepted = {"tcp": rule.not_tcp_ports, "udp": rule.not_udp_ports}.get(question.protocol, ())
    if any(port in each for port in _ports(rule, question) for each in excepted):
        yield f"port is in not_{question.protocol}_ports"
    if rule.owner is not None and question.uid != rule.owner_id:
        yield f"uid is {'not given' if question.uid is None else question.uid}, wants {rule.owner}"
    if rule.uid is not None and not _one_of(question.uid, rule.uid):
        yield f"uid is {'not given' if question.uid is None else question.uid}, wants {', '.join(map(str, rule.uid))}"
    if rule.not_uid is not None and _one_of(question.uid, rule.not_uid):
        yield f"uid is {question.uid}, which is in not_uid"
    if rule.interface is not None and not _named(question.interface, rule.interface):
        yield f"interface is {question.interface or 'not given'}, wants {', '.join(rule.interface)}"
    if rule.not_interface is not None and _named(question.interface, rule.not_interface):
        yield f"interface is {question.interface}, which is in not_interface"
    yield from _address_misses(rule, question)
    for key in ("gid", "cgroup", "set"):
        if (wanted := getattr(rule, key)) is not None:
            yield f"{key} is not known here, wants {', '.join(map(str, wanted))}"
    if rule.mark is not None:
        yield f"mark is 0x0, wants {rule.mark}"


def _port_misses(rule: RuleConfig, question: Question) -> Iterator[str]:
    ports = {"tcp": rule.tcp_ports, "udp": rule.udp_ports}.get(question.protocol, ())
    if rule.protocol is not None:
        if _PROTOCOLS.get(question.protocol) not in rule.protocol:
            yield f"protocol is {question.protocol}, wants {', '.join(map(protocol_name, rule.protocol))}"
    elif rule.tcp_syn and question.protocol == "tcp" and not ports:
        return
    elif not ports:
        yield f"protocol is {question.protocol}, wants {' or '.join(_protocols(rule))}"
    elif not any(port in each for port in _ports(rule, question) for each in ports):
        yield f"port is {' or '.join(map(str, _ports(rule, question)))}, wants {', '.join(map(str, ports))}"


def _address_misses(rule: RuleConfig, question: Question) -> Iterator[str]:
    for key, end in (("src", question.source_address), ("dst", question.destination_address)):
        wanted, excepted = getattr(rule, key), getattr(rule, f"not_{key}")
        if wanted is not None and not any(end in each for each in wanted):
            yield f"{key} is {end}, wants {', '.join(map(str, wanted))}"
        if any(end in each for each in excepted or ()):
            yield f"{key} is {end}, which is in not_{key}"


def _one_of(number: int | None, wanted: tuple[Identities, ...]) -> bool:
    return number is not None and any(each.first <= number <= each.last for each in wanted)


def _named(interface: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(interface, pattern) for pattern in patterns)


def _protocols(rule: RuleConfig) -> list[str]:
    return ["tcp"] * bool(rule.tcp_ports or rule.tcp_syn) + ["udp"] * bool(rule.udp_ports)


def _ports(rule: RuleConfig, question: Question) -> tuple[int, ...]:
    """The ports that a rule looks at, as the plan of the rules chooses them."""
    if rule.proxy is not None or rule.tcp_syn:
        return (question.dport,)
    if rule.role in (None, "both") or question.hook == "forward":
        return (question.dport, question.sport)
    return (question.dport if (rule.role == "server") == (question.hook in _INWARD) else question.sport,)


def _taken(config: Config, name: str, rule: RuleConfig, question: Question) -> None:
    if rule.proxy is not None:
        proxy = config.proxy[rule.proxy]
        _line(f"Rule:     [rules.{name}], table {rule.table_name} -> proxy {rule.proxy} on {', '.join(map(str, proxy.listen))}")
        _line(f"Chain:    {', '.join(proxy.elements) or 'no elements'}; the bytes of the connection decide")
        return
    assert rule.queue is not None
    queue = config.queue[rule.queue]
    numbers = f"{queue.numbers[0]}" if len(queue.numbers) == 1 else f"{queue.numbers[0]} to {queue.numbers[-1]}"
    _line(f"Rule:     [rules.{name}], table {rule.table_name} -> queue {rule.queue}, number {numbers}")
    _line(f"Chain:    {', '.join(queue.elements) or 'no elements'}")
    _judge(config, queue, question, _in_kernel(config, rule, question))


def _in_kernel(config: Config, rule: RuleConfig, question: Question) -> frozenset[str]:
    """What decides in front of the queue where the backend takes lists (`compile`), as ELEMENT: RULE."""
    if config.agent.backend == "legacy":
        return frozenset()
    table = plan(config, config.agent.user, lists=True)["inet" if question.version == 4 else "inet6"][rule.table_name]
    by_tag = reasons(config)
    prefix = tag_prefix(config.agent.instance)
    rules = table.chains[chain_name(config.agent.instance, question.hook)]
    names = [name for each in rules for name in names_of(each.tag.removeprefix(prefix), numbers_of(each))]
    found = (by_tag[name] for name in names if name in by_tag)
    return frozenset(f"{element}: {label}" for queue, element, label in found if queue == rule.queue)


def _judge(config: Config, queue: QueueConfig, question: Question, in_kernel: frozenset[str]) -> None:
    packet = question.packet()
    flow = Flow(packet.headers.five_tuple, 1.0, 1.0)
    specs = config.packet_elements(queue)
    finds = any(spec.name == "dpi" or is_dpi(spec) for spec in specs)
    policies = [_Asked(spec, question.owner) for spec in specs if issubclass(spec.cls, Policy)]
    for spec in specs:
        if not issubclass(spec.cls, Policy) and spec.cls.decide is not PacketElement.decide and not is_dpi(spec):
            _line(f"          {spec.name}: not asked; its answer depends on more than this packet")
    verdict, by = _decide(policies, packet, flow)
    _line(f"At first: {_outcome(queue, verdict)}" + (f" ({by})" if by else " (default of the queue)"))
    if by in in_kernel:
        where = "" if config.agent.backend == "owned" else ", where the backend is owned"
        behind = "; of each flow the first packet goes to the queue" if queue.compile_mode == "first" else ""
        _line(f"          a rule of the kernel decides it, in front of the queue{where}{behind}")
    if question.name and any(each.element.needs is Needs.FLOW for each in policies):
        if not finds:
            _line("          no dpi in the chain: the name is never found")
        else:
            wanted = {fact for each in policies for fact in Policy.facts_of(each.options)}
            flow.facts.update(question.facts(wanted))
            verdict, by = _decide(policies, question.packet(b"data"), flow)
            _line(f"By name:  {_outcome(queue, verdict)}" + (f" ({by})" if by else " (default of the queue)"))
    for asked in policies:
        for line in asked.nearest(packet, flow):
            _line(f"Nearest:  {line}")


def is_dpi(spec: ElementSpec) -> bool:
    """Whether it is the element that finds names, whatever name the configuration gives it."""
    return "dpi" in spec.cls.keeps_facts


def _outcome(queue: QueueConfig, verdict: Verdict | None) -> str:
    chosen = verdict or {"accept": ACCEPT, "drop": DROP}[queue.default]
    if chosen.action is Action.DROP and queue.mode == "monitor":
        return "would drop; monitor mode accepts it"
    return chosen.action.name.lower()


class _Given(Owners):
    """The owner of every packet, as the command line names it."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def names(self, packet: Packet) -> Mapping[str, str]:
        """The same for every packet."""
        del packet
        return self._names


class _Asked:
    """A policy of the chain, and the rule of its last decision."""

    def __init__(self, spec: ElementSpec, owner: Mapping[str, str]) -> None:
        self.rule = ""
        self._owner = owner
        options = spec.options.model_copy(update={"explain": True})
        self.element = Policy(spec.name, options, self._emit)
        self.element.context = Context(owners=_Given(owner))
        self.options: Any = spec.options

    def _emit(self, message: str, level: str = "info", **fields: Any) -> None:
        del message, level
        self.rule = f"{self.element.name}: {fields.get('rule', '')}"

    def nearest(self, packet: Packet, flow: Flow) -> Iterator[str]:
        """The rules that did not match, with the conditions that failed; the closest first."""
        misses: dict[int, tuple[int, int, str | None, list[str]]] = {}
        for number, rule in self.options.numbered:
            missing = [*_unmet(rule, packet, flow, self.options.geo), *_unowned(rule, self._owner)]
            # The rule that matched, or the closest one, of those that one filter makes.
            misses[number] = min(
                misses.get(number, (99, number, None, [])), (len(missing), number, rule.name, missing), key=lambda each: each[0]
            )
        for _, number, name, missing in sorted((each for each in misses.values() if each[3]), key=lambda each: each[:2])[:_SHOWN]:
            yield f"{self.element.name}: rule {number}{f' ({name})' if name else ''}: {'; '.join(missing)}"


def _unmet(rule: Any, packet: Packet, flow: Flow, geography: Geography | None) -> Iterator[str]:
    for key in Conditions.model_fields:
        value = getattr(rule, key)
        if value is None or (key == "protocol" and rule.applications):
            continue
        alone = Conditions.model_construct(**{key: value})
        if not Match([alone], lambda index: f"if-{index}", geography).bits(packet, flow.origin):
            yield _place(key, flow, geography) if geography and key in PLACES else f"{key} is not {_few(value)}"
    for fact, globs in rule.wanted:
        found = flow.facts.get(fact)
        if found is None:
            yield f"{fact} is not known, wants {_few(globs)}"
        elif not Patterns(globs, caseless=True).match(found):
            yield f"{fact} is {found}, wants {_few(globs)}"


def _unowned(rule: Any, owner: Mapping[str, str]) -> Iterator[str]:
    for key in OWNED_BY:
        globs = getattr(rule, key)
        if globs is not None and not (key in owner and Patterns(globs).match(owner[key])):
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
