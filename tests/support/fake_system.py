"""The operating system as the supervisor sees it, in memory: any of its functions can be made to fail.

The crew and the service manager pass the contract tests of the real ones (test_crew_contract.py), the rule
backend those of test_rule_hosts.py.
"""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from fake_rules import FakeHost, FakeKernel

from nfq_agent.config.models import Config
from nfq_agent.host.users import User
from nfq_agent.log import Log, LogEvent
from nfq_agent.mark import Mark
from nfq_agent.rules.model import Family
from nfq_agent.service.interface_worker import InterfaceWorker
from nfq_agent.service.proxy_worker import ProxyWorker
from nfq_agent.service.queue_worker import QueueWorker
from nfq_agent.service.store import Store
from nfq_agent.service.system import System
from nfq_agent.service.worker import Worker


class Trouble:
    """What is to fail. `fail["crew.add"] = OSError("no")` lets the next `crew.add` raise that, once."""

    def __init__(self) -> None:
        self.fail: dict[str, Exception] = {}
        self.done: list[str] = []

    def __call__(self, name: str) -> None:
        self.done.append(name)
        if (error := self.fail.pop(name, None)) is not None:
            raise error


class FakeServiceManager:
    """Keeps what the service manager was told."""

    def __init__(self, watchdog: float | None = None) -> None:
        self.said: list[str] = []
        self._watchdog = watchdog
        self._status = ""

    @property
    def watchdog(self) -> float | None:
        return self._watchdog

    def ready(self) -> None:
        self.said.append("READY=1")

    def reloading(self) -> None:
        self.said.append("RELOADING=1")

    def stopping(self) -> None:
        self.said.append("STOPPING=1")

    def alive(self) -> None:
        self.said.append("WATCHDOG=1")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self.said.append(f"STATUS={text}")


class FakeCrew:
    """Workers without processes. `trouble` sees "crew.add", "crew.replace" and "crew.retire" with the worker's key."""

    def __init__(self, trouble: Trouble, at_turn: Callable[[], None] = lambda: None) -> None:
        self._trouble = trouble
        self._at_turn = at_turn
        self.queues: dict[int, QueueWorker] = {}
        self.proxies: dict[str, ProxyWorker] = {}
        self.captures: dict[tuple[str, str], InterfaceWorker] = {}
        self.serving: set[Worker] = set()

    @property
    def workers(self) -> list[Worker]:
        return [*self.queues.values(), *self.proxies.values(), *self.captures.values()]

    @property
    def descriptors(self) -> Iterator[int]:
        return iter(())

    def add(self, workers: Sequence[Worker], meanwhile: Callable[[], object] = lambda: None) -> None:
        for worker in workers:
            self._trouble(f"crew.add {worker.title}")
        meanwhile()
        for worker in workers:
            self._trouble.done.append(f"crew.serves {worker.title}")
            self._enter(worker)

    def replace(self, old: Worker, successor: Worker) -> None:
        self._trouble(f"crew.replace {old.title}")
        self.serving.discard(old)
        self._enter(successor)

    def leave(self) -> None:
        self._trouble("crew.leave")

    def retire(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            self._trouble(f"crew.retire {worker.title}")
            self.serving.discard(worker)
            worker.unregister(self)  # type: ignore[arg-type]  # it has the dictionaries of a roster

    def close_leftovers(self) -> None:
        self._trouble("crew.close_leftovers")

    def wait_for_leaving(self) -> None:
        self._trouble("crew.wait_for_leaving")

    def revive(self, now: float) -> float | None:
        self._at_turn()
        return None

    def _enter(self, worker: Worker) -> None:
        self.serving.add(worker)
        worker.register(self)  # type: ignore[arg-type]  # it has the dictionaries of a roster


class FakeLock:
    """The lock of an instance; held until it is released."""

    descriptors = (0,)

    def __init__(self) -> None:
        self.held = True

    def handed(self) -> dict[str, int]:
        return {}

    def release(self) -> None:
        self.held = False


class FakeServer:
    """A control socket without clients."""

    def __init__(self) -> None:
        self.open = True
        self.ask: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}

    @property
    def descriptors(self) -> Iterator[int]:
        return iter(())

    @property
    def handed(self) -> dict[str, int]:
        return {}

    def serve(self, selector: selectors.BaseSelector, respond: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.ask = respond

    def expire(self) -> float | None:
        return None

    def close(self) -> None:
        self.open = False


class _Host(FakeHost):
    """A backend that can be made to fail: "rules.apply", "rules.read"."""

    def __init__(self, trouble: Trouble, kernel: FakeKernel, instance: str) -> None:
        super().__init__(kernel, instance)
        self._trouble = trouble

    def read(self, family: Family) -> Any:
        self._trouble(f"rules.read {family}")
        return super().read(family)

    def apply(self, family: Family, desired: Any) -> Any:
        self._trouble(f"rules.apply {family}" if desired else f"rules.remove {family}")
        return super().apply(family, desired)

    def close(self) -> None:
        self._trouble("rules.close")
        super().close()


class FakeMachine:
    """A host. `system` is what the supervisor is given; the rest is what is there: rules, routes, workers, lock, log."""

    def __init__(self, watchdog: float | None = None) -> None:
        self.trouble = Trouble()
        self.kernel = FakeKernel()
        self.service = FakeServiceManager(watchdog)
        self.routes: dict[Family, set[Mark]] = {}
        self.lines: list[str] = []
        self.locks: list[FakeLock] = []
        self.servers: list[FakeServer] = []
        self.turns: list[Callable[[], None]] = []
        self.now = 1000.0
        self.allowed = True
        self.code_changed = False
        self.rehearsal = ""
        self.elsewhere: tuple[Any, ...] = ()
        self.crew = FakeCrew(self.trouble, self._turn)
        self.log = self._log("first")
        self.system = System(
            clock=lambda: self.now,
            wall=lambda: self.now,
            service=self.service,
            may_change_rules=lambda: self.allowed,
            lock=self._lock,
            listen=self._listen,
            ensure_user=self._ensure_user,
            choose=self._choose,
            crew=self._crew,
            route=self._route,
            open_log=self._open_log,
            advance=self._advance,
            reimported=lambda: contextlib.nullcontext([]),
            elsewhere=lambda *_: self.elsewhere,
            store=Store(),
            code_changed=lambda: self.code_changed,
            rehearse=lambda _: self.rehearsal,
            start_again=self._start_again,
            ruleset_events=lambda: None,
            notices=lambda *_: (),
            rewriting=lambda _: (),
        )

    def keep(self, store: Store) -> None:
        """Have this store instead of an empty one."""
        self.system = replace(self.system, store=store)

    def _turn(self) -> None:
        self.now += 1.0
        if self.turns:
            self.turns.pop(0)()

    def _log(self, name: str) -> Log:
        def write(event: LogEvent) -> bool:
            self.lines.append(f"{name}: {event.level}: {event.message}")
            return True

        return Log(write, "info", lambda: 0.0)

    def _open_log(self, config: Config) -> Log:
        self.trouble("open_log")
        return self._log(config.log.level)

    def _lock(self, instance: str) -> FakeLock:
        self.trouble("lock")
        self.locks.append(FakeLock())
        return self.locks[-1]

    def _listen(self, instance: str) -> FakeServer:
        self.trouble("listen")
        self.servers.append(FakeServer())
        return self.servers[-1]

    def _ensure_user(self, name: str) -> tuple[User, bool]:
        self.trouble("ensure_user")
        return User(1234, 1234), False

    def _start_again(self, handed: Mapping[str, int]) -> None:
        self.trouble("start_again")
        raise SystemExit

    def _choose(self, config: Config, table: int | None) -> _Host:
        self.trouble("choose")
        return _Host(self.trouble, self.kernel, config.agent.instance)

    def _crew(self, selector: selectors.BaseSelector, log: Log, beat: Callable[[], None], store: Store) -> FakeCrew:
        return self.crew

    def _route(self, instance: str, marks: Mapping[Family, Set[Mark]]) -> None:
        self.trouble("route" if marks else "unroute")
        self.routes = {family: set(each) for family, each in marks.items()}

    def _advance(self, config: Config) -> Config:
        self.trouble("advance")
        return config

    def rules(self) -> list[str]:
        """The installed rules, without counters."""
        lines = [line.partition("] ")[2] for family in ("inet", "inet6") for line in self.kernel.save(family)]
        return [line for line in lines if line.startswith("-A")]

    def ours(self) -> list[str]:
        """Those of them that are the agent's."""
        return [line for line in self.rules() if "nfq-agent:" in line]
