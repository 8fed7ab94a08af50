"""The running agent: ordered start, watch, reload, ordered stop. It owns the queues' sockets, the workers and the rules.

Queues answer before a rule goes in; rules are gone and queues empty before a queue is let go. It never reads a packet.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from nfq_agent.config.models import Config, ConfigError, log_settings
from nfq_agent.host import routes
from nfq_agent.host.journal import open_log
from nfq_agent.host.systemd import ServiceManager
from nfq_agent.host.users import CAP_NET_ADMIN, User, UserError, ensure_user, has_capability
from nfq_agent.host.xtables.backend import choose
from nfq_agent.log import Log
from nfq_agent.queue.errors import QueueError
from nfq_agent.rules import routing
from nfq_agent.rules.diff import render
from nfq_agent.rules.leaving import keep_for_draining, merged
from nfq_agent.rules.model import RuleError, Ruleset
from nfq_agent.rules.plan import plan, redirects
from nfq_agent.service import control, report
from nfq_agent.service.crew import Crew
from nfq_agent.service.live_rules import LiveRules, State, compare, listing
from nfq_agent.service.meter import Drift, Meter
from nfq_agent.service.policy_generation import advance
from nfq_agent.service.status import Status
from nfq_agent.service.taps import TapWorker
from nfq_agent.service.worker import Worker, WorkerError
from nfq_agent.service.workers import ProxyWorker, QueueWorker
from nfq_agent.version import version

_TICK: Final = 1.0
# Somebody who fights over the rules is answered less and less often, down to this.
_LONGEST_BACK_OFF: Final = 300.0
# Without a service manager's watchdog: a worker that makes no progress for so long is replaced.
_STUCK: Final = 3.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FAILURES: Final = (WorkerError, RuleError, QueueError, UserError, control.ControlError, OSError)


class Supervisor:
    """One running agent."""

    def __init__(self, read: Callable[[], Config], config: Config, log: Log) -> None:
        """read: loads the configuration anew, for a reload; raises ConfigError. config: what it loaded first."""
        self._read = read
        self._config = config
        self._log = log
        self._service = ServiceManager()
        self._selector = selectors.EpollSelector()
        self._crew = Crew(self._selector, log, self._beat)
        self._meter = Meter()
        self._stop_asked = False
        self._reload_asked = False
        self._ruleset: Ruleset = {}
        self._rules_in = False
        self._installation: LiveRules | None = None
        self._user = User(-1, -1)
        self._server: control.Server | None = None
        self._lock: control.Lock | None = None
        self._wakeup: tuple[int, int] = (-1, -1)
        self._drift = Drift(config.agent.drift_check)
        self._due: dict[Callable[[], None], float] = {}
        self._patience: float | None = None

    # Life.

    def run(self) -> int:
        """Start, serve until told to stop, stop. 0, or 1 after a failure, which the log names."""
        self._catch_signals()
        failed = clean = False
        try:
            try:
                self._start()
                while not self._stop_asked:
                    self._turn()
            except _FAILURES as error:
                failed = True
                self._log(str(error) or type(error).__name__, "error")
            clean = self._stop(failed)
        finally:
            self._let_go()
        return 0 if clean and not failed else 1

    def _start(self) -> None:
        agent = self._config.agent
        if not has_capability(CAP_NET_ADMIN):
            raise WorkerError("CAP_NET_ADMIN is missing: without it no queue and no rule can be made; start as root")
        self._lock = control.Lock(agent.instance)
        self._user, made = ensure_user(agent.user)
        if made:
            self._log(f"made the system user {agent.user} (uid {self._user.uid})")
        self._installation = LiveRules(choose(agent.backend, agent.instance, captures=redirects(self._config)))
        if notice := self._installation.host.notice:
            self._log(notice, "warning")
        self._config = advance(self._config, control.folder() / f"{agent.instance}.generations")
        self._crew.add(self._workers_of(self._config))
        if self._stop_asked:
            return
        self._ruleset = plan(self._config, self._user.uid, self._installation.host.lists)
        # From here on there may be rules to take away. Stale ones of this instance, from whatever configuration, go in the
        # same commit that puts the new ones in.
        self._rules_in = True
        if routing.wanted(self._config):
            routes.ensure(agent.instance, routing.wanted(self._config))
        settled = self._installation.apply(self._ruleset)
        state: State = {family: each.after for family, each in settled.items()}
        self._note_held(state)
        self._meter.start(listing(state))
        self._server = control.Server(agent.instance)
        self._selector.register(self._server.fileno(), selectors.EVENT_READ, self._answer_one)
        now = time.monotonic()
        self._due = {self._tick: now}
        if (watchdog := self._service.watchdog) is not None:
            self._due[self._feed_watchdog] = now
            # Somebody who sits on the xtables lock must not make the watchdog bite: what can't be done soon is left for later.
            self._patience = self._installation.host.lock_seconds
            self._installation.host.lock_seconds = watchdog / 3
        self._schedule_drift_check()
        self._service.ready()
        backend = self._installation.host.name
        self._log(f"instance {agent.instance} is serving {self._what()}: {len(listing(state))} {backend} rules are in")

    def _turn(self) -> None:
        wait = max(0.0, min(self._due.values()) - time.monotonic())
        for key, _ in self._selector.select(wait):
            key.data()
        if self._reload_asked and not self._stop_asked:
            self._reload_asked = False
            self._reload()
        now = time.monotonic()
        for action, due in list(self._due.items()):
            if due <= now and not self._stop_asked:
                action()
        if (due_again := self._crew.revive(now)) is not None:
            self._due[self._tick] = min(self._due[self._tick], due_again)

    def _stop(self, failed: bool) -> bool:
        """Take the rules out, let the queues run empty, end the workers. True if the rules could be removed."""
        self._service.stopping()
        clean = True
        if self._rules_in and self._installation is not None:
            if self._patience is not None:
                self._installation.host.lock_seconds = self._patience
            try:
                if self._crew.proxies and not failed:
                    # Their running connections stand on rules too; those go last.
                    with contextlib.suppress(RuleError):
                        self._installation.apply(keep_for_draining(self._ruleset))
                    self._crew.retire(list(self._crew.proxies.values()))
                    self._crew.wait_for_leaving()
                self._installation.remove(keep_fail_closed=failed)
                if routing.wanted(self._config):
                    routes.ensure(self._config.agent.instance, {})
                if failed and (kept := listing(self._installation.read())):
                    self._log(
                        f"{len(kept)} rules stay, for queues with bypass = false: their traffic is kept out until the next "
                        f"start, a clean stop, or `nfq-agent remove --instance {self._config.agent.instance}`",
                        "warning",
                    )
            except RuleError as error:
                clean = False
                self._log(f"rules could not be removed: {error}; run `nfq-agent remove`", "error")
        self._crew.retire(self._crew.workers)
        self._crew.wait_for_leaving()
        if self._installation is not None:
            try:
                # Not before: it may cost the packets that wait.
                self._installation.close()
            except RuleError as error:
                clean = False
                self._log(f"{error}; run `nfq-agent remove`", "error")
        if clean and not failed:
            self._log("stopped: no rule of this instance is left")
        return clean

    def _let_go(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._lock is not None:
            self._lock.release()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for end in self._wakeup:
            os.close(end)

    # Signals.

    def _catch_signals(self) -> None:
        self._wakeup = reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._signalled)
        self._selector.register(reader, selectors.EVENT_READ, lambda: os.read(reader, 512))

    def _signalled(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._reload_asked = True
        else:
            self._stop_asked = True

    # Workers.

    def _queues_of(self, config: Config) -> list[QueueWorker]:
        return [
            QueueWorker(name, number, config, self._user, self._log, self._private)
            for name, queue in config.queue.items()
            for number in queue.numbers
        ]

    def _proxies_of(self, config: Config) -> list[ProxyWorker]:
        return [ProxyWorker(name, config, self._user, self._log, self._private) for name in config.proxy]

    def _taps_of(self, config: Config) -> list[TapWorker]:
        return [TapWorker(name, config, self._user, self._log, self._private) for name in config.tap]

    def _workers_of(self, config: Config) -> list[Worker]:
        return [*self._queues_of(config), *self._proxies_of(config), *self._taps_of(config)]

    def _private(self) -> Iterator[int]:
        """Descriptors that no child may keep alive when this process is gone."""
        yield from (self._selector.fileno(), *self._wakeup)
        if self._server is not None:
            yield self._server.fileno()
        if self._lock is not None:
            yield self._lock.fileno()
        yield from self._crew.descriptors
        if self._installation is not None:
            yield from self._installation.host.descriptors

    def _what(self) -> str:
        parts = [f"queue {number}" for number in self._crew.queues]
        parts += [f"proxy {proxy.name} on {', '.join(map(str, proxy.config.listen))}" for proxy in self._crew.proxies.values()]
        parts += [tap.title for tap in self._crew.taps.values()]
        return ", ".join(parts) or "nothing (no queue and no proxy is configured)"

    # Clockwork.

    def _tick(self) -> None:
        now = time.monotonic()
        self._due[self._tick] = now + _TICK
        self._meter.sample(now, {number: worker.counters.received for number, worker in self._crew.queues.items()})
        self._service.status(f"Serving {self._what()}; {self._meter.summary}")
        # No traffic waits for a tap, so the service manager's watchdog does not watch it.
        watched: list[QueueWorker | TapWorker] = list(self._crew.taps.values())
        if self._service.watchdog is None:
            watched += self._crew.queues.values()
        for worker in watched:
            if worker.child is not None and (stuck := worker.stuck_for(now)) > _STUCK:
                self._log(f"{worker.title} (pid {worker.pid}) made no progress for {stuck:.1f} s; it is killed", "error")
                worker.child.kill()

    def _feed_watchdog(self) -> None:
        period = self._service.watchdog or _STUCK
        now = time.monotonic()
        self._due[self._feed_watchdog] = now + period / 4
        if all(worker.stuck_for(now) < period / 2 for worker in self._crew.queues.values()):
            self._service.alive()

    def _beat(self) -> None:
        """Say that we are alive, while we wait for somebody who has to get ready."""
        if self._service.watchdog is not None:
            self._service.alive()

    # Rules.

    def _schedule_drift_check(self) -> None:
        self._due.pop(self._check_rules, None)
        if self._drift.pause:
            self._due[self._check_rules] = time.monotonic() + self._drift.pause

    def _check_rules(self) -> None:
        """Put back what somebody took away or changed, and read the counters on the way."""
        assert self._installation is not None
        try:
            state = self._installation.read()
            self._meter.read(listing(state))
            changes = compare(self._ruleset, state)
            if changes:
                self._meter.read(
                    listing({family: each.after for family, each in self._installation.apply(self._ruleset).items()})
                )
                what = "; ".join(line for each in changes.values() for line in render(each) if not line.startswith("*"))
                self._log(f"somebody changed this agent's rules; put right: {what}", "warning", repairs=self._drift.repairs + 1)
            self._drift.looked(bool(changes), time.time(), _LONGEST_BACK_OFF)
        except RuleError as error:
            self._log(f"the rules could not be checked: {error}", "error")
        self._schedule_drift_check()

    def _note_held(self, state: State) -> None:
        for family, tables in state.items():
            for table, each in tables.items():
                for chain in sorted(each.held):
                    self._log(
                        f"a rule that is not ours jumps to {chain} ({family} {table}); that chain can't be deleted", "warning"
                    )

    # Reload.

    def _reload(self) -> dict[str, Any]:
        """Take the file anew: all of it, or nothing. The answer says which."""
        self._service.reloading()
        try:
            answer = {"ok": True, "message": self._change_to(self._read())}
            self._log(str(answer["message"]))
        except ConfigError as error:
            answer = {"ok": False, "config": True, "message": "\n".join(error.faults)}
            for fault in error.faults:
                self._log(f"reload refused, what was in force stays in force: {fault}", "error")
        except _FAILURES as error:
            answer = {"ok": False, "message": str(error)}
            self._log(f"reload failed, what was in force stays in force: {error}", "error")
        self._service.ready()
        return answer

    def _change_to(self, new: Config) -> str:
        """Make `new` the configuration in force. Whatever it raises, the old one is in force again."""
        for key in ("instance", "user", "backend"):
            if getattr(new.agent, key) != getattr(self._config.agent, key):
                raise ConfigError([f"agent.{key}: it can't change while the agent runs; allowed: a restart"])
        assert self._installation is not None
        new = advance(new, control.folder() / f"{new.agent.instance}.generations")
        crew = self._crew
        wanted: dict[object, Worker] = {worker.key: worker for worker in self._workers_of(new)}
        there: dict[object, Worker] = {worker.key: worker for worker in crew.workers}
        added = [worker for key, worker in wanted.items() if key not in there]
        gone = [worker for key, worker in there.items() if key not in wanted]
        # A worker has a log of its own, which it got at its start.
        relog = new.log != self._config.log
        changed = [
            (there[key], worker) for key, worker in wanted.items() if key in there and (relog or there[key].differs(worker))
        ]
        ruleset = plan(new, self._user.uid, self._installation.host.lists)
        # What running connections of a proxy stand on goes when they have ended.
        at_first = merged(ruleset, keep_for_draining(self._ruleset))
        # Routes come before the rules that need them, and go after those that did.
        routed = routing.wanted(self._config, new)
        settings = log_settings(new.log)
        log_before = self._log.become(open_log(settings.format, settings.level)) if relog else None
        replaced: list[tuple[Worker, Worker]] = []
        started: list[Worker] = []
        try:
            crew.add(added)
            started = added
            for old, worker in changed:
                crew.replace(old, worker)
                replaced.append((old, worker))
            if routed:
                routes.ensure(new.agent.instance, routed)
            settled = self._installation.apply(at_first)
        except BaseException:
            if routed:
                self._route(self._config)
            if log_before is not None:
                self._log.become(log_before)
            for old, worker in reversed(replaced):
                crew.replace(worker, old)
            crew.retire(started)
            raise
        edits = sum(len(steps) for each in settled.values() for steps in each.changes.values())
        crew.retire(gone)
        self._ruleset = ruleset
        self._config = new
        self._drift = self._drift.every(new.agent.drift_check)
        self._schedule_drift_check()
        if at_first != ruleset:
            crew.wait_for_leaving()
            try:
                settled = self._installation.apply(ruleset)
            except RuleError as error:
                self._log(
                    f"rules of a proxy that is gone are left, and lead nowhere: {error}; the next drift check tries again",
                    "error",
                )
        if routed:
            self._route(new)
        state: State = {family: each.after for family, each in settled.items()}
        self._note_held(state)
        self._meter.read(listing(state))
        return f"reloaded: rules changed in {edits} places; workers: {len(added)} new, {len(changed)} replaced, {len(gone)} ended"

    def _route(self, config: Config) -> None:
        """Have the routes of this configuration, and no others of ours."""
        try:
            routes.ensure(config.agent.instance, routing.wanted(config))
        except RuleError as error:
            self._log(
                f"the routes for TPROXY are not what the configuration needs: {error}; stop the agent, run `nfq-agent remove`, "
                "and start it",
                "error",
            )

    # Answers to the verbs.

    def _answer_one(self) -> None:
        assert self._server is not None
        self._server.serve_one(self._answer)

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question.get("verb"):
            case "ping":
                return {"pid": os.getpid()}
            case "reload":
                return self._reload()
            case "status":
                return self._status().as_object()
            case verb:
                return {"ok": False, "message": f"unknown verb {verb!r}"}

    def _status(self) -> Status:
        assert self._installation is not None
        try:
            found = listing(self._installation.read())
            self._meter.read(found)
        except RuleError as error:
            self._log(f"the rules could not be read: {error}", "error")
            found = []
        return Status(
            instance=self._config.agent.instance,
            running=True,
            version=version(),
            state="serving",
            pid=os.getpid(),
            since=self._meter.since,
            backend=self._installation.host.name,
            queues=report.queues(self._config, self._crew, self._meter),
            proxies=report.proxies(self._crew),
            taps=report.taps(self._crew),
            offloaded=report.offloaded(found),
            rules=report.rules(found),
            drift=self._drift.status,
            log_lines_lost=self._log.lost,
        )
