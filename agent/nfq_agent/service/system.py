"""The operating system as the supervisor uses it: a few functions and objects, given to it.

The real ones are put together here; tests/support/fake_system.py has fakes that pass the same contract tests.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from nfq_agent.config.environment import log_settings
from nfq_agent.config.models import Config
from nfq_agent.elements.loading import reimported
from nfq_agent.host import reexec, routes, systemd
from nfq_agent.host.journal import open_log
from nfq_agent.host.systemd import ServiceManager
from nfq_agent.host.users import CAP_NET_ADMIN, User, UserError, has_capability, worker_user
from nfq_agent.log import Log
from nfq_agent.log_filter import shows
from nfq_agent.mark import Mark
from nfq_agent.queue.errors import QueueError
from nfq_agent.rules.model import Family, RuleError
from nfq_agent.rules.proxies import redirects
from nfq_agent.service import control
from nfq_agent.service.crew import Crew
from nfq_agent.service.instance_lock import Lock
from nfq_agent.service.policy_generation import advance
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.store import Store
from nfq_agent.service.worker import Worker, WorkerError

# What writes rules is loaded once it is used: when a start takes queues over, packets wait for its workers alone.
if TYPE_CHECKING:
    from nfq_agent.host.nftables.events import RulesetEvents
    from nfq_agent.host.xtables.backend import RuleHost, RulePlace
    from nfq_agent.service.host_notices import HostNotice
    from nfq_agent.service.interface_worker import InterfaceWorker
    from nfq_agent.service.proxy_worker import ProxyWorker

# The exceptions with which a start, a reload or a stop may fail. Any other is a fault of the agent.
FAILURES: Final = (WorkerError, RuleError, QueueError, UserError, control.ControlError, OSError)


def failure_text(error: BaseException) -> str:
    """One of them as a line of the log."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}; raise LimitNOFILE= of the unit (ulimit -n)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


class ServiceWords(Protocol):
    """Notifications to the service manager (host/systemd.py)."""

    @property
    def watchdog(self) -> float | None: ...
    def ready(self) -> None: ...
    def reloading(self) -> None: ...
    def stopping(self) -> None: ...
    def alive(self) -> None: ...
    def status(self, text: str) -> None: ...


class Workers(Protocol):
    """The workers that serve, and operations on them (service/crew.py)."""

    @property
    def queues(self) -> dict[int, QueueWorker]: ...
    @property
    def proxies(self) -> dict[str, ProxyWorker]: ...
    @property
    def captures(self) -> dict[tuple[str, str], InterfaceWorker]: ...
    @property
    def workers(self) -> list[Worker]: ...
    @property
    def descriptors(self) -> Iterator[int]: ...
    def add(self, workers: Sequence[Worker], meanwhile: Callable[[], object] = ...) -> None: ...
    def replace(self, old: Worker, successor: Worker) -> None: ...
    def leave(self) -> None: ...
    def retire(self, workers: Sequence[Worker]) -> None: ...
    def close_leftovers(self) -> None: ...
    def wait_for_leaving(self) -> None: ...
    def revive(self, now: float) -> float | None: ...


class InstanceLock(Protocol):
    """The lock of the instance (service/instance_lock.py)."""

    @property
    def descriptors(self) -> Sequence[int]: ...
    def handed(self) -> dict[str, int]: ...
    def release(self) -> None: ...


class Listening(Protocol):
    """The control socket (service/control.py)."""

    @property
    def descriptors(self) -> Iterator[int]: ...
    @property
    def handed(self) -> dict[str, int]: ...
    def serve(self, selector: selectors.BaseSelector, respond: control.Respond) -> None: ...
    def expire(self) -> float | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class System:
    """clock: monotonic seconds. wall: seconds since the epoch. The others do what the real ones below do, and raise the same."""

    clock: Callable[[], float]
    wall: Callable[[], float]
    service: ServiceWords
    may_change_rules: Callable[[], bool]
    lock: Callable[[str], InstanceLock]
    listen: Callable[[str], Listening]
    ensure_user: Callable[[str], tuple[User, bool]]
    choose: Callable[[Config, int | None], RuleHost]
    crew: Callable[[selectors.BaseSelector, Log, Callable[[], None], Store], Workers]
    route: Callable[[str, Mapping[Family, Set[Mark]]], None]
    open_log: Callable[[Config], Log]
    advance: Callable[[Config], Config]
    reimported: Callable[[], contextlib.AbstractContextManager[list[str]]]
    elsewhere: Callable[[RuleHost, str], Sequence[RulePlace]]
    store: Store
    code_changed: Callable[[], bool]
    rehearse: Callable[[Callable[[], None]], str]
    start_again: Callable[[Mapping[str, int]], None]
    ruleset_events: Callable[[], RulesetEvents | None]
    notices: Callable[[Config, str], Iterable[HostNotice]]
    rewriting: Callable[[Config], Iterable[str]]


def this_host() -> System:
    """The real ones."""
    service = ServiceManager()
    code = reexec.Code()
    handed = systemd.passed() | reexec.handed()
    # Not in the store: the service manager has it open itself.
    listening = handed.pop(control.SOCKET, None)
    return System(
        clock=time.monotonic,
        wall=time.time,
        service=service,
        may_change_rules=lambda: has_capability(CAP_NET_ADMIN),
        lock=Lock,
        listen=lambda instance: control.Server(instance, passed=listening),
        ensure_user=worker_user,
        choose=_choose,
        crew=Crew,
        route=routes.ensure,
        open_log=_open_log,
        reimported=reimported,
        advance=lambda config: advance(config, control.state_folder() / f"{config.agent.instance}.generations"),
        elsewhere=_elsewhere,
        store=Store(handed, service if service.stores else None),
        code_changed=lambda: code.changed,
        rehearse=reexec.rehearse,
        start_again=reexec.start_again,
        ruleset_events=_ruleset_events,
        notices=_notices,
        rewriting=_rewriting,
    )


def _choose(config: Config, table: int | None) -> RuleHost:
    from nfq_agent.host.xtables.backend import choose

    return choose(config.agent.backend, config.agent.instance, captures=redirects(config), inherited=table)


def _elsewhere(host: RuleHost, instance: str) -> Sequence[RulePlace]:
    from nfq_agent.host.xtables.backend import elsewhere

    return elsewhere(host, instance)


def _notices(config: Config, backend: str) -> Iterable[HostNotice]:
    from nfq_agent.service.host_notices import host_notices

    return host_notices(config, backend)


def _rewriting(config: Config) -> Iterable[str]:
    from nfq_agent.service.foreign_marks import rewriting

    return rewriting(config)


def _ruleset_events() -> RulesetEvents | None:
    from nfq_agent.host.nftables.events import RulesetEvents

    try:
        return RulesetEvents()
    except OSError:
        # A kernel without nf_tables has none.
        return None


def _open_log(config: Config) -> Log:
    settings = log_settings(config.log)
    return open_log(settings.format, settings.level, shows(settings.when))
