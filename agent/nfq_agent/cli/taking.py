"""Which rules of a configuration take a packet, by the conditions of the rules in the kernel, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

from nfq_agent.cli.question import Question
from nfq_agent.config.models import Config
from nfq_agent.config.rule import RuleConfig
from nfq_agent.config.selection import Identities
from nfq_agent.packet import TCP, UDP, WITH_PORTS, protocol_name
from nfq_agent.rules.model import Family
from nfq_agent.rules.proxies import listener_port, table_of
from nfq_agent.values import Endpoint, Network

# In which order the kernel asks the tables of a hook (linux/netfilter_ipv4.h, enum nf_ip_hook_priorities).
_TABLES: Final = ("raw", "mangle", "nat", "filter")


class Matching(NamedTuple):
    """A rule that matches. before: the rule of the same table that is asked first, whose verdict ends the walk; None: none is.

    seen: the packet as the rule sees it.
    """

    name: str
    table: str
    before: str | None
    seen: Question


def in_order(config: Config) -> list[str]:
    """The names of the rules in the order in which the kernel asks them in a hook."""
    return sorted(config.rules, key=lambda name: _TABLES.index(table_of(config, config.rules[name])))


def matching(config: Config, question: Question) -> list[Matching]:
    """The rules that match, in the order in which the kernel asks them."""
    found: list[Matching] = []
    first: dict[str, str] = {}
    led = question
    for name in in_order(config):
        table = table_of(config, config.rules[name])
        seen = led if table == "filter" else question
        if not any(True for _ in misses(config, name, seen)):
            found.append(Matching(name, table, first.get(table), seen))
            if table not in first and config.rules[name].proxy is not None:
                led = behind_redirect(config, name, question)
            first.setdefault(table, name)
    return found


def behind_redirect(config: Config, name: str, question: Question) -> Question:
    """The packet behind a rule that leads it to a proxy, in the same hook: what this host sends goes to its loopback address
    (nf_nat_redirect_ipv4() in net/netfilter/nf_nat_redirect.c). In other hooks no table of a rule follows."""
    rule = config.rules[name]
    if rule.proxy is None or question.hook != "output":
        return question
    family: Family = "inet" if question.version == 4 else "inet6"
    port = listener_port(config.proxy[rule.proxy], family, rule.port) or 0
    return replace(question, destination=str(Endpoint("127.0.0.1" if family == "inet" else "::1", port)))


def misses(config: Config, name: str, question: Question) -> Iterator[str]:
    """The reasons why a rule does not take the packet; none if it does."""
    rule = config.rules[name]
    family = "inet" if question.version == 4 else "inet6"
    if family not in rule.families:
        yield f"family is {family}, wants {rule.family}"
    if question.hook not in rule.hooks:
        yield f"hook is {question.hook}, wants {', '.join(rule.hooks)}"
    yield from min((list(_traffic_misses(rule, question, ports)) for ports in _sides(rule, question)), key=len)
    yield from _identity_misses(rule, question)
    yield from _interface_misses(rule, question)
    yield from _address_misses(rule, question)
    if rule.mark is not None and question.mark & rule.mark.mask != rule.mark.value:
        yield f"mark is {question.mark:#x}, wants {rule.mark}"
    if rule.proxy is not None:
        yield from _proxy_misses(config, rule, question)


def _sides(rule: RuleConfig, question: Question) -> Iterator[tuple[int, ...]]:
    """The ports that a rule looks at, as the plan of the rules chooses them: one choice for each way that the packet crosses one
    of its interfaces."""
    if question.number not in WITH_PORTS:
        yield ()
    elif question.hook == "forward" and rule.proxy is None and rule.interface and rule.role in ("server", "client"):
        # What leaves through the interface asks a server behind it, and what enters is its answer.
        ways = [_named(question.enters, rule.interface), _named(question.leaves, rule.interface)]
        for inward in [True] * ways[0] + [False] * ways[1] or [False]:
            yield (question.sport if (rule.role == "server") == inward else question.dport,)
    else:
        seen = {"--dports": (question.dport,), "--sports": (question.sport,), "--ports": (question.dport, question.sport)}
        yield seen[rule.looks_at(question.hook)]


def _traffic_misses(rule: RuleConfig, question: Question, seen: tuple[int, ...]) -> Iterator[str]:
    """seen: the ports of the packet that count."""
    ports = {TCP: rule.tcp_ports, UDP: rule.udp_ports}.get(question.number, ())
    excepted = {TCP: rule.not_tcp_ports, UDP: rule.not_udp_ports}.get(question.number, ())
    protocol = protocol_name(question.number)
    by_protocol = rule.all or (rule.tcp_syn and question.number == TCP and not ports)
    left_out = [port for port in seen if any(port in each for each in excepted)]
    if rule.protocol is not None:
        if question.number not in rule.protocol:
            yield f"protocol is {protocol}, wants {', '.join(map(protocol_name, rule.protocol))}"
            return
        by_protocol = True
    if by_protocol:
        if left_out:
            yield f"port is {left_out[0]}, which is in not_{protocol}_ports"
    elif not ports:
        yield f"protocol is {protocol}, wants {' or '.join(_protocols(rule))}"
    elif not (chosen := [port for port in seen if any(port in each for each in ports)]):
        yield f"port is {' or '.join(map(str, seen))}, wants {', '.join(map(str, ports))}"
    elif all(port in left_out for port in chosen):
        yield f"port is {chosen[0]}, which is in not_{protocol}_ports"


def _protocols(rule: RuleConfig) -> list[str]:
    return ["tcp"] * bool(rule.tcp_ports or rule.tcp_syn) + ["udp"] * bool(rule.udp_ports)


def _identity_misses(rule: RuleConfig, question: Question) -> Iterator[str]:
    if rule.owner is not None and question.uid != rule.owner_id:
        yield f"uid is {'not given' if question.uid is None else question.uid}, wants {rule.owner}"
    for key, number in (("uid", question.uid), ("gid", question.gid)):
        wanted, excepted = getattr(rule, key), getattr(rule, f"not_{key}")
        if wanted is not None and not _one_of(number, wanted):
            yield f"{key} is {'not given' if number is None else number}, wants {', '.join(map(str, wanted))}"
        if excepted is not None and _one_of(number, excepted):
            yield f"{key} is {number}, which is in not_{key}"
    path = question.cgroup.strip("/")
    if rule.cgroup is not None and not _within(path, rule.cgroup):
        yield f"cgroup is {path or 'not given'}, wants {', '.join(rule.cgroup)}"
    if rule.not_cgroup is not None and _within(path, rule.not_cgroup):
        yield f"cgroup is {path}, which is in not_cgroup"
    having = {each.partition(" ")[0] for each in question.sets}
    if rule.set is not None and not any(each.partition(" ")[0] in having for each in rule.set):
        yield f"set is {', '.join(sorted(having)) or 'not given'}, wants {', '.join(rule.set)}"
    if excepted := [each for each in rule.not_set or () if each.partition(" ")[0] in having]:
        yield f"set is {excepted[0]}, which is in not_set"


def _one_of(number: int | None, wanted: tuple[Identities, ...]) -> bool:
    return number is not None and any(each.first <= number <= each.last for each in wanted)


def _within(path: str, wanted: tuple[str, ...]) -> bool:
    """Whether a control group is one of these, or below one (xt_cgroup.c, cgroup_is_descendant())."""
    return any(path == each or path.startswith(f"{each}/") for each in wanted)


def _interface_misses(rule: RuleConfig, question: Question) -> Iterator[str]:
    seen = [name for name in (question.enters, question.leaves) if name]
    if rule.interface is not None and not any(_named(name, rule.interface) for name in seen):
        yield f"interface is {' or '.join(seen) or 'not given'}, wants {', '.join(rule.interface)}"
    if rule.not_interface is not None and (found := [name for name in seen if _named(name, rule.not_interface)]):
        yield f"interface is {found[0]}, which is in not_interface"


def _named(interface: str, patterns: tuple[str, ...]) -> bool:
    """Whether an interface has one of these names; a `*` at the end stands for any rest, and no other character is special."""
    return any(
        interface.startswith(pattern[:-1]) if pattern.endswith("*") else interface == pattern for pattern in patterns if interface
    )


def _address_misses(rule: RuleConfig, question: Question) -> Iterator[str]:
    for key, end in (("src", question.source_address), ("dst", question.destination_address)):
        wanted, excepted = getattr(rule, key), getattr(rule, f"not_{key}")
        if wanted is not None and not any(end in each for each in wanted):
            yield f"{key} is {end}, wants {', '.join(map(str, wanted))}"
        if any(end in each for each in excepted or ()):
            yield f"{key} is {end}, which is in not_{key}"


def _proxy_misses(config: Config, rule: RuleConfig, question: Question) -> Iterator[str]:
    """Why a connection is not led to the proxy, although it is one that the rule selects."""
    assert rule.proxy is not None
    proxy = config.proxy[rule.proxy]
    family: Family = "inet" if question.version == 4 else "inet6"
    if listener_port(proxy, family, rule.port) is None:
        yield f"proxy {rule.proxy} has no listener for {family}"
    networks: tuple[Network, ...] = proxy.exclude
    if any(question.destination_address in each for each in networks):
        yield f"dst is {question.destination_address}, which is in exclude of proxy {rule.proxy}"
    if question.mark & proxy.own_traffic.mask == proxy.own_traffic.value:
        yield f"mark is {question.mark:#x}, which is that of a proxy's own connections ({proxy.own_traffic})"


def own_uid(question: Question, uid: int | None) -> bool:
    """Whether it is sent by the agent's own user, whose packets no rule takes. uid: of that user; None if it is not there."""
    return question.sent and uid is not None and question.uid == uid
