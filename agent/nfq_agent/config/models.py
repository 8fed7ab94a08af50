"""The configuration: frozen models. Checks that compare tables are in problems.py; file.py reads the file.

A value is never guessed, and an unknown key is never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from nfq_agent.access import Access
from nfq_agent.config.capture import CaptureConfig, InlineConfig, TapConfig
from nfq_agent.config.geo import Stamp
from nfq_agent.config.lookups import HostLookups, resolvers_of_host
from nfq_agent.config.model import Model
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.elements import ElementError, packet_element, stream_element
from nfq_agent.elements.loading import Interrupted, interruptible, where
from nfq_agent.field import AfterValidator, BeforeValidator, Field
from nfq_agent.mark import OWNERS_MASK, Kept, parse_mask
from nfq_agent.values import AddressField, Duration, MidstreamMode, Size

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
        raise ValueError(f'range {value} does not increase; allowed: FIRST:LAST with FIRST below LAST, as in "100:103"')
    return numbers


INSTANCE: Final = r"^[a-z0-9-]{1,12}$"
INSTANCE_FORM: Final = "1 to 12 small letters, digits and hyphens"
NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
USER: Final = r"^[a-z_][a-z0-9_-]{0,31}$"
Name = Annotated[str, Field(pattern=NAME)]


class Agent(Model):
    """`[agent]`"""

    instance: Annotated[str, Field(pattern=INSTANCE)] = "default"
    user: Annotated[str, Field(pattern=USER)] = "proxyuser"
    backend: Literal["auto", "legacy", "owned"] = "auto"
    drift_check: Duration = 5.0
    # The bits of connection marks that say by which rule's owner a connection was begun.
    owner_mask: Annotated[int, BeforeValidator(parse_mask), Field(gt=0, le=0xFFFFFFFF)] = OWNERS_MASK
    # The resolvers whose answers are used (`verify`, `dst_name`); without it, those of /etc/resolv.conf and the local stub.
    resolvers: Annotated[tuple[AddressField, ...] | None, Field(min_length=1, strict=False)] = None
    # How workers are confined: with all that the kernel can do or not at all, with what it can do, or not.
    confinement: Literal["required", "available", "off"] = "available"
    # Reload when a file of the configuration changes, as Kubernetes changes a mounted ConfigMap; without it, on request only.
    reload_on_change: bool = False
    # Sockets of Docker or Podman, which tell the names of containers.
    container_sockets: Annotated[tuple[Annotated[str, Field(pattern=r"^/")], ...], Field(strict=False)] = ()


def _filter(text: str) -> str:
    """A filter that can be read."""
    # Loaded only where there is one, as what elements need is: a start forks the process that checks before it loads these.
    from nfq_agent.flow_filter import FilterError, parse

    try:
        parse(text)
    except FilterError as error:
        raise ValueError(error.quoted) from error
    return text


class LogConfig(Model):
    """`[log]`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "journal", "console", "json"] = "auto"
    # Which flows have lines. Warnings, errors, and lines that are not about a flow are always written.
    when: Annotated[str, AfterValidator(_filter)] = ""


COPY_NONE_REASON: Final = "copy mode none makes the kernel lose every packet of the queue, bypass or not; allowed: packet, meta"


def _no_black_hole(value: object) -> object:
    if value == "none":
        raise ValueError(COPY_NONE_REASON)
    return value


class QueueConfig(Model):
    """`[queue.NAME]`"""

    num: Annotated[int, Field(ge=0, le=LAST_QUEUE)] | None = None
    balance: Annotated[tuple[int, int], BeforeValidator(_numbers)] | None = None
    cpu_fanout: bool = False
    copy_mode: Annotated[Literal["packet", "meta"], BeforeValidator(_no_black_hole), Field(alias="copy")] = "packet"
    copy_range: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = "auto"
    max_len: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    # Packets of flows that were answered before which may wait in a second queue, beside the `max_len` of new ones; 0 for none.
    room_for_known: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    fail_open: bool = True
    bypass: bool = True
    # Offloaded packets whole: by default wherever one packet is not many datagrams, of which only the first would be judged.
    gso: bool | Literal["auto"] = "auto"
    # How long a worker polls for packets before it sleeps: less latency for more CPU. "auto": while it pays.
    busy_poll: Annotated[Duration, Field(le=0.01)] | Literal["auto"] = 0.0
    # What each worker may allocate. A faulty element, or a flood that an element does not bound, is limited by it.
    memory: Annotated[Size, Field(ge=100_000_000)] = 1_000_000_000
    mode: Literal["enforce", "monitor"] = "enforce"
    default: Literal["accept", "drop"] = "accept"
    on_error: Literal["accept", "drop"] = "accept"
    # A line for each flow that is dropped, or that monitor mode would drop, where no element logs it.
    log_drops: bool = True
    # "auto": the first rules of a policy that headers alone decide are rules of the kernel in front of the queue, where the
    # backend is `owned` and no element has to see the packets. "first": elements see the first packets of the flows, at a rate.
    compile_mode: Annotated[Literal["off", "auto", "first"], Field(alias="compile")] = "off"
    # A connection whose beginning was not seen, where a name would decide.
    midstream: MidstreamMode = "accept"
    elements: Annotated[tuple[str, ...], Field(strict=False)] = ()

    def faults(self) -> Iterator[str]:
        """Keys that do not go together."""
        if self.num is not None and self.balance is not None:
            yield "num and balance both name the queue; allowed: one of them"
        if self.cpu_fanout and self.balance is None:
            yield 'cpu_fanout spreads over several queues; allowed: with balance, as in balance = "100:103"'
        if self.cpu_fanout and self.room_for_known:
            yield (
                "room_for_known beside cpu_fanout: a worker sends what is another's on through that one's queue for new flows; "
                "allowed: one of them"
            )
        if self.known_numbers and self.known_numbers[-1] > LAST_QUEUE:
            yield (
                f"room_for_known takes the queue numbers behind those of num or balance, up to {self.known_numbers[-1]}; "
                f"allowed: 0 to {LAST_QUEUE}"
            )

    @property
    def numbers(self) -> range:
        """The queue numbers, one worker each. Without `num` and `balance`: 100."""
        if self.balance is not None:
            return range(self.balance[0], self.balance[1] + 1)
        number = 100 if self.num is None else self.num
        return range(number, number + 1)

    @property
    def known_numbers(self) -> range:
        """The queue numbers of flows that were answered before, one for each of `numbers` and behind them; empty without
        `room_for_known`."""
        numbers = self.numbers
        return range(numbers.stop, numbers.stop + len(numbers)) if self.room_for_known else range(0)


@cache
def _hooks() -> list[str]:
    """Questions that the configuration asks an element's class about its options."""
    from nfq_agent.element import PacketElement
    from nfq_agent.stream import StreamElement

    return sorted({name for base in (PacketElement, StreamElement) for name in dir(base) if name.endswith("_of")})


@dataclass(frozen=True, slots=True)
class ElementSpec:
    """An element as the configuration names it: its class, and the checked options of its table."""

    name: str
    cls: type[Any]
    options: Any


@dataclass(slots=True)
class _State:
    """What a configuration knows besides its keys. lookups: of names and list files. specs: the elements that were found so far.
    table: what it was made of. outdated: the files have faults, or were taken back, and this is earlier."""

    lookups: HostLookups = field(default_factory=HostLookups)
    specs: dict[tuple[str, str, str], ElementSpec] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)
    outdated: bool = False


class Config(Model):
    """Everything, checked. `load` makes it; `DEFAULT` applies without a file."""

    agent: Agent = Agent()
    log: LogConfig = LogConfig()
    queue: dict[Name, QueueConfig] = Field(default_factory=dict)
    element: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    rules: dict[Name, RuleConfig] = Field(default_factory=dict)
    proxy: dict[Name, ProxyConfig] = Field(default_factory=dict)
    tap: dict[Name, TapConfig] = Field(default_factory=dict)
    inline: dict[Name, InlineConfig] = Field(default_factory=dict)
    _state: _State = Field(init=False)

    def __new__(cls, **values: Any) -> Self:  # noqa: ARG004  # those of the initializer
        """With a state of its own."""
        made = super().__new__(cls)
        vars(made)["_state"] = _State()
        return made

    @property
    def table(self) -> dict[str, Any]:
        """What was read, before it was checked: `load_table` makes the same configuration of it."""
        return self._state.table

    @property
    def remark(self) -> str:
        """The note about it in the status line: set if an earlier configuration than theirs is in force."""
        return "; with the previous configuration, not that of the files" if self._state.outdated else ""

    def made_of(self, table: dict[str, Any], outdated: bool) -> Self:
        """The same configuration, which knows what it was made of."""
        self._state.table, self._state.outdated = table, outdated
        return self

    def packet_elements(self, queue: QueueConfig | CaptureConfig) -> list[ElementSpec]:
        """The elements of a queue, a tap or an inline link in order. Raises ElementError."""
        return [self._resolve(name, packet_element) for name in queue.elements]

    def stream_elements(self, proxy: ProxyConfig) -> list[ElementSpec]:
        """The elements of a proxy in order. Raises ElementError likewise."""
        return [self._resolve(name, stream_element) for name in proxy.elements]

    def with_lookups(self, lookups: HostLookups) -> Self:
        """The same configuration; names and list files are looked up through `lookups`."""
        self._state.lookups = lookups
        return self

    def watch(self, files: Mapping[Path, Stamp | None], folders: Iterable[Path]) -> None:
        """Have `changed_files` look at these as well, as HostLookups.watch."""
        self._state.lookups.watch(files, folders)

    def changed_files(self) -> list[Path]:
        """The files that have changed since they were read, or since the last call: list files (`file:`) of elements, and
        with `reload_on_change` those of the configuration."""
        return self._state.lookups.changed()

    def _resolve(self, name: str, find: Any) -> ElementSpec:
        table = dict(self.element.get(name, {}))
        # List files may be long, and this is called often.
        key = (name, find.__name__, repr(table))
        if (known := self._state.specs.get(key)) is not None:
            return known
        kind = table.pop("type", name)
        if not isinstance(kind, str):
            raise ElementError(name, f"type = {kind!r} is not the name of an element; allowed: a name in quotes")
        cls = find(kind)
        from pydantic import ValidationError

        try:
            options = cls.Options.from_table(table, self._state.lookups)
            # The element's own code; a fault in it is one of the configuration, with its line.
            with interruptible():
                for hook in _hooks():
                    getattr(cls, hook, bool)(options)
            if not isinstance(access := cls.access_of(options), Access):
                raise TypeError(f"access is {access!r}; allowed: an nfq_agent.access.Access")
        except ValidationError as error:
            raise ElementError(name, error, cls.Options) from error
        except Interrupted:
            raise
        except BaseException as error:
            raise ElementError(name, f"{kind} cannot be used: {where(error)}") from error
        self._state.specs[key] = spec = ElementSpec(name, cls, options)
        return spec

    def host_resolvers(self) -> list[IPv4Address | IPv6Address]:
        """The name servers that this host asks."""
        return resolvers_of_host(self._state.lookups)

    def kept(self, queue: QueueConfig) -> Kept | None:
        """The marks by which the kernel keeps this queue's verdicts on flows; None where no element offloads."""
        for spec in self.packet_elements(queue):
            marks: Kept | None = spec.cls.kept_of(spec.options)
            if marks is not None:
                return marks
        return None

    def takes_whole(self, queue: QueueConfig) -> bool:
        """Whether offloaded packets come whole: what the file says, else where no element changes packets."""
        if queue.gso != "auto":
            return queue.gso
        return not any(spec.cls.rewrites_of(spec.options) for spec in self.packet_elements(queue))

    def cuts_datagrams(self, queue: QueueConfig) -> bool:
        """Whether a worker has the kernel cut UDP packets that came whole, so that its elements see each datagram."""
        return queue.gso == "auto" and bool(self.packet_elements(queue)) and self.takes_whole(queue)

    def gets_udp(self, queue: QueueConfig) -> bool:
        """Whether a rule sends UDP to this queue."""
        return any(rule.takes_udp for rule in self.rules.values() if rule.queue and self.queue.get(rule.queue) is queue)

    def copy_range(self, queue: QueueConfig) -> int:
        """Bytes to copy of each packet of this queue: what the file says, else the least that its elements need."""
        return self.least_copied(queue) if queue.copy_range == "auto" else queue.copy_range

    def least_copied(self, queue: QueueConfig | CaptureConfig) -> int:
        """Bytes of each packet that its elements need, from the IP header on."""
        specs = self.packet_elements(queue)
        if not specs:
            return HEADER_BYTES
        from nfq_agent.element import Needs

        needs = max(spec.cls.needs_of(spec.options) for spec in specs)
        if needs is Needs.METADATA:
            return HEADER_BYTES
        if needs is not Needs.HEADERS:
            return WHOLE_PACKET
        fed = [rule for rule in self.rules.values() if rule.queue is not None and self.queue.get(rule.queue) is queue]
        return HEADER_BYTES if fed and all("inet6" not in rule.families for rule in fed) else HEADER_BYTES_V6
