"""The configuration: frozen pydantic models, and `load`, which reads a TOML file and its drop-ins into one.

It says what is wrong with file, key and what is allowed; it never guesses and never drops a key that it does not know.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from nfq_agent.duration import Duration
from nfq_agent.element import Needs, PacketElement
from nfq_agent.elements import ElementError, look_in, packet_element, stream_element
from nfq_agent.mark import Kept, Mark, MarkField
from nfq_agent.size import Size

DEFAULT_PATH: Final = Path("/etc/nfq-agent/nfq-agent.toml")

TABLE_HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    "mangle": ("prerouting", "input", "forward", "output", "postrouting"),
    "raw": ("prerouting", "output"),
    "filter": ("input", "forward", "output"),
    # REDIRECT is valid in these two only (ip_tables extension xt_REDIRECT).
    "nat": ("prerouting", "output"),
}
# The owner match knows a socket in these hooks only (iptables-extensions(8)).
OWNER_HOOKS: Final = ("output", "postrouting")
# The header bytes that the kernel has to copy so that addresses and ports can be read: IPv6, a chain of extension
# headers, TCP with its options.
HEADER_BYTES: Final = 128
WHOLE_PACKET: Final = 65535


class ConfigError(Exception):
    """A configuration that can't be used. `faults` holds one line each: `FILE: KEY: what is wrong; what is allowed`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """A port, or a range of them with both ends in it."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}:{self.last}"


def _ports(value: object) -> Ports:
    if isinstance(value, Ports):
        return value
    allowed = 'allowed: 1 to 65535, or a range as "8000:8010"'
    if isinstance(value, int) and not isinstance(value, bool):
        ports = Ports(value, value)
    elif isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d+)", value)):
        ports = Ports(int(match[1]), int(match[2]))
        if ports.first > ports.last:
            raise ValueError(f"range {value} ends before it begins; {allowed}")
    else:
        raise ValueError(f"{value!r} is no port; {allowed}")
    if ports.first < 1 or ports.last > 65535:
        raise ValueError(f"no port {value}; {allowed}")
    return ports


def _numbers(value: object) -> tuple[int, int]:
    """A `balance` range of queue numbers."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d+)", value)):
        first, last = int(match[1]), int(match[2])
        if last > 65535:
            raise ValueError(f"no queue {last}; allowed: 0 to 65535")
        if first >= last:
            raise ValueError(f'range {value} does not rise; allowed: FIRST:LAST with FIRST below LAST, as in "100:103"')
        return first, last
    raise ValueError('not a range of queue numbers; allowed: FIRST:LAST, as in "100:103"')


@dataclass(frozen=True, slots=True)
class Endpoint:
    """HOST:PORT; an IPv6 address stands in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _endpoint(value: object) -> Endpoint:
    if isinstance(value, Endpoint):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):(\d+)", value)):
        port = int(match[3])
        if not 1 <= port <= 65535:
            raise ValueError(f"no port {port}; allowed: 1 to 65535")
        return Endpoint(match[1] or match[2], port)
    raise ValueError(f'{value!r} is no endpoint; allowed: HOST:PORT, as in "0.0.0.0:15002" or "[::]:15002"')


def _target(value: object) -> Endpoint | None:
    return None if value is None or value == "" else _endpoint(value)


def _network(value: object) -> IPv4Network | IPv6Network:
    if isinstance(value, (IPv4Network, IPv6Network)):
        return value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return ip_network(value)
    raise ValueError(f'{value!r} is no network; allowed: ADDRESS/LENGTH without host bits, as in "10.0.0.0/8"')


PortsField = Annotated[Ports, BeforeValidator(_ports)]
NetworkField = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
EndpointField = Annotated[Endpoint, BeforeValidator(_endpoint)]
NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
Name = Annotated[str, Field(pattern=NAME)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Agent(_Model):
    """`[agent]`"""

    instance: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,12}$")] = "default"
    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = "proxyuser"
    backend: Literal["auto", "legacy", "nft"] = "auto"
    drift_check: Duration = 5.0


class Log(_Model):
    """`[log]`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "journal", "console", "json"] = "auto"


class QueueConfig(_Model):
    """`[queue.NAME]`"""

    num: Annotated[int, Field(ge=0, le=65535)] | None = None
    balance: Annotated[tuple[int, int], BeforeValidator(_numbers)] | None = None
    cpu_fanout: bool = False
    copy_mode: Annotated[Literal["packet", "meta"], Field(alias="copy")] = "packet"
    copy_range: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = "auto"
    max_len: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    fail_open: bool = True
    bypass: bool = True
    gso: bool = True
    # How long a worker looks for packets before it sleeps: latency for CPU.
    busy_poll: Annotated[Duration, Field(le=0.01)] = 0.0
    # What each worker may allocate. A faulty element, or a flood that one has no bound for, gets no further.
    memory: Annotated[Size, Field(ge=100_000_000)] = 1_000_000_000
    mode: Literal["enforce", "monitor"] = "enforce"
    default: Literal["accept", "drop"] = "accept"
    on_error: Literal["accept", "drop"] = "accept"
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


class RuleConfig(_Model):
    """`[rules.NAME]`"""

    queue: str | None = None
    proxy: str | None = None
    family: Literal["unspec", "inet", "inet6"] = "unspec"
    table: Literal["mangle", "raw", "filter", "nat"] | None = None
    hooks: Annotated[
        tuple[Literal["prerouting", "input", "forward", "output", "postrouting"], ...],
        Field(min_length=1, strict=False),
    ] = ("input", "output")
    tcp_ports: Annotated[tuple[PortsField, ...], Field(strict=False)] = ()
    udp_ports: Annotated[tuple[PortsField, ...], Field(strict=False)] = ()
    tcp_syn: bool = False
    all: bool = False
    role: Literal["server", "client", "both"] | None = None
    interface: Annotated[str, Field(pattern=r"^[^\s/!]{1,15}$")] | None = None
    owner: Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=0, le=0xFFFFFFFE)] | None = None
    mark: MarkField | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if (self.queue is None) == (self.proxy is None):
            raise ValueError("a rule sends its traffic to one place; allowed: queue = NAME, or proxy = NAME")
        if self.proxy is not None:
            if self.table not in (None, "nat"):
                raise ValueError(f"table {self.table} can't redirect to a proxy; allowed: nat")
            if self.udp_ports or self.tcp_syn or self.all:
                raise ValueError("a proxy takes TCP ports only; allowed: tcp_ports")
            if self.role not in (None, "client"):
                raise ValueError(f"role {self.role}: redirection looks at the destination port only; allowed: client")
        elif self.table == "nat":
            raise ValueError("table nat sees the first packet of a connection only; allowed: mangle, raw, filter")
        if not (self.tcp_ports or self.udp_ports or self.tcp_syn or self.all):
            raise ValueError("the rule takes no traffic; allowed: tcp_ports, udp_ports, tcp_syn = true or all = true")
        if self.all and (self.tcp_ports or self.udp_ports or self.tcp_syn):
            raise ValueError("all = true takes everything; allowed: without tcp_ports, udp_ports and tcp_syn")
        for hook in self.hooks:
            if hook not in TABLE_HOOKS[self.table_name]:
                raise ValueError(
                    f"table {self.table_name} has no hook {hook}; allowed: {', '.join(TABLE_HOOKS[self.table_name])}"
                )
        if len(set(self.hooks)) != len(self.hooks):
            raise ValueError("a hook stands twice; allowed: each once")
        if self.owner is not None:
            for hook in self.hooks:
                if hook not in OWNER_HOOKS:
                    raise ValueError(f"owner is not known to the kernel in hook {hook}; allowed: {', '.join(OWNER_HOOKS)}")
            if self.uid is None:
                raise ValueError(f"no user {self.owner!r} on this host; allowed: an existing user's name, or a uid")
        return self

    @property
    def table_name(self) -> str:
        """The table it lives in: mangle, or nat for a proxy, unless the file says otherwise."""
        return self.table or ("mangle" if self.proxy is None else "nat")

    @property
    def families(self) -> tuple[Literal["inet", "inet6"], ...]:
        """The address families it covers."""
        return ("inet", "inet6") if self.family == "unspec" else (self.family,)

    @property
    def uid(self) -> int | None:
        """The numeric id of `owner`; None where there is no owner or no such user."""
        if self.owner is None or isinstance(self.owner, int):
            return self.owner
        if self.owner.isdecimal():
            return int(self.owner)
        try:
            return pwd.getpwnam(self.owner).pw_uid
        except KeyError:
            return None


class ProxyConfig(_Model):
    """`[proxy.NAME]`"""

    listen: Annotated[tuple[EndpointField, ...], Field(strict=False)] = ()
    target: Annotated[Endpoint | None, BeforeValidator(_target)] = None
    chunk: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    on_error: Literal["pass", "drop"] = "pass"
    elements: Annotated[tuple[str, ...], Field(strict=False)] = ()
    # How connections are taken: REDIRECT in table nat, or TPROXY in table mangle.
    capture: Literal["redirect", "tproxy"] = "redirect"
    # Networks whose connections are left alone.
    exclude: Annotated[tuple[NetworkField, ...], Field(strict=False)] = ()
    connect_timeout: Annotated[Duration, Field(gt=0)] = 10.0
    # How long connections may go on after the rules are gone; then they are reset.
    drain: Duration = 10.0
    # Processes that share the listeners.
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    # Connections at once, in each process; further ones wait in the kernel's backlog.
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    # Bytes that may wait in each direction of a connection while elements look at it.
    buffer: Annotated[int, Field(ge=4096, le=1 << 26)] = 256 * 1024
    # TPROXY only: speak to the destination with the client's own address.
    keep_client: bool = False
    # The packet mark of what the proxy sends to the destination.
    mark: MarkField | None = None
    # TPROXY only: the mark that sends its packets to this host.
    tproxy_mark: MarkField = Mark(0x800, 0x800)

    @model_validator(mode="after")
    def _listens(self) -> Self:
        if not self.listen:
            raise ValueError('a proxy without a listener; allowed: listen = ["HOST:PORT", ...]')
        if self.keep_client and self.capture != "tproxy":
            raise ValueError('keep_client = true needs the rules of TPROXY; allowed: with capture = "tproxy"')
        return self


@dataclass(frozen=True, slots=True)
class ElementSpec:
    """An element as the configuration names it: its class, and the checked options of its table."""

    name: str
    cls: type[Any]
    options: Any


class Config(_Model):
    """Everything, checked. `load` makes it; `DEFAULT` is what holds with no file at all."""

    agent: Agent = Agent()
    log: Log = Log()
    queue: dict[Name, QueueConfig] = {}
    element: dict[Name, dict[str, Any]] = {}
    rules: dict[Name, RuleConfig] = {}
    proxy: dict[Name, ProxyConfig] = {}

    def packet_elements(self, queue: QueueConfig) -> list[ElementSpec]:
        """The elements of a queue in order. Raises ElementError where one can't be found or does not take its options."""
        return [self._resolve(name, packet_element) for name in queue.elements]

    def stream_elements(self, proxy: ProxyConfig) -> list[ElementSpec]:
        """The elements of a proxy in order. Raises ElementError likewise."""
        return [self._resolve(name, stream_element) for name in proxy.elements]

    def _resolve(self, name: str, find: Any) -> ElementSpec:
        table = dict(self.element.get(name, {}))
        kind = table.pop("type", name)
        cls = find(kind)
        try:
            options = cls.Options.model_validate(table)
        except ValidationError as error:
            raise ElementError(name, error, cls.Options) from error
        return ElementSpec(name, cls, options)

    def kept(self, queue: QueueConfig) -> Kept | None:
        """The marks by which the kernel keeps this queue's verdicts on flows; None where no element offloads."""
        for spec in self.packet_elements(queue):
            marks: Kept | None = spec.cls.kept_of(spec.options)
            if marks is not None:
                return marks
        return None

    def copy_range(self, queue: QueueConfig) -> int:
        """Bytes to copy of each packet of this queue: what the file says, else the least that its elements need."""
        if queue.copy_range != "auto":
            return queue.copy_range
        needs = max((spec.cls.needs_of(spec.options) for spec in self.packet_elements(queue)), default=Needs.METADATA)
        return {Needs.METADATA: 0, Needs.HEADERS: HEADER_BYTES}.get(needs, WHOLE_PACKET) or HEADER_BYTES


# What the agent does with no configuration file at all: shared with the packaged default file.
BASELINE: Final[dict[str, Any]] = {
    "queue": {"main": {"num": 100}},
    "rules": {"app": {"queue": "main", "tcp_ports": [11000]}},
}


@dataclass(frozen=True, slots=True)
class _Source:
    """Which file each key came from, by its dotted path."""

    main: Path
    origins: dict[tuple[str, ...], Path]

    def file(self, location: tuple[str, ...]) -> Path:
        for end in range(len(location), 0, -1):
            if (path := self.origins.get(location[:end])) is not None:
                return path
        return self.main


def load(path: Path | None = None, adjust: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None) -> Config:
    """Read the file and the drop-ins beside it (`conf.d/*.toml`, in name order), check all of it, and return it.

    Without a path, the default place is read if something is there, else the baseline holds. `adjust` sees what was read
    and returns what the command line wants otherwise; that is merged last. Raises ConfigError with every fault found.
    """
    if path is None:
        path = DEFAULT_PATH
        files = [path] if path.exists() else []
    else:
        files = [path]
    merged: dict[str, Any] = {}
    source = _Source(path, {})
    faults: list[str] = []
    try:
        files += _drop_ins(path)
    except ConfigError as error:
        faults += error.faults
    for file in files:
        try:
            _merge(merged, _read(file), file, source.origins)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    try:
        look_in(path.parent / "elements")
    except ElementError as error:
        raise ConfigError([f"{error.name}: {error.reason}"]) from error
    if not files:
        merged = copy.deepcopy(BASELINE)
    if adjust is not None:
        _merge(merged, adjust(merged), Path("command line"), source.origins)
    return _check(merged, source)


def _drop_ins(path: Path) -> list[Path]:
    folder = path.parent / "conf.d"
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError([f"{folder}: can't be read: {error.strerror}; allowed: a folder of *.toml files"]) from error
    if mode & stat.S_IWOTH:
        raise ConfigError([f"{folder}: anyone may write to this directory; allowed: chmod o-w {folder}"])
    try:
        return sorted(child for child in folder.iterdir() if child.suffix == ".toml")
    except OSError as error:
        raise ConfigError([f"{folder}: can't be read: {error.strerror}; allowed: a folder of *.toml files"]) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}; allowed: a readable TOML file"]) from error
    try:
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not TOML: {error}; allowed: TOML 1.0"]) from error


def _merge(
    into: dict[str, Any],
    new: Mapping[str, Any],
    file: Path,
    origins: dict[tuple[str, ...], Path],
    at: tuple[str, ...] = (),
) -> None:
    for key, value in new.items():
        here = (*at, key)
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                origins[here] = file
            _merge(into[key], value, file, origins, here)
        else:
            into[key] = value
            origins[here] = file


def _check(merged: dict[str, Any], source: _Source) -> Config:
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(list(_faults(source, error))) from error
    faults = list(_cross_faults(config, source))
    if faults:
        raise ConfigError(faults)
    return config


def _cross_faults(config: Config, source: _Source) -> Iterator[str]:
    """What only shows when tables are looked at together."""

    def fault(location: tuple[str, ...], text: str) -> str:
        return f"{source.file(location)}: {'.'.join(location)}: {text}"

    owners: dict[int, str] = {}
    for name, queue in config.queue.items():
        for number in queue.numbers:
            if number in owners:
                yield fault(
                    ("queue", name, "num" if queue.balance is None else "balance"),
                    f"queue {number} is [queue.{owners[number]}]'s already; allowed: a number of its own for each queue",
                )
                break
            owners[number] = name
        try:
            specs = config.packet_elements(queue)
        except ElementError as error:
            yield from _element_faults(error, ("queue", name, "elements"), source, config)
        else:
            if queue.copy_mode == "meta":
                for spec in specs:
                    if spec.cls.needs_of(spec.options) > Needs.METADATA and not spec.cls.degrades:
                        yield fault(
                            ("queue", name, "copy"),
                            f'"meta" beside {spec.name!r}, which reads what is in a packet; allowed: "packet"',
                        )
            if queue.gso and (writers := [spec.name for spec in specs if spec.cls.rewrites_of(spec.options)]):
                yield fault(
                    ("queue", name, "gso"),
                    f"gso = true beside {writers[0]!r}, which rewrites packets: an offloaded packet can't be rewritten; "
                    "allowed: gso = false",
                )
    listeners: dict[Endpoint, str] = {}
    for name, proxy in config.proxy.items():
        for endpoint in proxy.listen:
            if endpoint in listeners:
                yield fault(
                    ("proxy", name, "listen"),
                    f"{endpoint} is in use by [proxy.{listeners[endpoint]}] already; allowed: a listener of its own",
                )
            listeners[endpoint] = name
        try:
            config.stream_elements(proxy)
        except ElementError as error:
            yield from _element_faults(error, ("proxy", name, "elements"), source, config)
    for name, rule in config.rules.items():
        for kind, wanted, there in (("queue", rule.queue, config.queue), ("proxy", rule.proxy, config.proxy)):
            if wanted is not None and wanted not in there:
                names = ", ".join(sorted(there)) or f"none is configured; add [{kind}.{wanted}]"
                yield fault(("rules", name, kind), f"no {kind} {wanted!r} is configured; allowed: {names}")
        if rule.table_name == "raw" and (queue_of := config.queue.get(rule.queue or "")) is not None:
            try:
                marks = config.kept(queue_of)
            except ElementError:
                # Said above.
                continue
            if marks is not None:
                yield fault(
                    ("rules", name, "table"),
                    "table raw comes before connection tracking, so that offload finds no connection to mark; "
                    "allowed: mangle, filter",
                )
        if rule.proxy in config.proxy and config.proxy[rule.proxy].capture == "tproxy":
            if rule.hooks != ("prerouting",):
                yield fault(("rules", name, "hooks"), 'TPROXY takes what arrives only; allowed: hooks = ["prerouting"]')
            if rule.table is not None:
                yield fault(("rules", name, "table"), f"table {rule.table} has no TPROXY; allowed: without table (it is mangle)")
    # An element that can't be had was said above.
    with contextlib.suppress(ElementError):
        for location, text in _mark_faults(config):
            yield fault(location, text)


def _mark_faults(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Marks of ours that would get into each other's way: key and text for each. Raises ElementError."""
    taken: list[tuple[str, Mark]] = []
    for name, proxy in config.proxy.items():
        if proxy.capture == "tproxy":
            taken.append((f"proxy.{name}.tproxy_mark", proxy.tproxy_mark))
        if proxy.mark is not None:
            taken.append((f"proxy.{name}.mark", proxy.mark))
    seen: set[str] = set()
    for queue in config.queue.values():
        for spec in config.packet_elements(queue):
            marks = spec.cls.kept_of(spec.options)
            if marks is None or spec.name in seen:
                continue
            seen.add(spec.name)
            for other, mark in taken:
                if mark.mask & marks.mask:
                    text = f"its mask {marks.mask:#x} shares bits with {other} = {mark}; allowed: bits of its own for each"
                    yield ("element", spec.name, "mark"), text
            taken.append((f"element.{spec.name}.mark", marks.accept))


def _element_faults(error: ElementError, at: tuple[str, ...], source: _Source, config: Config) -> Iterator[str]:
    if isinstance(error.reason, ValidationError):
        yield from _faults(source, error.reason, ("element", error.name), error.options)
    else:
        if error.name in config.element or any(t.get("type") == error.name for t in config.element.values()):
            at = ("element", next((n for n, t in config.element.items() if t.get("type", n) == error.name), error.name))
        yield f"{source.file(at)}: {'.'.join(at)}: {error.reason}"


# A union's branches and validators' names show up in pydantic's locations; they are no keys of the file.
_NO_KEYS = re.compile(r"^(function-|tagged-union|constrained-|literal\[|int$|str$|bool$|float$|.*\[.*\]$)")


def _faults(
    source: _Source, error: ValidationError, prefix: tuple[str, ...] = (), options: type[BaseModel] | None = None
) -> Iterator[str]:
    """One line for each key: what is wrong with it, and all that would be allowed (a union complains once for each member)."""
    found: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for details in error.errors():
        location = prefix + tuple(str(part) for part in details["loc"] if not _NO_KEYS.match(str(part)))
        keys = tuple(part for part in location if not part.isdecimal())
        if details["type"] == "too_short" and keys in found:
            # Nothing was left of a list once its bad members were taken out.
            continue
        what, allowed = _fault(keys, details, options)
        known = found.setdefault(keys, (what, []))[1]
        if allowed not in known:
            known.append(allowed)
    for keys, (what, allowed_here) in found.items():
        yield f"{source.file(keys)}: {'.'.join(keys) or 'the file'}: {what}; allowed: {', or '.join(allowed_here)}"


def _fault(keys: tuple[str, ...], details: Any, options: type[BaseModel] | None) -> tuple[str, str]:
    """What is wrong, and what is allowed."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(keys[:-1], options)
        near = difflib.get_close_matches(keys[-1], known, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"unknown key{hint}", ", ".join(known) or "see nfq-agent.toml(5)"
    if kind == "value_error":
        what, _, allowed = str(context["error"]).partition("; allowed: ")
        return what, allowed
    return f"{_shown(details['input'])}: {details['msg'].lower()}", _allowed(kind, context)


def _allowed(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
    if kind == "string_pattern_mismatch":
        return f"what matches {context['pattern']}"
    if kind == "too_short":
        return f"at least {context['min_length']} of them"
    return {"bool_type": "true or false", "int_type": "a whole number", "string_type": "a string in quotes"}.get(
        kind, "see nfq-agent.toml(5)"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_TABLES: Final[Mapping[str, type[BaseModel]]] = {
    "agent": Agent, "log": Log, "queue": QueueConfig, "rules": RuleConfig, "proxy": ProxyConfig,
}  # fmt: skip


def _known_keys(at: tuple[str, ...], options: type[BaseModel] | None) -> list[str]:
    if not at:
        return list(Config.model_fields)
    if at[0] == "element":
        inner = options
        for key in at[2:]:
            inner = None if inner is None or key not in inner.model_fields else _model_in(inner.model_fields[key].annotation)
        known = [] if inner is None else list(inner.model_fields)
        return ["type", *known] if len(at) == 2 else known
    model = _TABLES.get(at[0])
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a key's type is made of, as in tuple[Model, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := _model_in(each)) is not None), None)


def log_settings(config: Log) -> Log:
    """The log settings in force: LOG_LEVEL and LOG_FORMAT in the environment win over the file. Raises ConfigError."""
    values: dict[str, str] = {}
    for key in ("level", "format"):
        variable = f"LOG_{key.upper()}"
        if value := os.environ.get(variable):
            allowed = get_args(Log.model_fields[key].annotation)
            if value.lower() not in allowed:
                raise ConfigError([f"environment: {variable}: {value!r} is unknown; allowed: {', '.join(allowed)}"])
            values[key] = value.lower()
    return config.model_copy(update=values)


def target_in_force(proxy: ProxyConfig) -> Endpoint | None:
    """The target of a proxy: TARGET_ADDR in the environment wins over the file. Raises ConfigError."""
    value = os.environ.get("TARGET_ADDR")
    if not value:
        return proxy.target
    try:
        return _endpoint(value)
    except ValueError as error:
        raise ConfigError([f"environment: TARGET_ADDR: {error}"]) from error


def warnings(config: Config) -> Iterator[str]:
    """What is allowed, but may surprise."""
    for name, rule in config.rules.items():
        if rule.table_name == "filter":
            yield (
                f"rules.{name}: in table filter an ACCEPT verdict, or bypass, skips the host firewall's later rules; "
                "in mangle it does not"
            )
        if rule.queue is not None and not config.queue[rule.queue].bypass:
            yield f"rules.{name}: bypass = false keeps this traffic out whenever no agent serves queue {rule.queue}"
    for name in config.queue:
        if not any(rule.queue == name for rule in config.rules.values()):
            yield f"queue.{name}: no rule sends anything to it"


__all__ = ["BASELINE", "DEFAULT_PATH", "Config", "ConfigError", "ElementSpec", "PacketElement", "load"]
