"""What a configuration needs to know of DNS answers (`verify`, `dst_name`), and whether its rules show them."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Final, NamedTuple

from nfq_agent.config.capture import CaptureConfig
from nfq_agent.config.lines import Place
from nfq_agent.config.models import Config, ElementSpec, QueueConfig
from nfq_agent.config.policies import rule_that
from nfq_agent.config.rule import INWARD, RuleConfig
from nfq_agent.elements import ElementError
from nfq_agent.values import Ports

# Where systemd-resolved listens (its manual, "/etc/resolv.conf").
STUBS: Final = (ip_address("127.0.0.53"), ip_address("127.0.0.54"))
_DNS: Final = 53
_UDP: Final = 17


class NameNeeds(NamedTuple):
    """wanted: patterns of names. believed: the resolvers whose answers count, packed addresses."""

    wanted: tuple[str, ...]
    believed: tuple[bytes, ...]


def name_needs(config: Config) -> NameNeeds | None:
    """What has to be known of DNS answers; None where no element asks. Raises ElementError."""
    wanted: dict[str, None] = {}
    for table in _tables(config):
        for spec in config.packet_elements(table):
            wanted |= dict.fromkeys(spec.cls.names_of(spec.options))
    if not wanted:
        return None
    given = config.agent.resolvers
    addresses = (*config.host_resolvers(), *STUBS) if given is None else given
    return NameNeeds(tuple(wanted), tuple(dict.fromkeys(address.packed for address in addresses)))


def learns(spec: ElementSpec) -> bool:
    """Whether an element reads DNS answers for the table of names."""
    return "dns_answers" in spec.cls.keeps_facts


def name_faults(config: Config) -> Iterator[tuple[Place, str]]:
    """Rules that ask for names where no rule shows an answer: key and text for each."""
    if any(_shown(config)):
        return
    said: set[str] = set()
    for table in _tables(config):
        for spec in _specs(config, table):
            if spec.cls.names_of(spec.options) and spec.name not in said:
                said.add(spec.name)
                yield (
                    ("element", spec.name, "rule", *rule_that(spec, lambda rule: bool(rule.dst_name or rule.verify))),
                    "verify and dst_name need DNS answers, and no rule shows them to an element dpi; allowed: with a "
                    '[rules.NAME] of udp_ports = [53] and hooks = ["input", "output"], or ["forward"], for a queue with "dpi"',
                )


def hidden_resolvers(config: Config) -> list[str]:
    """The resolvers whose answers no rule shows, because they come in at a hook that none names; empty where no element asks."""
    needs = name_needs(config)
    if needs is None or "any" in (shown := set(_shown(config))) or "forward" in shown:
        return []
    packed = [ip_address(each) for each in needs.believed]
    return [str(address) for address in packed if not address.is_loopback]


def _shown(config: Config) -> Iterator[str]:
    """The answers that a learning element sees: of "any" resolver, those that are "forward"ed, or of a "stub" on this host."""
    for name, queue in config.queue.items():
        if not any(map(learns, _specs(config, queue))):
            continue
        rules = [rule for rule in config.rules.values() if rule.queue == name]
        asked = {hook for rule in rules for hook in rule.hooks if _selects(rule, hook, "--dports")}
        answered = {hook for rule in rules for hook in rule.hooks if _selects(rule, hook, "--sports")}
        if asked & {"output", "forward", "prerouting", "postrouting"} and answered & INWARD:
            yield "any"
        if "forward" in asked & answered:
            yield "forward"
        if asked & answered & {"output", "postrouting"}:
            yield "stub"
    for capture in (*config.inline.values(), *config.tap.values()):
        everything = not (capture.tcp_ports or capture.udp_ports)
        if any(map(learns, _specs(config, capture))) and (everything or _has(capture.udp_ports)):
            yield "any"


def _tables(config: Config) -> list[QueueConfig | CaptureConfig]:
    return [*config.queue.values(), *config.inline.values(), *config.tap.values()]


def _specs(config: Config, table: QueueConfig | CaptureConfig) -> list[ElementSpec]:
    try:
        return config.packet_elements(table)
    except ElementError:
        # Reported by itself.
        return []


def _has(ports: tuple[Ports, ...]) -> bool:
    return any(_DNS in each for each in ports)


def _selects(rule: RuleConfig, hook: str, direction: str) -> bool:
    """Whether a rule takes datagrams with the DNS port as destination ("--dports") or as source ("--sports") in a hook."""
    only = (rule.owner, rule.uid, rule.gid, rule.cgroup)
    if (direction == "--sports" and any(each is not None for each in only)) or _has(rule.not_udp_ports):
        return False
    if rule.all or _UDP in (rule.protocol or ()):
        return True
    return _has(rule.udp_ports) and rule.looks_at(hook) in ("--ports", direction)
