"""The running agent: ordered start, watch, reload, ordered stop. It owns the sockets of the queues, the workers and the rules.

Queues are bound and answer before a rule goes in; rules are gone and queues empty before a queue is closed. The supervisor
never reads a packet. The operating system is given to it (service/system.py).
"""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from nfq_agent.config.file import load_table
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.policy_summary import summary
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.rules.proxies import accept_rules
from nfq_agent.service import confinement, flow_stream, report
from nfq_agent.service.bypasses import BypassLog
from nfq_agent.service.crew import workers_of
from nfq_agent.service.drift_check import DriftCheck
from nfq_agent.service.foreign_marks import RepeatLog
from nfq_agent.service.inheritance import Inheritance
from nfq_agent.service.live_routes import LiveRoutes
from nfq_agent.service.live_rules import ListedRule, LiveRules, listing, states
from nfq_agent.service.meter import Meter
from nfq_agent.service.planned import planned
from nfq_agent.service.rule_watch import RuleWatch
from nfq_agent.service.signals import Signals
from nfq_agent.service.status import Status
from nfq_agent.service.stop import Stop
from nfq_agent.service.switch import Switch, refuse_change
from nfq_agent.service.system import FAILURES, InstanceLock, Listening, System, failure_text
from nfq_agent.service.trial import NEW_CODE, ON_TRIAL, Trial
from nfq_agent.service.watchdog import decide
from nfq_agent.service.worker import Worker, WorkerError

_TICK: Final = 1.0


class Supervisor:
    """One running agent. `run` is its life; `start`, `turn`, `reload` and `stop` are its parts."""

    def __init__(
        self,
        read: Callable[[], Config],
        config: Config,
        log: Log,
        system: System,
        restore: Callable[[dict[str, Any]], Config] = load_table,
    ) -> None:
        """read: loads the configuration again, for a reload; raises ConfigError. config: what it loaded first. restore: makes a
        configuration of what a previous process had read (Config.table); raises ConfigError."""
        self._read = read
        self._restore = restore
        self._config = config
        self._log = log
        self._system = system
        self._service = system.service
        self._selector = selectors.EpollSelector()
        self._store = system.store
        self._inheritance = Inheritance(self._store, log)
        self._crew = system.crew(self._selector, log, self._beat, self._store)
        self._meter = Meter(lambda numbers: report.readings(self._crew, numbers))
        self._bypass_log, self._repeat_log = BypassLog(log), RepeatLog(log)
        self._rule_watch: RuleWatch | None = None
        self._signals, self._began = Signals(), system.clock()
        self._in_place = False  # a restart that was asked for by the verb keeps this process
        self._rules: LiveRules | None = None
        self._rules_unknown = False  # workers were begun, and the rules not looked for yet
        self._routes = LiveRoutes(config.agent.instance, system.route)
        self._drift: DriftCheck | None = None
        self._user = User(-1, -1)
        self._server: Listening | None = None
        self._lock: InstanceLock | None = None
        self._due: dict[Callable[[], None], float] = {}
        self._trial = Trial(self._return_to, self._due, system.clock, log, self._inheritance.keep_trial)
        self._lock_seconds: float | None = None

    # Life.

    def run(self) -> int:
        """Start, serve until told to stop, stop. 0, or 1 after a failure, which the log names."""
        self._signals.catch(self._selector)
        # Any other end is a failure, also a fault of the agent that is raised from here.
        failed, clean, leaves = True, False, False
        try:
            try:
                self.start()
                while not self._signals.over:
                    self.turn()
                failed, leaves = False, not self._signals.stop
            except FAILURES as error:
                self._log(failure_text(error), "error")
                if leaves := self._inheritance.serves_on:
                    self._log("what served before this start keeps serving", "warning")
            finally:
                clean = self._leave(failed) if leaves else self.stop(failed)
        finally:
            self._release()
        return 0 if clean and not failed else 1

    def _leave(self, failed: bool) -> bool:
        """Leave processes, rules and queues as they are: the next agent takes them over, in this process or another."""
        self._inheritance.keep(self._meter)
        if not failed:
            self._trial.leave()
        self._crew.leave()
        if failed or (self._store.outlives and not self._in_place):
            return True
        try:
            server = self._server.handed if self._server is not None else {}
            lock = self._lock.handed() if self._lock is not None else {}
            self._system.start_again(self._store.kept | server | lock)
        except OSError as error:
            self._log(f"this program cannot be started again: {error}", "error")
        self.stop(True)
        return False

    def start(self) -> None:
        """Bind the queues, start the workers, then put the rules in. Raises one of FAILURES; `stop` undoes what was done."""
        agent, system = self._config.agent, self._system
        if not system.may_change_rules():
            lacking = "CAP_NET_ADMIN is missing: without it no queue and no rule can be made"
            raise WorkerError(f"{lacking}; start as root, or with that capability")
        self._lock = system.lock(agent.instance)
        self._log(f"start: instance {agent.instance} is locked", "debug")
        if agent.confinement == "required" and (what := confinement.lacking("required")) is not None:
            raise WorkerError(f'{what}; allowed here: confinement = "available"')
        confinement.log_lacking(agent.confinement, self._log)
        self._user, made = system.ensure_user(agent.user)
        if made:
            self._log(f"created the system user {agent.user} (uid {self._user.uid})")
        # What writes rules is loaded while workers prepare, or, where packets wait for them since a crash, after that.
        self._rules_unknown = not self._inheritance.pending
        self._start_workers(self._find_rules if self._rules_unknown else lambda: None)
        rules = self._rules or self._find_rules()
        self._drift = DriftCheck(rules, self._meter, self._log, agent.drift_check)
        if rules.host.notice:
            self._log(rules.host.notice, "warning")
        if self._signals.stop:
            return
        ruleset = self._drift.ruleset = planned(self._config, self._user.uid, rules.host)
        # Stale rules of this instance, from any configuration, are removed in the same commit that puts the new ones in.
        self._routes.begin(self._config)
        state = states(rules.apply(self._drift.wanted(ruleset)))
        self._log("start: rules are in and verified", "debug")
        for descriptor in rules.host.descriptors:
            self._store.put("table", descriptor)
        rules.accepts = accept_rules(self._config, rules.host.families)
        self._drift.begin(state, system.wall())
        self._inheritance.start_meter(self._meter, listing(state), self._drift.in_front)
        self._inheritance.taken(self._config.table)
        self._crew.close_leftovers()
        self._server = system.listen(agent.instance)
        self._server.serve(self._selector, self._answer)
        self._start_clocks(rules)
        self._trial.resume(self._inheritance.trial, self._restore)
        self._service.ready()
        # Not before: each process of the host is looked at.
        for notice in system.notices(self._config, rules.host.name):
            self._log(f"{notice.text}; {notice.advice}", "warning")
        found = f"{len(listing(state))} {rules.host.name} rules are in"
        self._log(f"instance {agent.instance} is serving {report.serving(self._crew)}: {found}")

    def _start_workers(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._config = self._system.advance(self._config)
        self._crew.add(self._workers_of(self._config), meanwhile)
        self._log(f"start: workers answer: {report.serving(self._crew)}", "debug")

    def _find_rules(self) -> LiveRules:
        self._rules_unknown = False
        host = self._system.choose(self._config, self._store.take("table"))
        self._rules = LiveRules(host, self._system.elsewhere(host, self._config.agent.instance))
        return self._rules

    def _start_clocks(self, rules: LiveRules) -> None:
        now = self._system.clock()
        self._due |= {self._tick: now, self._watch: now}
        if (period := self._service.watchdog) is not None:
            # A long-held xtables lock must not trigger the watchdog: a change that cannot be made soon is tried again later.
            self._lock_seconds = rules.host.lock_seconds
            rules.host.lock_seconds = period / 3
        assert self._drift is not None
        self._rule_watch = RuleWatch(self._system, self._selector, self._drift, self._due, self._say_bypasses)

    def turn(self) -> None:
        """Wait for the next event, and process it. Raises one of FAILURES."""
        wait = max(0.0, min(self._due.values()) - self._system.clock())
        for key, _ in self._selector.select(wait):
            key.data()
        if self._signals.reload and not self._signals.over:
            self._signals.reload = False
            self._reload_with_code(None)
        if self._signals.restart and not (self._in_place or self._store.outlives):
            # No service manager would start it again: check first whether it would start.
            self._signals.restart = False
            self._restart()
        now = self._system.clock()
        for action, due in list(self._due.items()):
            if due <= now and not self._signals.over:
                action()
        for due_again in (self._crew.revive(now), None if self._server is None else self._server.expire()):
            if due_again is not None:
                self._due[self._tick] = min(self._due[self._tick], due_again)

    def stop(self, failed: bool) -> bool:
        """Remove the rules, let the queues run empty, end the workers. True if all rules could be removed that should go.

        failed: rules of queues with `bypass = false` stay, and block their traffic.
        """
        self._service.stopping()
        # Also after a start that failed: the previous agent, killed or started again in place, may have left rules that now lead
        # to no process. Without the lock they may be another agent's.
        may_remove = self._lock is not None and (self._rules_unknown or self._rules is not None or self._inheritance.pending)
        stop = Stop(self._config.agent.instance, self._crew, self._routes, self._drift, self._log)
        clean = stop.run(self._rules_to_remove if may_remove else None, failed)
        self._inheritance.clear()
        if clean and not failed:
            self._log("stopped") if self._drift is None else self._drift.log_stopped()
        return clean

    def _rules_to_remove(self) -> LiveRules:
        rules = self._rules or self._find_rules()
        if self._lock_seconds is not None:
            rules.host.lock_seconds = self._lock_seconds
        return rules

    def _release(self) -> None:
        for each in (self._server, self._rule_watch):
            if each is not None:
                each.close()
        if self._lock is not None:
            self._lock.release()
        self._signals.close()
        self._selector.close()

    # Workers.

    def _workers_of(self, config: Config) -> list[Worker]:
        return workers_of(config, self._user, self._log, self._private)

    def _private(self) -> Iterator[int]:
        """Descriptors that no child may keep open after this process has ended."""
        yield from (self._selector.fileno(), *self._signals.descriptors, *self._store.descriptors)
        yield from self._crew.descriptors
        for each in (self._server, self._lock, self._rule_watch):
            if each is not None:
                yield from each.descriptors
        if self._rules is not None:
            yield from self._rules.host.descriptors

    # Clocks.

    def _tick(self) -> None:
        now = self._system.clock()
        self._due[self._tick] = now + _TICK
        self._meter.sample(now, {number: worker.counters.received for number, worker in self._crew.queues.items()})
        self._inheritance.keep(self._meter)
        self._service.status(f"Serving {report.serving(self._crew)}; {self._meter.summary}{self._config.remark}")
        for worker in self._crew.workers:
            worker.look()
        self._repeat_log.say(report.unmarked(self._crew), lambda: self._system.rewriting(self._config), now)
        # In this order: a change during a trial is found after it.
        if not self._trial.keeps_file_out and (changed := self._config.changed_files()):
            self._log(f"reloading: {', '.join(map(str, changed))} changed")
            self.reload()

    def _watch(self) -> None:
        """Kill a worker that is stuck, and feed the service manager's watchdog."""
        now = self._system.clock()
        self._due[self._watch] = now + min(_TICK, (self._service.watchdog or 4 * _TICK) / 4)
        decision = decide({worker: worker.stuck_for(now) for worker in self._crew.workers})
        if decision.feed:
            self._beat()
        for worker, seconds in decision.kill.items():
            if worker.child is not None:
                self._log(f"{worker.title} (pid {worker.pid}) made no progress for {seconds:.1f} s; it is killed", "error")
                worker.child.kill()

    def _beat(self) -> None:
        """Feed the service manager's watchdog, if it has one: also while this waits for a worker."""
        if self._service.watchdog is not None:
            self._service.alive()

    def _say_bypasses(self) -> None:
        self._bypass_log.say(lambda: self._status([]).bypasses, self._system.clock())

    # Reload.

    def reload(self, confirm: float | None = None) -> dict[str, Any]:
        """Put the file into force, all of it or nothing; for `confirm` seconds unless confirmed. Answers `nfq-agent reload`."""
        self._service.reloading()
        before = self._config
        self._trial.foresee(before, confirm)
        try:
            # Changed code of elements is loaded, or, if the reload fails, stays as it was.
            with self._system.reimported() as changed_files:
                message = self._change_to(self._read())
            if changed_files:
                message += f"; new code: {', '.join(changed_files)}"
            answer = {"ok": True, "message": message, **self._trial.begin(before, confirm)}
            self._log(message)
        except ConfigError as error:
            self._trial.unchanged()
            answer = {"ok": False, "config": True, "message": "\n".join(error.faults)}
            for fault in error.faults:
                self._log(f"reload refused, the configuration in force stays: {fault}", "error")
        except FAILURES as error:
            self._trial.unchanged()
            answer = {"ok": False, "message": str(error)}
            self._log(f"reload failed, the configuration in force stays: {error}", "error")
        self._service.ready()
        return answer

    def _reload_with_code(self, confirm: float | None) -> dict[str, Any]:
        """A person's reload, by the verb or SIGHUP: after an upgrade, new code comes with the configuration."""
        if not self._system.code_changed():
            return self.reload(confirm)
        return self._restart() if confirm is None else {"ok": False, "message": NEW_CODE}

    def _return_to(self, before: Config) -> str:
        self._service.reloading()
        try:
            return self._change_to(before)
        finally:
            self._service.ready()

    def _change_to(self, new: Config) -> str:
        """Put `new` into force. If it raises, the old configuration is in force again."""
        assert self._rules is not None
        assert self._drift is not None
        refuse_change(self._config, new)
        new = self._system.advance(new)
        switch = Switch(self._crew, self._rules, self._routes, self._drift, self._system, self._log)
        message = switch.change(self._config, new, self._workers_of(new), self._user.uid)
        self._config = new
        self._inheritance.keep_configuration(new.table)
        self._rules.accepts = accept_rules(new, self._rules.host.families)
        if self._rule_watch is not None:
            self._rule_watch.schedule()
        self._drift.sweep()
        return message

    # Answers to the verbs.

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question.get("verb"):
            case "ping":
                return {"pid": os.getpid(), "began": self._began}
            case "restart":
                return self._restart()
            case "reload":
                confirm = question.get("confirm")
                return self._reload_with_code(confirm if confirm is None else float(confirm))
            case "confirm":
                return self._trial.answer(question.get("keep") is True, question.get("faults") is True, question.get("trial"))
            case "chaos":
                return self._trial.drill(self._config, question)
            case "flows":
                return flow_stream.answer(self._crew.workers, question, time.monotonic_ns())
            case "policies":
                # As JSON has it: a value that JSON does not have, as a date, is its text.
                table = json.loads(json.dumps(self._config.table, default=str))
                return {"queues": summary(self._config), "table": table}
            case "status":
                assert self._drift is not None
                return self._status(self._drift.look(self._system.wall())).as_object()
            case verb:
                return {"ok": False, "message": f"unknown verb {verb!r}"}

    def _restart(self) -> dict[str, Any]:
        """Start again with the code that is on the disk, if it would start. The answer to `nfq-agent restart`."""
        if self._trial.runs:
            self._log(f"restart refused: {ON_TRIAL}", "error")
            return {"ok": False, "message": ON_TRIAL}
        if problem := self._system.rehearse(self._beat):
            self._log(f"restart refused, this agent keeps serving: {problem}", "error")
            return {"ok": False, "message": f"it would not start, so the running agent keeps serving:\n{problem}"}
        self._signals.restart = self._in_place = True
        return {"ok": True, "began": self._began}

    def _status(self, found: list[ListedRule]) -> Status:
        assert self._rules is not None
        assert self._drift is not None
        drift = self._drift.status(self._system.wall())
        told = report.status(
            self._config, self._crew, self._meter, self._rules.host.name, found, drift, self._drift.in_front, self._log.lost
        )
        return replace(told, trial=self._trial.status())
