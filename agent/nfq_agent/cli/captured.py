"""Whether connections that the rules lead to a proxy arrive there: the counts of the rules beside those of the proxy. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from nfq_agent.service.status import ProxyStatus, Status

_PORT: Final = re.compile(r"-j (?:REDIRECT --to-ports|TPROXY --on-port) (\d+)")
# A SYN that is sent again counts again in table mangle; and the proxy may not have counted what came a moment ago.
_MORE_THAN: Final = 2
_SLACK: Final = 10


class Missing(NamedTuple):
    """Connections were led to a port of a proxy, and most did not arrive. advice: the rule to add."""

    text: str
    advice: str


def missing(status: Status) -> Iterator[Missing]:
    """One for each proxy that gets much less than the rules lead to it."""
    for proxy in status.proxies:
        counted: dict[str, int] = {}
        for each in status.rules:
            if (match := _PORT.search(each.rule)) and match[1] in _ports(proxy):
                counted[match[1]] = counted.get(match[1], 0) + each.packets
        led, came = sum(counted.values()), proxy.counters["connections"] + proxy.counters["refused"]
        if led > _MORE_THAN * came + _SLACK and not proxy.counters["full"]:
            ports = ",".join(sorted(counted))
            yield Missing(
                f"proxy {proxy.name}: the rules led {led} connections to port {ports}, and {came} arrived: a firewall of this "
                "host may drop them in INPUT, where they have the proxy's port; or another rule took them",
                f"iptables -I INPUT -p tcp -m multiport --dports {ports} -m conntrack --ctstate DNAT -j ACCEPT (and ip6tables; "
                "with capture = tproxy without the match on conntrack)",
            )


def _ports(proxy: ProxyStatus) -> set[str]:
    return {each.rpartition(":")[2] for each in proxy.listen}
