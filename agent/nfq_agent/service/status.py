"""The status of a running agent: values only. `show` reads them, and the JSON of `status --json` is made from them.

A field that is added here is in the JSON; docs/verbs.md has a line for each (a test compares them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self

# A status is read by the version that is installed, but made by the version that runs. A value that it does not have is unknown.
Known = int | None


class StatusError(Exception):
    """A status that this version cannot read: the running agent has another version."""


class _FromObject:
    """Values that are the same in JSON."""

    __slots__ = ()

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        return cls(**_fields(cls, value))


@dataclass(frozen=True, slots=True)
class InForce(_FromObject):
    """The settings of a queue as the kernel acknowledged them."""

    copy: str
    copy_range: int
    max_len: int
    fail_open: bool
    gso: bool
    room_for_known: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker process. counters: by name, as WORKER_COUNTERS explains them. waiting: None where it cannot be read."""

    number: int
    pid: int | None
    restarts: int
    memory: int | None
    per_second: float
    waiting: Known
    counters: Mapping[str, int]

    def as_object(self) -> dict[str, Any]:
        """For JSON: the counters stand beside the other keys."""
        value = asdict(self)
        return {**value, **value.pop("counters")}

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        own = {field.name for field in fields(cls)}
        counters = {name: count for name, count in value.items() if name not in own}
        return cls(**_fields(cls, {**value, "counters": counters}))


@dataclass(frozen=True, slots=True)
class DecisionStatus(_FromObject):
    """How often one rule of an element decided. rule: its label, as in `reason` of a flow. in_kernel: packets that the kernel
    decided by it in front of the queue (`compile`), which the worker did not see.
    """

    element: str
    rule: str
    count: int
    in_kernel: int = 0


@dataclass(frozen=True, slots=True)
class LatencyStatus(_FromObject):
    """How long verdicts took in the workers. buckets: samples by the upper bound of their time, in seconds. total: seconds."""

    buckets: Mapping[str, int]
    total: float


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One `[queue.NAME]`. What the kernel does not let the agent read is None. not_compiled: why the kernel applies no rule by
    owner (service.planned)."""

    name: str
    mode: str
    bypass: bool
    elements: tuple[str, ...]
    in_force: InForce | None
    kernel_dropped: Known
    user_dropped: Known
    uninspected: Known
    would_drop: int
    workers: tuple[WorkerStatus, ...]
    decisions: tuple[DecisionStatus, ...] = ()
    latency: LatencyStatus | None = None
    not_compiled: str = ""

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "workers": [worker.as_object() for worker in self.workers]}

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        read = _fields(cls, value)
        force = read["in_force"]
        read["in_force"] = None if force is None else InForce.from_object(force)
        read["workers"] = tuple(WorkerStatus.from_object(each) for each in read["workers"])
        read["elements"] = tuple(read["elements"])
        if read.get("latency") is not None:
            read["latency"] = LatencyStatus.from_object(read["latency"])
        return cls(**{**read, "decisions": _decisions(read)})


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One `[proxy.NAME]`. counters: by name, as PROXY_COUNTERS explains them."""

    name: str
    listen: tuple[str, ...]
    elements: tuple[str, ...]
    pid: int | None
    restarts: int
    memory: int | None
    counters: Mapping[str, int]

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        read = _fields(cls, value)
        return cls(**{**read, "listen": tuple(read["listen"]), "elements": tuple(read["elements"])})


@dataclass(frozen=True, slots=True)
class InterfaceStatus(_FromObject):
    """One interface of a tap. container: behind it, None if that is not known. counters: as TAP_COUNTERS explains them."""

    name: str
    index: int
    container: str | None
    counters: Mapping[str, int]


class _CaptureStatus:
    """A tap or an inline link."""

    __slots__ = ()

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        read = _fields(cls, value)
        interfaces = tuple(InterfaceStatus.from_object(each) for each in read["interfaces"])
        return cls(**{**read, "elements": tuple(read["elements"]), "interfaces": interfaces, "decisions": _decisions(read)})


@dataclass(frozen=True, slots=True)
class TapStatus(_CaptureStatus):
    """One `[tap.NAME]`. snap: bytes copied of each packet. counters: of all interfaces, also those that are gone."""

    name: str
    elements: tuple[str, ...]
    pid: int | None
    restarts: int
    memory: int | None
    snap: int
    counters: Mapping[str, int]
    interfaces: tuple[InterfaceStatus, ...]
    decisions: tuple[DecisionStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class InlineStatus(_CaptureStatus):
    """One `[inline.NAME]`. lost: frames that could not be sent on. hidden: interfaces with a foreign program before ours.

    counters: of all interfaces, also those that are gone, as INLINE_COUNTERS explains them.
    """

    name: str
    mode: str
    elements: tuple[str, ...]
    pid: int | None
    restarts: int
    memory: int | None
    lost: int
    hidden: int
    counters: Mapping[str, int]
    interfaces: tuple[InterfaceStatus, ...]
    decisions: tuple[DecisionStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleStatus(_FromObject):
    """One installed rule, as text of `iptables -S`, with its counters."""

    family: str
    table: str
    rule: str
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class OffloadStatus(_FromObject):
    """Packets since the policy was put in: with a verdict for their flow, and accepted or denied by the kernel by that."""

    decided: int = 0
    accepted: int = 0
    denied: int = 0


@dataclass(frozen=True, slots=True)
class DriftStatus:
    """Whether the rules are those of the configuration. last: of the repairs, seconds since the epoch.

    check: seconds between checks (0: never). pause: to the next. wrong: what a repair would change now. unreadable: why the rules
    cannot be read now. away: seconds in which a rule was not in force, at most. away_since: since when one is not. waiting: a
    line for each control group that does not exist yet. late: seconds for which groups existed before their rules were in, by
    path.
    """

    repairs: int
    last: float | None
    check: float
    pause: float
    wrong: tuple[str, ...] = ()
    unreadable: str = ""
    away: float = 0.0
    away_since: float | None = None
    waiting: tuple[str, ...] = ()
    late: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        read = _fields(cls, value)
        return cls(**{**read, "wrong": tuple(read.get("wrong", ())), "waiting": tuple(read.get("waiting", ()))})


@dataclass(frozen=True, slots=True)
class BypassStatus(_FromObject):
    """Traffic that passed without a verdict of ours, by its cause. count: of `unit`, None where it cannot be read.

    cause: "queue", "rules-away", "cgroup-late", "in-front" or "proxy". name: of the queue or the proxy, the place of
    the rule, or the path of the group. unit: "packets", "connections" or "seconds". text: the cause in
    words. advice: what to do, empty where nothing is to be done.
    """

    cause: str
    name: str
    count: float | None
    unit: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class ConfinementStatus:
    """How worker processes are confined. by: `seccomp`, `Landlock 7`. missing: what the kernel lacks. exemptions: of elements."""

    mode: str = "unknown"
    by: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    exemptions: tuple[str, ...] = ()

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON."""
        read = _fields(cls, value)
        return cls(read.pop("mode"), **{name: tuple(each) for name, each in read.items()})


@dataclass(frozen=True, slots=True)
class TrialStatus(_FromObject):
    """What the agent takes back by itself. kind: "reload" (it waits for its confirmation) or "faults" (`nfq-agent chaos`).

    queue, faults: of faults, their queue and keys. left: seconds.
    """

    kind: str
    queue: str
    faults: Mapping[str, Any]
    left: float


@dataclass(frozen=True, slots=True)
class Status:
    """A running agent. since: when it began to serve, seconds since the epoch."""

    instance: str
    running: bool
    version: str
    state: str
    pid: int
    since: float
    backend: str
    queues: tuple[QueueStatus, ...]
    proxies: tuple[ProxyStatus, ...]
    taps: tuple[TapStatus, ...]
    inlines: tuple[InlineStatus, ...]
    offloaded: OffloadStatus
    rules: tuple[RuleStatus, ...]
    drift: DriftStatus
    log_lines_lost: int
    bypasses: tuple[BypassStatus, ...] = ()
    confinement: ConfinementStatus = ConfinementStatus()
    trial: TrialStatus | None = None

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "queues": [queue.as_object() for queue in self.queues]}

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """From JSON, as the running agent made it. Raises StatusError."""
        try:
            read = _fields(cls, value)
            return cls(
                **{
                    **read,
                    "queues": tuple(QueueStatus.from_object(each) for each in read["queues"]),
                    "proxies": tuple(ProxyStatus.from_object(each) for each in read["proxies"]),
                    "taps": tuple(TapStatus.from_object(each) for each in read["taps"]),
                    "inlines": tuple(InlineStatus.from_object(each) for each in read["inlines"]),
                    "offloaded": OffloadStatus.from_object(read["offloaded"]),
                    "rules": tuple(RuleStatus.from_object(each) for each in read["rules"]),
                    "drift": DriftStatus.from_object(read["drift"]),
                    "bypasses": tuple(BypassStatus.from_object(each) for each in read.get("bypasses", ())),
                    "confinement": ConfinementStatus.from_object(read.get("confinement", {"mode": "unknown"})),
                    "trial": None if read.get("trial") is None else TrialStatus.from_object(read["trial"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise StatusError(
                "the running agent is of another version, and its status cannot be shown; restart it, or use `status --json`"
            ) from error

    def uptime(self, now: float) -> float:
        """Seconds since it began to serve. now: seconds since the epoch."""
        return max(0.0, now - self.since)


def _decisions(value: Mapping[str, Any]) -> tuple[DecisionStatus, ...]:
    return tuple(DecisionStatus.from_object(each) for each in value.get("decisions", ()))


def _fields(cls: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a class's fields; a key that this version does not know is left out. Raises KeyError."""
    return {field.name: value[field.name] for field in fields(cls) if field.name in value or field.default is MISSING}
