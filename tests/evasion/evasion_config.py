"""The agent's configuration where evasions are tried: a queue for each kind of rule, and one policy in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from evasion_servers import COUNTING, GATE_PYTHON, PLAIN, PROVEN_PLAIN, PROVEN_TLS, PYTHON, QUIC, TLS
from namespace import UNPRIVILEGED

DNS = 53
# nginx. Each port is taken by another rule.
NGINX, OWNED, MARKED, FLOODED, FLOODED_OPEN, LOGGED, GATE, LINK = 8000, 8001, 8002, 8003, 8004, 8005, 8006, 8008
# nginx with HTTP/2 in clear text.
NGINX_2 = 8009
NGINX_PORTS: Final = (NGINX, OWNED, MARKED, FLOODED, FLOODED_OPEN, LOGGED, GATE, LINK)
# UDP ports on which nothing listens.
REFUSED, FLOOD, FLOOD_OPEN = 9, 9003, 9004
# DNS gives these addresses for *.given.test and for *.taken.test; the last one for no name.
GIVEN = {4: "10.203.0.1", 6: "fd00:203::1"}
TAKEN = {4: "10.203.0.3", 6: "fd00:203::3"}
UNNAMED = {4: "10.203.0.4", 6: "fd00:203::4"}
# The servers' addresses on a link of its own.
ON_LINK = {4: "10.204.0.1", 6: "fd00:204::1"}

_CONFIG = """
[agent]
resolvers = ["10.203.0.1", "fd00:203::1"]

[queue.egress]
num = 120
fail_open = false
bypass = false
elements = ["dpi", "names"]

[element.names]
type = "policy"
default = "{default}"
undecided = "accept"
rule = [
  {{ action = "{denial}", facts = {{ ech = "true" }} }},
  {{ action = "{action}", tls_sni = ["{names}"] }},
  {{ action = "{action}", http_host = ["{names}"] }},
  {{ action = "{action}", dns_name = ["{names}"{more}] }},
]

[rules.egress]
queue = "egress"
hooks = ["output"]
tcp_ports = [{tcp}]
udp_ports = [{quic}]
role = "client"

[rules.dns]
queue = "egress"
hooks = ["input", "output"]
tcp_ports = [53]
udp_ports = [53]
role = "client"
"""

# What the table needs beside: owners, marks, names that DNS proves, floods, refusals, a proxy, and a link of its own.
_MORE = """
[queue.owned]
num = 121
fail_open = false
bypass = false
elements = ["dpi", "names"]
[rules.owned]
queue = "owned"
hooks = ["output"]
tcp_ports = [8001]
owner = {owner}

[queue.marked]
num = 122
fail_open = false
bypass = false
elements = ["dpi", "names", "offload"]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.marked]
queue = "marked"
hooks = ["output"]
tcp_ports = [8002]
role = "client"

[queue.flooded]
num = 123
max_len = 64
fail_open = false
bypass = false
elements = ["dpi", "names"]
[rules.flooded]
queue = "flooded"
hooks = ["output"]
tcp_ports = [8003]
udp_ports = [9003]
role = "client"

[queue.open]
num = 124
max_len = 1
elements = ["dpi", "names"]
[rules.open]
queue = "open"
hooks = ["output"]
tcp_ports = [8004]
udp_ports = [9004]
role = "client"

[queue.logged]
num = 125
fail_open = false
bypass = false
elements = ["dpi", "names", "log"]
[element.log]
each = "flow"
[rules.logged]
queue = "logged"
hooks = ["output"]
tcp_ports = [8005]
role = "client"

[queue.refused]
num = 126
fail_open = false
bypass = false
elements = ["refuse"]
[element.refuse]
type = "policy"
default = "{denial}"
[rules.refused]
queue = "refused"
hooks = ["output"]
udp_ports = [9]
role = "client"

[queue.proven]
num = 127
fail_open = false
bypass = false
elements = ["dpi", "proven"]
[element.proven]
type = "policy"
default = "{default}"
undecided = "accept"
rule = [ {proven} ]
[rules.proven]
queue = "proven"
hooks = ["output"]
tcp_ports = [{proven_tls}, {proven_plain}]
role = "client"

[queue.link]
num = 128
fail_open = false
bypass = false
elements = ["dpi", "names"]
[rules.link]
queue = "link"
interface = ["eth1"]
all = true

[proxy.gate]
elements = ["http-host"]
[element.http-host]
{gate}
[rules.gate]
proxy = "gate"
hooks = ["output"]
tcp_ports = [8006, {gate_python}]
"""
_PROVEN = {
    "allow-list": '{ action = "accept", tls_sni = ["*.given.test"], verify = "dns" }, '
    f'{{ action = "accept", dst_name = ["*.given.test"], dport = [{PROVEN_PLAIN}] }}',
    "block-list": '{ action = "ACTION", dst_name = ["*.taken.test"] }',
}
_GATE = {"allow-list": 'allow = ["*.allowed.test"]', "block-list": 'deny = ["*.refused.test"]'}


@dataclass(frozen=True)
class Policy:
    """kind: "allow-list", "block-list", or "none" for no agent at all. action: what happens to a denied name."""

    kind: str
    action: str = "drop"

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}-{self.action}"

    def config(self, more_ports: Sequence[int] = (), whole: bool = True, more_names: str = "") -> str:
        """The agent's configuration. more_ports: judged too. whole: with all queues. more_names: on the list too."""
        allow = self.kind == "allow-list"
        values = {
            "default": self.action if allow else "accept", "action": "accept" if allow else self.action, "denial": self.action,
            # The second is what some lines show us while the server reads `refused`.
            "names": f'*.allowed.test", "*.refuused.test{more_names}' if allow else f"*.refused.test{more_names}",
            # They are asked for by the lines about names that DNS proves.
            "more": ', "*.given.test", "*.taken.test"' if allow else "",
            "tcp": ", ".join(map(str, (TLS, PLAIN, COUNTING, NGINX, NGINX_2, PYTHON, *more_ports))),
            "quic": QUIC, "gate": _GATE[self.kind],
            "gate_python": GATE_PYTHON, "proven": _PROVEN[self.kind].replace("ACTION", self.action),
            "proven_tls": PROVEN_TLS, "proven_plain": PROVEN_PLAIN, "owner": UNPRIVILEGED,
        }  # fmt: skip
        return (_CONFIG + (_MORE if whole else "")).format(**values)
