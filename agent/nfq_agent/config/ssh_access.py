"""Whether a configuration drops SSH: a change that does so can lock out the person who makes it. Values only.

Asked are the packets that begin a connection to TCP port 22 and those that answer them. What is not known of them, as who sends
them, may be what a rule asks for: SSH counts as dropped only where no rule could accept it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from nfq_agent.config.capture import InlineConfig
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.policies import CLOSED, policy_of
from nfq_agent.config.rule import INWARD, RuleConfig
from nfq_agent.packet import TCP
from nfq_agent.values import LAST_PORT, Ports

if TYPE_CHECKING:
    from nfq_agent.policy_options import PolicyOptions, RuleOptions

_SSH: Final = 22
# The ports of clients.
_CLIENTS: Final = Ports(1024, LAST_PORT)
# Conditions of which it is known whether a packet meets them; of the first packet of a flow not all are.
_KNOWN: Final = frozenset({"action", "name", "when", "verify", "protocol", "dport", "sport"})
_KNOWN_OF_PACKETS: Final = _KNOWN | {"hook", "direction"}
_OUTWARD: Final = frozenset(("output", "postrouting"))
# Which connections: by the hooks of their first packets and of the answers.
_WAYS: Final = {
    "SSH": (INWARD, _OUTWARD),
    "outgoing SSH": (_OUTWARD, INWARD),
    "forwarded SSH": (frozenset(("forward",)), frozenset(("forward",))),
}
# The one fact that is known before a flow says anything (policy_rule.DST_NAME).
_DST_NAME: Final = "dst_name"


class _Seen(NamedTuple):
    """A packet of a connection to port 22. answers: it comes from there."""

    hook: str
    answers: bool


def cuts_ssh(config: Config, table: QueueConfig | InlineConfig) -> str:
    """Which SSH connections a queue or an inline link drops: `SSH` for those to this host; empty for none."""
    if table.mode == "monitor":
        return ""
    for title, ways in _WAYS.items():
        seen = (_Seen(hook, answers) for answers, hooks in zip((False, True), ways, strict=True) for hook in hooks)
        if any(_takes(config, table, each) and _drops(config, table, each) for each in seen):
            return title
    return ""


def _takes(config: Config, table: QueueConfig | InlineConfig, seen: _Seen) -> bool:
    """Whether the packet comes to it."""
    if isinstance(table, InlineConfig):
        # Both ends of a connection may be behind such an interface.
        everything = not (table.tcp_ports or table.udp_ports)
        return seen.hook in ("prerouting", "postrouting") and (everything or _has(table.tcp_ports, _SSH))
    rules = (rule for rule in config.rules.values() if rule.queue is not None and config.queue[rule.queue] is table)
    return any(_selects(rule, seen) for rule in rules)


def _selects(rule: RuleConfig, seen: _Seen) -> bool:
    if seen.hook not in rule.hooks or (rule.tcp_syn and seen.answers):
        return False
    # Of the packet's two ports this one is known.
    known = rule.looks_at(seen.hook) in ("--ports", "--sports" if seen.answers else "--dports")
    by_protocol = rule.all or TCP in (rule.protocol or ()) or (rule.tcp_syn and not rule.tcp_ports)
    if known and _has(rule.not_tcp_ports, _SSH):
        return False
    return by_protocol or (known and _has(rule.tcp_ports, _SSH))


def _drops(config: Config, table: QueueConfig | InlineConfig, seen: _Seen) -> bool:
    """Whether the elements drop the packet for certain. Other elements than policies are not asked."""
    for spec in config.packet_elements(table):
        policy = policy_of(spec)
        if policy is not None and (answer := _answer(policy, seen)) is not None:
            return answer
        default = getattr(spec.options, "default", None)
        if default is not None:
            return default in CLOSED
    return table.default == "drop"


def _answer(policy: PolicyOptions, seen: _Seen) -> bool | None:
    """Whether the rules drop the packet: False also where one could accept it; None where none of them decides."""
    rules = policy.rules
    by_flow = any(rule.wanted or rule.owned_by for rule in rules)
    for rule in rules:
        if not _can_match(rule, seen, by_flow):
            continue
        facts = [fact for fact, _ in rule.wanted if fact != _DST_NAME]
        if facts and policy.undecided in CLOSED:
            # Its first packets say nothing: the rule waits, and drops them.
            if _matches_all(rule, seen, by_flow, waits=True):
                return True
        elif rule.action not in CLOSED and _may_have(rule):
            return False
        elif rule.action in CLOSED and _matches_all(rule, seen, by_flow):
            return True
    return None


def _can_match(rule: RuleOptions, seen: _Seen, by_flow: bool) -> bool:
    """Whether protocol, ports and hook of a rule can be those of the packet; of a flow, those of its first packet."""
    numbers = [each for each in rule.protocol or () if isinstance(each, int)]
    if numbers and TCP not in numbers:
        return False
    server, client = _ends(rule, seen, by_flow)
    if server is not None and not _has(server, _SSH):
        return False
    if client is not None and not any(each.last >= _CLIENTS.first for each in client):
        return False
    if by_flow:
        return True
    way = "in" if seen.hook in INWARD else "out" if seen.hook in _OUTWARD else None
    return (rule.hook is None or seen.hook in rule.hook) and rule.direction in (None, way)


def _may_have(rule: RuleOptions) -> bool:
    """Whether an SSH connection can have the facts that a rule asks for."""
    if rule.applications and "ssh" not in rule.applications:
        return False
    others = {fact for fact in rule.fact_keys if not fact.startswith("ssh")} - {"encrypted"}
    return not any(fact in others for fact, _ in rule.wanted)


def _matches_all(rule: RuleOptions, seen: _Seen, by_flow: bool, waits: bool = False) -> bool:
    """Whether a rule that can match such a packet matches each of them. waits: whatever facts it asks for."""
    client = _ends(rule, seen, by_flow)[1]
    if client is not None and not any(each.first <= _CLIENTS.first and each.last >= _CLIENTS.last for each in client):
        return False
    if rule.applications and not waits and "ssh" not in rule.applications:
        return False
    given = rule.model_dump(exclude_none=True, exclude_defaults=True).keys()
    known = _KNOWN if by_flow else _KNOWN_OF_PACKETS
    return given <= (known | {"facts", *rule.fact_keys} if waits else known)


def _ends(rule: RuleOptions, seen: _Seen, by_flow: bool) -> tuple[tuple[Ports, ...] | None, tuple[Ports, ...] | None]:
    """The conditions on the server's port and on the client's: a flow is judged by the ends of its first packet."""
    return (rule.sport, rule.dport) if seen.answers and not by_flow else (rule.dport, rule.sport)


def _has(ports: Iterable[Ports], port: int) -> bool:
    return any(port in each for each in ports)
