"""Lives of an agent: what it runs, the step at which one of its processes dies, and whether the host is then as it was before."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from mortal import Limits, Mortal, Verb
from plans import Code, Outcome, Plan, configuration
from steps import Target, until
from world import World, hold_lock, tables_of

# Seconds. Processes end within these when the main one has died: a hung worker's timer takes ten.
_END_WITHIN: Final = 25.0
_DONE_WITHIN: Final = 60.0
_TELLS_REMEDY: Final = "run `nfq-agent remove`"
_RESTORED_AWAY: Final = "for what in F X; do iptables-legacy -w -t mangle -$what NFQA-default-OUTPUT 2>/dev/null || true; done"
_MEMORY: Final = Path("/sys/fs/cgroup/memory")


class Life:
    """One plan, carried out in a world."""

    def __init__(self, world: World, plan: Plan, code: Code, source: random.Random) -> None:
        self.plan = plan
        self._world = world
        self._code = code
        self._source = source
        self._config = world.folder / "agent.toml"
        self._log = (world.run if plan.shortage == "disk" else world.folder) / "agent.log"
        self._log.unlink(missing_ok=True)
        self._outcome = Outcome(Counter(), Counter(), [])
        self._agent: Mortal | None = None
        self._held: int | None = None
        self._changed = False

    def run(self) -> Outcome:
        """All of it."""
        began = time.monotonic()
        try:
            with self._shortage() as limits:
                agent = self._lives(limits)
            self._settle(agent)
        finally:
            self._outcome.log = self._outcome.log or self._read_log()
            self._log.unlink(missing_ok=True)
            self._clear()
        self._outcome.seconds = time.monotonic() - began
        return self._outcome

    def _lives(self, limits: Limits) -> Mortal:
        """Carry out the scenario once for each target; the last agent, which may have ended."""
        agent = None
        for target in self.plan.targets or (None,):
            if agent is not None:
                if not agent.ended():
                    self._expect_recovered()
                elif not self._between(agent):
                    return agent
            if agent is None or agent.ended():
                agent = self._begin(limits, target)
                if self.plan.scenario == "start":
                    self._count_death()
                    continue
                if not self._until(self._is_serving) or agent.ended():
                    return agent
            self._carry_out(agent, target)
        assert agent is not None
        return agent

    def _begin(self, limits: Limits, target: Target | None) -> Mortal:
        self._changed = False
        # It doubles while another program changes the rules again and again.
        drift_check = "200ms" if self.plan.scenario == "repair" else "5s"
        self._config.write_text(configuration(self.plan.feature, self.plan.backend, False, drift_check))
        if self._agent is not None:
            self._agent.steps.close()
        self._log.unlink(missing_ok=True)
        agent = self._agent = Mortal(self._world.namespace, self._inside(self._log), self._config, limits)
        if self.plan.scenario == "start":
            agent.steps.begin(target)
            self._until(self._is_serving)
        return agent

    def _between(self, agent: Mortal) -> bool:
        """An agent has ended and the next one will be started without a remedy. False if that is of no use."""
        self._processes_end()
        if agent.code is not None and agent.code >= 0:
            # In order: nothing more may follow before that was looked at.
            return False
        if self.plan.backend == "owned":
            self._compare_owned()
        return not self._outcome.problems

    def _inside(self, path: Path) -> Path:
        return Path("/run") / path.name if self.plan.shortage == "disk" else path

    def _problem(self, text: str) -> None:
        self._outcome.problems.append(text)

    # Shortages.

    @contextlib.contextmanager
    def _shortage(self) -> Iterator[Limits]:
        plan, group = self.plan, None
        try:
            match plan.shortage:
                case "lock":
                    self._held = hold_lock(self._world.run / "xtables.lock", plan.amount / 1000)
                case "disk":
                    self._world.fill()
                case "group":
                    group = _MEMORY / f"deaths-{os.getpid()}"
                    group.mkdir(exist_ok=True)
                    (group / "memory.limit_in_bytes").write_text(str(plan.amount * 1000))
            yield Limits(
                memory=plan.amount * 1000 if plan.shortage == "memory" else None,
                descriptors=plan.amount if plan.shortage == "descriptors" else None,
                group=group,
            )
        finally:
            if plan.shortage == "disk":
                self._world.unfill()
            if self._held is not None:
                os.kill(self._held, signal.SIGKILL)
                os.waitpid(self._held, 0)

    # The scenario.

    def _carry_out(self, agent: Mortal, target: Target | None) -> None:
        plan = self.plan
        if plan.scenario == "serve":
            self._serve(agent, target)
            self._count_death()
            return
        agent.steps.begin(target)
        match plan.scenario:
            case "reload":
                self._changed = not self._changed
                self._config.write_text(configuration(plan.feature, plan.backend, self._changed))
                self._verb("reload")
            case "restart":
                self._verb("restart")
            case "upgrade":
                self._code.change()
                self._verb("reload")
            case "stop":
                os.kill(agent.pid, signal.SIGTERM)
                self._until(agent.ended)
            case "repair":
                self._repair()
        self._count_death()

    def _count_death(self) -> None:
        assert self._agent is not None
        steps = self._agent.steps
        self._outcome.counts = Counter(steps.counts)
        steps.end()
        if steps.killed is not None:
            self._outcome.deaths[self.plan.scenario, *steps.killed[1:]] += 1

    def _until(self, condition: Callable[[], bool], seconds: float = _DONE_WITHIN, told: bool = True) -> bool:
        """Let the agent run until this holds or it ends; False, and a problem if `told`, when it does not in time."""
        agent = self._agent
        assert agent is not None
        if until(agent.steps, lambda: condition() or agent.ended(), seconds):
            return True
        if told:
            self._problem(f"{condition.__name__} took more than {seconds:g} s")
        return False

    def _is_serving(self) -> bool:
        if self.plan.shortage == "disk":
            # Its log is on the full disk.
            return (self._world.run / "nfq-agent/default.sock").exists()
        return self._log.exists() and "is serving" in self._log.read_text(errors="replace")

    def _verb(self, name: str) -> int | None:
        """Run a verb while the agent is let run; its exit code."""
        verb = Verb(self._world.namespace, self._world.folder / "verb.log", name, "--config", str(self._config))
        self._until_ended(verb)
        return verb.code

    def _until_ended(self, verb: Verb) -> None:
        agent = self._agent
        assert agent is not None
        if not until(agent.steps, lambda: verb.ended() or agent.ended(), _DONE_WITHIN):
            self._problem(f"{' '.join(verb.argv)} took more than {_DONE_WITHIN:g} s")
        # Without an agent `restart` waits for its successor.
        if not until(agent.steps, verb.ended, 0.2):
            verb.kill()
            until(agent.steps, verb.ended, 5)

    def _serve(self, agent: Mortal, target: Target | None) -> None:
        """Kill a process at a moment, whatever it does."""
        agent.steps.begin()
        if target is None:
            return
        moment = time.monotonic() + target.step / 1000
        until(agent.steps, lambda: time.monotonic() > moment or agent.ended(), 10)
        if agent.ended():
            return
        others = [pid for pid in self._world.processes() if pid != agent.pid]
        pid = agent.pid if target.kind == "supervisor" or not others else self._source.choice(others)
        agent.steps.kill(pid, replace(target, kind="supervisor" if pid == agent.pid else "worker"))
        until(agent.steps, agent.ended, 0.1)

    def _repair(self) -> None:
        """Change what belongs to the agent, as another program does, and wait until it is repaired."""
        if self.plan.feature == "tap":
            return
        if self.plan.backend == "owned":
            # Restored by a program that saved it: it is nowhere where the agent's rules are now.
            script = (
                "iptables-legacy -w -t mangle -N NFQA-default-OUTPUT; iptables-legacy -w -t mangle -A NFQA-default-OUTPUT "
                "-m comment --comment nfq-agent:default:app -j RETURN"
            )
        else:
            script = (
                "for command in iptables-legacy ip6tables-legacy; do for table in mangle nat; do $command-save -t $table | "
                "sed -n '/^-A [A-Z]* .*NFQA/s/^-A/-D/p' | while read -r line; do eval $command -w -t $table $line; done; "
                "done; done"
            )
        repairs, tables = self._repairs(), self._world.tables()
        change = self._world.namespace.start("sh", "-c", script)
        self._until(lambda: change.poll() is not None)
        if self.plan.shortage != "disk":

            def is_repaired() -> bool:
                return self._repairs() > repairs

            # A process that was killed right after its change has not reported it.
            if not self._until(is_repaired, 10, told=False) and self._world.tables() != tables:
                self._until(is_repaired)
        if self.plan.backend == "owned" and self._agent is not None and self._agent.ended():
            # It may have been told to end, and the other program restored the rule when the agent had looked for the last time.
            change.wait()
            self._world.namespace.shell(_RESTORED_AWAY)

    def _repairs(self) -> int:
        log = self._read_log()
        return log.count("; repaired in") + log.count("removed 1 rules of this instance")

    # Afterwards.

    def _settle(self, agent: Mortal) -> None:
        killed = agent.steps.killed
        if killed is not None and killed[0] == agent.pid and killed[2] != "TERM":
            if not until(agent.steps, agent.ended, 5):
                self._problem("the killed process did not end")
            self._after_death()
            return
        if not agent.ended():
            if killed is not None:
                self._expect_recovered()
            if not agent.ended():
                os.kill(agent.pid, signal.SIGTERM)
                if not until(agent.steps, agent.ended, _END_WITHIN):
                    self._problem(f"it did not stop within {_END_WITHIN:g} s")
                    return
        self._after_own_end(agent)

    def _expect_recovered(self) -> None:
        """One of its processes died: it works as before."""
        agent = self._agent
        assert agent is not None
        if self.plan.shortage != "none":
            return
        until(agent.steps, self._is_serving, 20)
        if agent.ended():
            return
        before = self._world.passed()
        if not until(agent.steps, lambda: agent.ended() or self._passes(before), 20):
            self._problem(f"traffic does not pass though the agent runs: {before}, {self._world.passed()}")

    def _passes(self, before: tuple[int, int]) -> bool:
        return all(now > then for now, then in zip(self._world.passed(), before, strict=True))

    def _after_own_end(self, agent: Mortal) -> None:
        """It ended by itself, or was told to: nothing may be left, without a remedy."""
        if agent.code is not None and agent.code < 0:
            self._outcome.deaths[self.plan.scenario, "supervisor", f"signal {-agent.code}"] += 1
            self._after_death()
            return
        text = self._read_log()
        if agent.code not in (0, 1):
            self._problem(f"exit code {agent.code}")
        # What it says on a full disk is lost.
        unread = self.plan.shortage == "disk" and agent.code == 1
        if unread or _TELLS_REMEDY in text or (self.plan.shortage != "none" and "Traceback" in text):
            self._outcome.deaths[self.plan.scenario, "supervisor", "told of a remedy"] += 1
            self._after_death()
            return
        if "Traceback" in text:
            self._problem("a traceback in the log")
        self._processes_end()
        self._compare("after its own end", self._world.before, self._world.seen())
        self._compare_files()

    def _read_log(self) -> str:
        return self._outcome.log or (self._log.read_text(errors="replace") if self._log.exists() else "")

    def _after_death(self) -> None:
        """It was killed: its processes end, what hangs on descriptors goes with them, and the remedy removes the rest."""
        self._processes_end()
        if self.plan.feature in ("queue", "all"):
            before = self._world.passed()[0]
            if not self._wait(lambda: self._world.passed()[0] > before, 10):
                self._problem("datagrams do not pass after the death: a queue has no reader")
        if self.plan.backend == "owned":
            self._compare_owned()
        if self._source.random() < 0.2:
            self._start_and_stop()
        else:
            code = self._verb_after("remove")
            if code != 0:
                self._problem(f"nfq-agent remove: exit code {code}")
        self._compare("after the remedy", self._world.before, self._world.seen())
        self._compare_files()
        passed = self._world.passed()
        if not self._wait(lambda: self._passes(passed), 10):
            self._problem("traffic does not pass after the remedy")

    def _start_and_stop(self) -> None:
        log = self._world.folder / "next.log"
        log.unlink(missing_ok=True)
        verb = Verb(self._world.namespace, log, "run", "--config", str(self._config))
        self._wait(lambda: verb.ended() or (log.exists() and "is serving" in log.read_text(errors="replace")), 30)
        if verb.ended():
            self._problem(f"the next start failed: {log.read_text(errors='replace')}")
            return
        os.kill(verb.pid, signal.SIGTERM)
        if not self._wait(verb.ended, 30) or verb.code != 0:
            self._problem(f"the next agent's stop: {verb.code}: {log.read_text(errors='replace')}")
            verb.kill()

    def _verb_after(self, *argv: str) -> int | None:
        log = self._world.folder / "verb.log"
        log.unlink(missing_ok=True)
        verb = Verb(self._world.namespace, log, *argv)
        if not self._wait(verb.ended, 30):
            verb.kill()
        if verb.code:
            self._problem(log.read_text(errors="replace"))
        return verb.code

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        assert self._agent is not None
        return until(self._agent.steps, condition, seconds)

    def _processes_end(self) -> None:
        began = time.monotonic()
        if not self._wait(lambda: not self._world.processes(), _END_WITHIN):
            names = []
            for pid in self._world.processes():
                with contextlib.suppress(OSError):
                    names.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_text()!r} {Path(f'/proc/{pid}/stat').read_text()}")
            self._problem(f"processes are left after {time.monotonic() - began:.0f} s: {names}")

    def _compare(self, when: str, before: str, after: str) -> None:
        if before != after:
            gone = set(before.splitlines()) - set(after.splitlines())
            new = set(after.splitlines()) - set(before.splitlines())
            self._problem(f"the host is not as before, {when}: gone {sorted(gone)}, new {sorted(new)}")

    def _compare_owned(self) -> None:
        """The tables, before any remedy. In a repair the legacy tables have what this test put into them."""
        before, after = tables_of(self._world.before), self._world.tables()
        if self.plan.scenario == "repair":
            before, after = before.partition("== nft")[2], after.partition("== nft")[2]
        self._compare("without a remedy", before, after)

    def _compare_files(self) -> None:
        if stray := self._world.stray_files() - {"agent.log"}:
            self._problem(f"files are left: {sorted(stray)}")

    def _clear(self) -> None:
        """No process of this life may reach the next."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.steps.close()
            for pid in self._world.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 10
            while time.monotonic() < end and (self._world.processes() or not self._agent.ended()):
                time.sleep(0.005)
        if self.plan.shortage == "group":
            with contextlib.suppress(OSError):
                (_MEMORY / f"deaths-{os.getpid()}").rmdir()
