"""What the rules need to know of proxies: their ports, and what is redirected to them. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from nfq_agent.config.models import Config
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.rules.model import ACCEPTED, FAMILIES, Extension, Family, Option, Rule, comment_match
from nfq_agent.rules.selection import marked


def redirects(config: Config) -> bool:
    """Whether a rule redirects connections to a proxy by NAT."""
    return any(rule.proxy is not None and config.proxy[rule.proxy].capture == "redirect" for rule in config.rules.values())


def table_of(config: Config, rule: RuleConfig) -> str:
    """The table of a rule: TPROXY is valid in mangle only (xt_TPROXY.c)."""
    return "mangle" if rule.proxy is not None and config.proxy[rule.proxy].capture == "tproxy" else rule.table_name


def listener_port(proxy: ProxyConfig, family: Family, wanted: int | None) -> int | None:
    """The first listener of a family, or the wanted one. A `[::]` listener with no IPv4 one on its port takes both."""
    v4 = {each.port for each in proxy.listen if ":" not in each.host}
    listen = [each for each in proxy.listen if wanted in (None, each.port)]
    for each in listen:
        if (":" in each.host) == (family == "inet6"):
            return each.port
    if family == "inet" and proxy.capture == "redirect":
        return next((each.port for each in listen if each.host == "::" and each.port not in v4), None)
    return None


def accept_rules(config: Config, families: Collection[Family] = FAMILIES) -> dict[Family, tuple[Rule, ...]]:
    """The rules of hook INPUT that accept what is redirected to proxies with `accept_input`; families without one are left out.

    By REDIRECT a packet arrives with the proxy's port, and its connection has a translated destination; by TPROXY it arrives as
    it was sent, with the mark of TPROXY. What is sent to the proxy's port directly is not accepted by them.
    """
    made: dict[Family, dict[Rule, None]] = {}
    for rule in config.rules.values():
        if rule.proxy is None or not (proxy := config.proxy[rule.proxy]).accept_input:
            continue
        comment = comment_match(config.agent.instance, f"{ACCEPTED}{rule.proxy}")
        for family in rule.families:
            port = listener_port(proxy, family, rule.port)
            if port is not None and family in families:
                accepting = Rule("INPUT", Extension("ACCEPT"), (*_arrived(proxy, port), comment), "tcp")
                made.setdefault(family, {})[accepting] = None
    return {family: tuple(rules) for family, rules in made.items()}


def _arrived(proxy: ProxyConfig, port: int) -> Iterator[Extension]:
    if proxy.capture == "tproxy":
        yield marked(proxy.tproxy_mark)
    else:
        yield Extension("tcp", (Option("--dport", str(port)),))
        yield Extension("conntrack", (Option("--ctstate", "DNAT"),))
