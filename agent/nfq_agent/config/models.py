"""The configuration: frozen pydantic models. Checks that compare tables are in problems.py; file.py reads the file.

A value is never guessed, and an unknown key is never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from nfq_agent.config.capture import CaptureConfig, InlineConfig, TapConfig
from nfq_agent.config.lookups import HostLookups, resolvers_of_host
from nfq_agent.config.selection import CGROUP_HOOKS, OWNER_HOOKS, Selection
from nfq_agent.context import MidstreamMode
from nfq_agent.element import Needs
from nfq_agent.elements import ElementError, packet_element, stream_element
from nfq_agent.elements.loading import where
from nfq_agent.mark import OWN_TRAFFIC, OWNERS_MASK, Kept, Mark, MarkField, parse_mask
from nfq_agent.packet import UDP
from nfq_agent.values import AddressField, Duration, Endpoint, EndpointField, NetworkField, Size

TABLE_HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    "mangle": ("prerouting", "input", "forward", "output", "postrouting"),
    "raw": ("prerouting", "output"),
    "filter": ("input", "forward", "output"),
    # REDIRECT is valid in these two only (ip_tables extension xt_REDIRECT).
    "nat": ("prerouting", "output"),
}
# The header bytes that the kernel has to copy so that addresses and ports can be read. IPv4 and TCP, each with all options: 120.
HEADER_BYTES: Final = 128
# IPv6 with the longest legal chain of extension headers (RFC 8200 4.1: each once, destination options twice; 2,048 bytes each,
# 1,028 for authentication), and TCP: 15,512. A longer one gets the verdict on_error.
HEADER_BYTES_V6: Final = 16384
WHOLE_PACKET: Final = 65535
LAST_QUEUE: Final = 65535


class ConfigError(Exception):
    """A configuration that cannot be used. `faults` holds one line each: `FILE: KEY: what is wrong; what is allowed`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _numbers(value: object) -> tuple[int, int]:
    """A `balance` range of queue numbers."""
    if isinstance(value, tuple):
        return value
    first, colon, last = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f'{value!r} is not a range of queue numbers; allowed: FIRST:LAST, as in "100:103"')
    numbers = int(first), int(last)
    if numbers[1] > LAST_QUEUE:
        raise ValueError(f"{numbers[1]} is not a valid queue number; allowed: 0 to {LAST_QUEUE}")
    if numbers[0] >= numbers[1]:
        raise ValueError(f'range {value} does not rise; allowed: FIRST:LAST with FIRST below LAST, as in "100:103"')
    return numbers


def parse_target(value: object) -> Endpoint | None:
    return None if value is None or value == "" else Endpoint.parse(value)


INSTANCE: Final = r"^[a-z0-9-]{1,12}$"
NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
Name = Annotated[str, Field(pattern=NAME)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Agent(_Model):
    """`[agent]`"""

    instance: Annotated[str, Field(pattern=INSTANCE)] = "default"
    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = "proxyuser"
    backend: Literal["auto", "legacy", "owned"] = "auto"
    drift_check: Duration = 5.0
    # The bits of connection marks that say by which rule's owner a connection was begun.
    owner_mask: Annotated[int, BeforeValidator(parse_mask), Field(gt=0, le=0xFFFFFFFF)] = OWNERS_MASK
    # Whose DNS answers are believed (`verify`, `dst_name`); without it, those that /etc/resolv.conf names and the local stub.
    resolvers: Annotated[tuple[AddressField, ...] | None, Field(min_length=1, strict=False)] = None
    # How workers are shut in: with all that the kernel can do or not at all, with what it can do, or not.
    confinement: Literal["required", "available", "off"] = "available"


class LogConfig(_Model):
    """`[log]`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "journal", "console", "json"] = "auto"


class QueueConfig(_Model):
    """`[queue.NAME]`"""

    num: Annotated[int, Field(ge=0, le=LAST_QUEUE)] | None = None
    balance: Annotated[tuple[int, int], BeforeValidator(_numbers)] | None = None
    cpu_fanout: bool = False
    copy_mode: Annotated[Literal["packet", "meta"], Field(alias="copy")] = "packet"
    copy_range: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = "auto"
    max_len: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    fail_open: bool = True
    bypass: bool = True
    # Offloaded packets whole: by default wherever one packet is not many datagrams, of which only the first would be judged.
    gso: bool | Literal["auto"] = "auto"
    # How long a worker polls for packets before it sleeps: less latency for more CPU.
    busy_poll: Annotated[Duration, Field(le=0.01)] = 0.0
    # What each worker may allocate. A faulty element, or a flood that an element does not bound, is limited by it.
    memory: Annotated[Size, Field(ge=100_000_000)] = 1_000_000_000
    mode: Literal["enforce", "monitor"] = "enforce"
    default: Literal["accept", "drop"] = "accept"
    on_error: Literal["accept", "drop"] = "accept"
    # A connection whose beginning was not seen, where a name would decide.
    midstream: MidstreamMode = "accept"
    elements: tuple[str, ...] = Field(default=(), strict=False)

    @field_validator("copy_mode", mode="before")
    @classmethod
    def _no_black_hole(cls, value: object) -> object:
        if value == "none":
            raise ValueError(COPY_NONE_REASON)
        return value

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if self.num is not None and self.balance is not None:
            raise ValueError("num and balance both name the queue; allowed: one of them")
        if self.cpu_fanout and self.balance is None:
            raise ValueError('cpu_fanout spreads over several queues; allowed: with balance, as in balance = "100:103"')
        return self

    @property
    def numbers(self) -> range:
        """The queue numbers, one worker each. Without `num` and `balance`: 100."""
        if self.balance is not None:
            return range(self.balance[0], self.balance[1] + 1)
        number = 100 if self.num is None else self.num
        return range(number, number + 1)


COPY_NONE_REASON: Final = "copy mode none makes the kernel lose every packet of the queue, bypass or not; allowed: packet, meta"


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

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        for fault in (*self._target_faults(), *self._hook_faults()):
            raise ValueError(fault)
        return self

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
            yield "a hook is listed twice; allowed: each once"
        if self.owner is not None and self.owner_id is None:
            yield f"no user {self.owner!r} on this host; allowed: an existing user's name, or a uid"

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


# Where a proxy listens unless the configuration says otherwise.
LISTEN: Final = (Endpoint("0.0.0.0", 15002), Endpoint("0.0.0.0", 15006), Endpoint("::", 15002), Endpoint("::", 15006))


class ProxyConfig(_Model):
    """`[proxy.NAME]`"""

    listen: Annotated[tuple[EndpointField, ...], Field(strict=False)] = LISTEN
    target: Annotated[Endpoint | None, BeforeValidator(parse_target)] = None
    # The most bytes that an element sees at once. One read of the proxy is 64 KiB.
    chunk: Annotated[int, Field(ge=1, le=1 << 20)] = 65536
    on_error: Literal["pass", "drop"] = "pass"
    elements: Annotated[tuple[str, ...], Field(strict=False)] = ()
    # How connections are taken: REDIRECT in table nat, or TPROXY in table mangle.
    capture: Literal["redirect", "tproxy"] = "redirect"
    # Whether rules of ours accept what is led to the proxy in front of a host firewall that drops in hook INPUT.
    accept_input: bool = False
    # Networks whose connections are not redirected.
    exclude: Annotated[tuple[NetworkField, ...], Field(strict=False)] = ()
    connect_timeout: Annotated[Duration, Field(gt=0)] = 10.0
    # Deadlines of a connection, 0 for none: until its first byte is carried; without a byte either way; without a byte that one
    # side sends or takes; and without a byte either way while `max_connections` is reached.
    opening_timeout: Duration = 60.0
    idle_timeout: Duration = 3600.0
    client_timeout: Duration = 3600.0
    server_timeout: Duration = 3600.0
    idle_when_full: Duration = 60.0
    # Silence after which the kernel probes whether a side is still there; 0 for no probes.
    keepalive: Annotated[Duration, Field(le=32767)] = 60.0
    # How long connections may continue after the rules are removed; then they are reset.
    drain: Duration = 10.0
    # Processes that share the listeners.
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    # Connections at once, in each process; further ones wait in the kernel's backlog.
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    # Connections at once from one source, in each process; further ones are refused. 0 for no limit.
    max_per_source: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    # Bytes that may wait in each direction of a connection while elements look at it.
    buffer: Annotated[int, Field(ge=4096, le=1 << 26)] = 256 * 1024
    # TPROXY only: speak to the destination with the client's own address.
    keep_client: bool = False
    # The packet mark of what the proxy sends to the destination.
    mark: MarkField | None = None
    # What marks the proxy's own packets to the destination, so that no rule of any instance takes them again.
    own_mark: MarkField = OWN_TRAFFIC
    # TPROXY only: the mark that sends its packets to this host.
    tproxy_mark: MarkField = Mark(0x800, 0x800)

    @model_validator(mode="after")
    def _listens(self) -> Self:
        if not self.listen:
            raise ValueError('a proxy without a listener; allowed: listen = ["HOST:PORT", ...]')
        if self.keep_client and self.capture != "tproxy":
            raise ValueError('keep_client = true needs the rules of TPROXY; allowed: with capture = "tproxy"')
        return self

    @property
    def own_traffic(self) -> Mark:
        """The mark by which rules know the proxy's own packets: `own_mark`, or `mark` where that sets the same bits."""
        return self.own_mark if self.mark is None or not self.mark.mask & self.own_mark.mask else self.mark

    @property
    def sent_mark(self) -> int:
        """The mark that the proxy's own packets carry."""
        return self.own_traffic.value | (0 if self.mark is None else self.mark.value)


# Questions that the configuration asks an element's class about its options.
_HOOKS: Final = ("names_of", "needs_of", "rewrites_of", "reads_process_of", "injects_of", "kept_of")


@dataclass(frozen=True, slots=True)
class ElementSpec:
    """An element as the configuration names it: its class, and the checked options of its table."""

    name: str
    cls: type[Any]
    options: Any


class Config(_Model):
    """Everything, checked. `load` makes it; `DEFAULT` applies without a file."""

    agent: Agent = Agent()
    log: LogConfig = LogConfig()
    queue: dict[Name, QueueConfig] = {}
    element: dict[Name, dict[str, Any]] = {}
    rules: dict[Name, RuleConfig] = {}
    proxy: dict[Name, ProxyConfig] = {}
    tap: dict[Name, TapConfig] = {}
    inline: dict[Name, InlineConfig] = {}
    _lookups: HostLookups = PrivateAttr(default_factory=HostLookups)
    _specs: dict[tuple[str, str, str], ElementSpec] = PrivateAttr(default_factory=dict)

    def packet_elements(self, queue: QueueConfig | CaptureConfig) -> list[ElementSpec]:
        """The elements of a queue, a tap or an inline link in order. Raises ElementError."""
        return [self._resolve(name, packet_element) for name in queue.elements]

    def stream_elements(self, proxy: ProxyConfig) -> list[ElementSpec]:
        """The elements of a proxy in order. Raises ElementError likewise."""
        return [self._resolve(name, stream_element) for name in proxy.elements]

    def __eq__(self, other: object) -> bool:
        """Compares the configuration, not what was looked up so far."""
        return isinstance(other, Config) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # its tables are dictionaries

    def with_lookups(self, lookups: HostLookups) -> Self:
        """The same configuration; names and list files are looked up through `lookups`."""
        self._lookups = lookups
        return self

    def changed_lists(self) -> list[Path]:
        """The list files (`file:`) of elements that have changed since they were read, or since this was last asked."""
        return self._lookups.changed()

    def _resolve(self, name: str, find: Any) -> ElementSpec:
        table = dict(self.element.get(name, {}))
        # List files may be long, and this is called often.
        key = (name, find.__name__, repr(table))
        if (known := self._specs.get(key)) is not None:
            return known
        kind = table.pop("type", name)
        cls = find(kind)
        try:
            options = cls.Options.from_table(table, self._lookups)
            # The element's own code; a fault in it is one of the configuration, with its line.
            for hook in _HOOKS:
                getattr(cls, hook, bool)(options)
        except ValidationError as error:
            raise ElementError(name, error, cls.Options) from error
        except Exception as error:
            raise ElementError(name, f"{kind} cannot be used: {where(error)}") from error
        self._specs[key] = spec = ElementSpec(name, cls, options)
        return spec

    def host_resolvers(self) -> list[IPv4Address | IPv6Address]:
        """The name servers that this host asks."""
        return resolvers_of_host(self._lookups)

    def kept(self, queue: QueueConfig) -> Kept | None:
        """The marks by which the kernel keeps this queue's verdicts on flows; None where no element offloads."""
        for spec in self.packet_elements(queue):
            marks: Kept | None = spec.cls.kept_of(spec.options)
            if marks is not None:
                return marks
        return None

    def takes_whole(self, queue: QueueConfig) -> bool:
        """Whether offloaded packets come whole: what the file says, else where no element has to see each datagram."""
        if queue.gso != "auto":
            return queue.gso
        specs = self.packet_elements(queue)
        return not any(spec.cls.rewrites_of(spec.options) for spec in specs) and not (specs and self.gets_udp(queue))

    def gets_udp(self, queue: QueueConfig) -> bool:
        """Whether a rule sends UDP to this queue."""
        return any(rule.takes_udp for rule in self.rules.values() if rule.queue and self.queue.get(rule.queue) is queue)

    def copy_range(self, queue: QueueConfig) -> int:
        """Bytes to copy of each packet of this queue: what the file says, else the least that its elements need."""
        return self.least_copied(queue) if queue.copy_range == "auto" else queue.copy_range

    def least_copied(self, queue: QueueConfig | CaptureConfig) -> int:
        """Bytes of each packet that its elements need, from the IP header on."""
        needs = max((spec.cls.needs_of(spec.options) for spec in self.packet_elements(queue)), default=Needs.METADATA)
        if needs is Needs.METADATA:
            return HEADER_BYTES
        if needs is not Needs.HEADERS:
            return WHOLE_PACKET
        fed = [rule for rule in self.rules.values() if rule.queue is not None and self.queue.get(rule.queue) is queue]
        return HEADER_BYTES if fed and all("inet6" not in rule.families for rule in fed) else HEADER_BYTES_V6
