"""What on this host may keep traffic from us, or lose a rule: firewalls, the order of NAT, NOTRACK, another xtables lock.

It is logged at the start and shown by `doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nfq_agent.config.models import Config
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.host.families import families
from nfq_agent.host.nftables import neighbours
from nfq_agent.host.nftables.layout import PRIORITIES
from nfq_agent.host.xtables import obstacles
from nfq_agent.host.xtables.lock import lock_path
from nfq_agent.host.xtables.lock_files import other_locks
from nfq_agent.rules.model import FAMILIES
from nfq_agent.rules.proxies import redirects
from nfq_agent.service.planned import not_compiled


class HostNotice(NamedTuple):
    """One of them. subject: a word or two. text: what was found. advice: what to do."""

    subject: str
    text: str
    advice: str


def host_notices(config: Config, backend: str) -> Iterator[HostNotice]:
    """Those that concern a configuration. backend: of the rules, as configured or in use."""
    off = [name for name in FAMILIES if name not in families() and any(name in rule.families for rule in config.rules.values())]
    if off:
        yield HostNotice(
            "family",
            "this kernel has no IPv6 (ipv6.disable=1, or no module): the rules are made for IPv4 alone",
            'family = "inet" in the rules says the same',
        )
    if backend != "owned" and (others := other_locks()):
        yield HostNotice(
            "xtables lock",
            f"{', '.join(others)} in this network namespace and this agent take the xtables lock on different files "
            f"({lock_path()} of another mount namespace): where both change a table at the same time, a change may be lost",
            f'mount one {lock_path()} for both, or set backend = "owned", which needs no lock',
        )
    for name, queue in config.queue.items():
        if why := not_compiled(config, queue, backend):
            yield HostNotice("compile", f"queue {name}: {why}", "the worker judges what they are about, at the speed of a queue")
    if not config.proxy:
        return
    if redirects(config):
        yield from _other_nat(config, backend)
    yield from _firewalls(config)
    if redirects(config) and (found := obstacles.untracked()):
        yield HostNotice(
            "NOTRACK",
            f"rules that take packets out of connection tracking, which REDIRECT passes over: {', '.join(found)}",
            'leave the ports of the proxy out of those rules, or use capture = "tproxy"',
        )


def _other_nat(config: Config, backend: str) -> Iterator[HostNotice]:
    hooks = {hook for rule in config.rules.values() if rule.proxy is not None for hook in rule.hooks}
    chains = [each for each in neighbours.nat_chains() if each.hook in hooks]
    for each in chains:
        if each.priority <= PRIORITIES["nat"]:
            yield HostNotice(
                "NAT order",
                f"nft chain {each} does NAT at priority {each.priority} and is asked before this agent: a connection that it "
                "takes does not reach the proxy",
                "give that chain priority -100 (dstnat), or leave what it takes out of the rules of the proxy",
            )
    later = [each for each in chains if each.priority > PRIORITIES["nat"]]
    if backend == "legacy" and later:
        yield HostNotice(
            "NAT order",
            f"legacy NAT and NAT of nf_tables ({later[0]}) are both in use: the one that was registered last is asked first, and "
            "a connection that it takes does not reach the proxy",
            'set backend = "owned" in table agent: it is asked before both',
        )


def _firewalls(config: Config) -> Iterator[HostNotice]:
    # What this host sends itself comes by lo, which firewalls accept.
    names = {rule.proxy for rule in config.rules.values() if "prerouting" in rule.hooks}
    wanted = {name: proxy for name, proxy in config.proxy.items() if name in names and not proxy.accept_input}
    for name, proxy in wanted.items():
        if found := obstacles.firewalls(translated=proxy.capture == "redirect"):
            yield HostNotice(
                "firewall",
                f"{' and '.join(found)} drops what it does not accept, and connections redirected to proxy {name} arrive there "
                f"with {_arrival(proxy)}",
                f"unless a rule accepts them already: accept_input = true in table proxy.{name}, or iptables -I INPUT "
                f"{accept_words(proxy)} (and ip6tables)",
            )


def _arrival(proxy: ProxyConfig) -> str:
    return f"port {_ports(proxy)}" if proxy.capture == "redirect" else f"mark {proxy.tproxy_mark}"


def _ports(proxy: ProxyConfig) -> str:
    return ",".join(str(port) for port in sorted({each.port for each in proxy.listen}))


def accept_words(proxy: ProxyConfig) -> str:
    """The iptables rule that accepts what was redirected to a proxy, and not what was sent to its ports by others."""
    if proxy.capture == "redirect":
        return f"-p tcp -m multiport --dports {_ports(proxy)} -m conntrack --ctstate DNAT -j ACCEPT"
    # TPROXY changes no port: only the mark tells.
    return f"-p tcp -m mark --mark {proxy.tproxy_mark} -j ACCEPT"
