"""Traffic that two tables of a configuration would judge at the same interface: only one of them may judge it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from nfq_agent.config.capture import InlineConfig, overlap, same_interface
from nfq_agent.config.models import Config
from nfq_agent.config.rule import RuleConfig
from nfq_agent.values import LAST_PORT, Ports

_ALL = (Ports(1, LAST_PORT),)
_TCP, _UDP = 6, 17


def overlaps(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Key and text for each: `[inline]` beside `[rules]`, and beside another `[inline]`."""
    for name, inline in config.inline.items():
        for other, rule in config.rules.items():
            if (ports := _shared(inline, rule)) is not None:
                chosen = ", ".join(rule.interface or ())
                yield (
                    ("inline", name, "interfaces"),
                    f"port {ports} of {chosen} is judged by [rules.{other}] too; allowed: other ports or interfaces",
                )
    for (name, one), (other, two) in combinations(config.inline.items(), 2):
        pattern = same_interface(two.interfaces, one.interfaces, (*one.exclude, *two.exclude))
        ports = None if pattern is None or _apart(one.role, two.role) else _both(_of_inline(one), _of_inline(two))
        if ports is not None:
            yield (
                ("inline", other, "interfaces"),
                f"port {ports} of {pattern} is judged by [inline.{name}] too; allowed: other ports or interfaces",
            )


def _shared(inline: InlineConfig, rule: RuleConfig) -> Ports | None:
    """A rule without an interface concerns the host; only a rule that names the same interface concerns the same traffic."""
    if rule.interface is None or same_interface(inline.interfaces, rule.interface, inline.exclude) is None:
        return None
    return shared_ports(inline, rule)


def shared_ports(inline: InlineConfig, rule: RuleConfig) -> Ports | None:
    """Ports that both take, wherever they do."""
    if _apart(inline.role, rule.role):
        return None
    every_tcp = rule.all or (rule.tcp_syn and not rule.tcp_ports) or _TCP in (rule.protocol or ())
    every_udp = rule.all or _UDP in (rule.protocol or ())
    return _both(_of_inline(inline), (_ALL if every_tcp else rule.tcp_ports, _ALL if every_udp else rule.udp_ports))


def _apart(*roles: str | None) -> bool:
    """One takes the ports of servers behind an interface, the other those of servers elsewhere."""
    return set(roles) == {"server", "client"}


def _of_inline(inline: InlineConfig) -> tuple[tuple[Ports, ...], tuple[Ports, ...]]:
    return (inline.tcp_ports, inline.udp_ports) if inline.tcp_ports or inline.udp_ports else (_ALL, _ALL)


def _both(ours: tuple[tuple[Ports, ...], tuple[Ports, ...]], others: tuple[tuple[Ports, ...], tuple[Ports, ...]]) -> Ports | None:
    return overlap(ours[0], others[0]) or overlap(ours[1], others[1])
