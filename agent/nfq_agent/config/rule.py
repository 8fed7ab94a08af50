"""`[rules.NAME]`: which traffic goes to which queue or proxy. Models only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal

from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.selection import CGROUP_HOOKS, OWNER_HOOKS, Selection, selection_faults
from nfq_agent.field import Field
from nfq_agent.mark import MarkField
from nfq_agent.packet import UDP

TABLE_HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    "mangle": ("prerouting", "input", "forward", "output", "postrouting"),
    "raw": ("prerouting", "output"),
    "filter": ("input", "forward", "output"),
    # REDIRECT is valid in these two only (ip_tables extension xt_REDIRECT).
    "nat": ("prerouting", "output"),
}
INWARD: Final = frozenset(("prerouting", "input"))


class RuleConfig(Selection):
    """`[rules.NAME]`"""

    queue: str | None = None
    proxy: str | None = None
    # The proxy's listener that the rule redirects to; otherwise the first one of the family.
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    family: Literal["unspec", "inet", "inet6"] = "unspec"
    table: Literal["mangle", "raw", "filter", "nat"] | None = None
    hooks: Annotated[
        tuple[Literal["prerouting", "input", "forward", "output", "postrouting"], ...],
        Field(min_length=1, strict=False),
    ] = ("input", "output")
    role: Literal["server", "client", "both"] | None = None
    # The interface is also taken as a port of a bridge, which -i and -o do not see.
    bridge: bool = False
    owner: Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=0, le=0xFFFFFFFE)] | None = None
    mark: MarkField | None = None

    def faults(self) -> Iterator[str]:
        """Keys that do not go together."""
        yield from selection_faults(self)
        yield from self._target_faults()
        yield from self._hook_faults()

    def _target_faults(self) -> Iterator[str]:
        if (self.queue is None) == (self.proxy is None):
            yield "a rule sends its traffic to one place; allowed: queue = NAME, or proxy = NAME"
        if self.proxy is not None:
            if self.table not in (None, "nat"):
                yield f"table {self.table} cannot redirect to a proxy; allowed: nat"
            if self.udp_ports or self.tcp_syn or self.all or self.protocol:
                yield "a proxy takes TCP ports only; allowed: tcp_ports"
            if self.role not in (None, "client"):
                yield f"role {self.role}: redirection looks at the destination port only; allowed: client"
        elif self.port is not None:
            yield "port is a listener of a proxy; allowed: with proxy = NAME"
        elif self.table == "nat":
            yield "table nat sees the first packet of a connection only; allowed: mangle, raw, filter"
        if self.bridge and (self.interface is None or self.hooks != ("forward",) or self.proxy is not None):
            yield 'bridge = true matches ports of a bridge; allowed: with queue, interface and hooks = ["forward"]'

    def _hook_faults(self) -> Iterator[str]:
        for hook in self.hooks:
            if hook not in TABLE_HOOKS[self.table_name]:
                yield f"table {self.table_name} has no hook {hook}; allowed: {', '.join(TABLE_HOOKS[self.table_name])}"
            for key in ("owner", "uid", "gid", "not_uid", "not_gid"):
                if getattr(self, key) is not None and hook not in OWNER_HOOKS:
                    yield f"{key} cannot be matched by the kernel in hook {hook}; allowed: {', '.join(OWNER_HOOKS)}"
            for key in ("cgroup", "not_cgroup"):
                if getattr(self, key) is not None and hook not in CGROUP_HOOKS:
                    yield f"{key} cannot be matched by the kernel in hook {hook}; allowed: {', '.join(CGROUP_HOOKS)}"
        if len(set(self.hooks)) != len(self.hooks):
            yield "hooks has one twice; allowed: each once"
        if self.owner is not None and self.owner_id is None:
            yield f"owner: no user {self.owner!r} on this host; allowed: an existing user's name, or a uid"

    @property
    def table_name(self) -> str:
        """The table of its rules: mangle, or nat for a proxy, unless the file names one."""
        return self.table or ("mangle" if self.proxy is None else "nat")

    @property
    def families(self) -> tuple[Literal["inet", "inet6"], ...]:
        """The address families it covers."""
        return ("inet", "inet6") if self.family == "unspec" else (self.family,)

    @property
    def takes_udp(self) -> bool:
        """Whether it selects UDP."""
        return bool(self.all or self.udp_ports or UDP in (self.protocol or ()))

    def looks_at(self, hook: str) -> str:
        """Which port its role looks at, as an option of multiport: a server's is the destination on the way in, a client's on the
        way out."""
        if self.proxy is not None:
            return "--dports"
        if self.role in (None, "both") or hook == "forward":
            return "--ports"
        return "--dports" if (self.role == "server") == (hook in INWARD) else "--sports"

    def by_owner(self, hook: str) -> bool:
        """Whether it takes the packets of certain users, groups or control groups, which the kernel knows only while the socket
        is there, and connections can be marked (connection tracking comes behind the table raw)."""
        owners = (self.owner, self.uid, self.gid, self.cgroup)
        named = any(each is not None for each in owners)
        return named and self.queue is not None and self.table_name != "raw" and hook in OWNER_HOOKS

    @property
    def owner_id(self) -> int | None:
        """The numeric id of `owner`; None where there is no owner or no such user."""
        if self.owner is None or isinstance(self.owner, int):
            return self.owner
        if self.owner.isdecimal():
            return int(self.owner)
        try:
            return HostLookups().uid(self.owner)
        except KeyError:
            return None
