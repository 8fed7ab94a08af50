"""The lock-out guard of `apply --confirm`: a change is undone unless a person confirms it in time.

The guard is a process of its own, started before the change, so that a lost terminal, a killed session or a cut connection
also undoes the change.
"""

from __future__ import annotations

import os
import select
import sys
import time
from typing import Final

from nfq_agent.host.fork import fork, reap
from nfq_agent.rules.leaving import taken_back
from nfq_agent.rules.model import RuleError, Ruleset
from nfq_agent.service import control
from nfq_agent.service.live_rules import LiveRules, StateByFamily

# The exit code of the guard where an agent has taken over the rules meanwhile.
_AGENT_RUNS: Final = 2


class Guard:
    """Waits for the confirmation; without it, restores the rules that were there before."""

    def __init__(self, seconds: int, live: LiveRules, before: StateByFamily, desired: Ruleset) -> None:
        """before: the rules that were there. desired: the rules that are about to be applied."""
        self._seconds = seconds
        # A process that changes the rules for this one holds the writing end too: EOF comes when all of them have ended.
        reader, self._writer = os.pipe()
        self._pid = fork(lambda: _run_guard(reader, seconds, live, before, desired), [self._writer])
        os.close(reader)

    def dismiss(self) -> None:
        """There is nothing to undo."""
        os.write(self._writer, b"y")
        self._end()

    def ask(self) -> int:
        """Ask for a `yes` on standard input, and wait until the rules are kept or undone. Returns the exit code."""
        print(f"The rules are in. Type yes within {self._seconds} s to keep them; otherwise they are undone.", flush=True)
        if typed_yes(self._seconds):
            self.dismiss()
            print("Kept.")
            return 0
        if (ended := self._end()) == _AGENT_RUNS:
            print("Not confirmed, and nothing was undone.", file=sys.stderr)
        elif ended != 0:
            print("Not confirmed, and the change could not be undone; run `nfq-agent remove`.", file=sys.stderr)
        else:
            print("Not confirmed: the rules are as before.", file=sys.stderr)
        return 1

    def _end(self) -> int:
        os.close(self._writer)
        return reap(self._pid) or 0


def typed_yes(seconds: int) -> bool:
    """Whether a `yes` comes on standard input in time. Where nothing can be typed any more, the time still runs."""
    deadline = time.monotonic() + seconds
    typed = b""
    while (left := deadline - time.monotonic()) > 0:
        try:
            ready, _, _ = select.select([0], [], [], left)
            chunk = os.read(0, 256) if ready else b""
        except (OSError, KeyboardInterrupt):
            return False
        if not chunk:
            # Nothing can be typed here any more; the time limit still applies.
            time.sleep(max(0.0, deadline - time.monotonic()))
            return False
        typed += chunk
        while b"\n" in typed:
            line, _, typed = typed.partition(b"\n")
            if line.strip().lower() in (b"yes", b"y"):
                return True
            print("Not a yes.", flush=True)
    return False


def _run_guard(reader: int, seconds: int, live: LiveRules, before: StateByFamily, desired: Ruleset) -> int:
    os.setsid()
    # Longer than the time limit: an answer at the last moment counts, and the time that the change takes is added.
    ready, _, _ = select.select([reader], [], [], seconds + 15)
    if ready and os.read(reader, 1) == b"y":
        return 0
    instance = live.host.instance
    try:
        control.ask(instance, {"verb": "ping"}, timeout=5)
    except control.ControlError:
        pass
    else:
        # Also if the process that asked was killed.
        print(f"nfq-agent: the agent of instance {instance} has been started and keeps its rules", file=sys.stderr)
        return _AGENT_RUNS
    try:
        now = live.read()
        live.apply({family: taken_back(now[family], before[family], desired.get(family, {})) for family in now})
        live.close()
    except RuleError as error:
        print(f"nfq-agent: {error}", file=sys.stderr)
        return 1
    return 0
