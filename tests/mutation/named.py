#!/usr/bin/env python3
"""Makes each named fault in a copy of the package, and runs the test that must notice it.

tests/mutation/named.py [--kernel] [WORD ...]   (.venv's Python; the faults whose name has one of the words, all if none is given)

Each fault replaces a text that stands exactly once in its file: when the code changes so that it does not, the list here is to
be mended. --kernel also runs those that only a test on the real kernel notices, which takes root. Prints one line for each
fault and exits 1 if one is not noticed. A fault in compiled code is compiled in the copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "agent" / "nfq_agent"


@dataclass(frozen=True, slots=True)
class Fault:
    """A text of a file of the package, what replaces it, and the test that fails then: below tests/, as pytest names it."""

    name: str
    file: str
    old: str
    new: str
    test: str


FAULTS = (
    Fault(
        "five-tuple not compared in the reader's 64 places",
        "host/nfqueue/recent.pxd",
        "return place.length == length and memcmp(place.key, key, length) == 0",
        "return place.length == length",
        "unit/test_inbox_answers.py::test_five_tuples_in_the_same_place_have_their_own_verdicts",
    ),
    Fault(
        "failed reload leaves added workers",
        "service/reload.py",
        "lambda: crew.add(change.added), lambda: crew.retire(change.added))",
        "lambda: crew.add(change.added), lambda: None)",
        "unit/test_supervisor_reload.py::test_a_step_of_a_reload_that_fails_leaves_what_was_in_force",
    ),
    Fault(
        "failed reload leaves replaced workers",
        "service/reload.py",
        "partial(crew.replace, successor, old),",
        "lambda: None,",
        "unit/test_supervisor_reload.py::test_a_step_of_a_reload_that_fails_leaves_what_was_in_force",
    ),
    Fault(
        "drift check reads no counters",
        "service/drift_check.py",
        '        self._unreadable = ""\n        self._meter.read(listing(state), whole=False)\n',
        '        self._unreadable = ""\n',
        "unit/test_supervisor.py::test_the_drift_check_repairs_and_counts",
    ),
    Fault(
        "a rule is deleted by its number without a look at it (_expect_ours)",
        "host/xtables/kernel.py",
        "                        self._expect_ours(table, rule.chain, number)\n",
        "",
        "kernel/test_rules_kernel.py::test_a_rule_that_moved_unnoticed_is_not_mistaken_for_ours",
    ),
    Fault(
        "remembered verdicts without a bound",
        "service/turn_policy.py",
        "return remembered >= REMEMBERED",
        "return False",
        "unit/test_turn_policy.py::test_remembered_verdicts_are_bounded",
    ),
    Fault(
        "the bound of remembered verdicts is not asked for",
        "service/packet_loop.py",
        "if forgets(len(self._known)):",
        "if False:",
        "unit/test_packet_loop.py::test_remembered_verdicts_are_bounded",
    ),
    Fault(
        "connections of the SYN monitor without a bound",
        "elements/syn_monitor.py",
        "if len(self._seen) >= self._memory:",
        "if False:",
        "unit/test_elements_syn_monitor.py::test_ten_thousand_sources_are_remembered_in_ten_megabytes",
    ),
    Fault(
        "sources of the SYN monitor without a bound",
        "elements/syn_monitor.py",
        "Windows(options.per_source, options.memory)",
        "Windows(options.per_source, 1 << 60)",
        "unit/test_elements_syn_monitor.py::test_ten_thousand_sources_are_remembered_in_ten_megabytes",
    ),
    Fault(
        "busy_poll ignored by the loop",
        "service/packet_loop.py",
        "TurnPolicy(waits, settings.busy_poll)",
        "TurnPolicy(waits, 0.0)",
        "unit/test_packet_loop.py::test_busy_polling_looks_again_and_again_before_it_sleeps",
    ),
    Fault(
        "busy_poll ignored by the turns that wait",
        "service/packet_loop.py",
        "be_patient(PATIENCE)\n            self._kernel.poll_for(self._policy.poll)",
        "be_patient(PATIENCE)",
        "unit/test_packet_loop.py::test_busy_polling_is_passed_on_to_the_turns_that_wait",
    ),
    Fault(
        "delayed verdicts not released at the end",
        "service/packet_loop.py",
        "            self._release(math.inf)\n",
        "",
        "unit/test_packet_loop.py::test_delayed_verdicts_are_given_at_the_end",
    ),
    Fault(
        "a failed bind left bound",
        "queue/binding.py",
        "            with contextlib.suppress(OSError):\n                self.unbind()\n            raise\n",
        "            raise\n",
        "unit/test_queue_contract.py::test_a_setting_that_the_kernel_refuses_is_named_and_leaves_the_number_free",
    ),
    Fault(
        "max_connections ignored by the loop",
        "proxy/loop.py",
        "Listeners(listeners, self._epoll, settings.max_connections,",
        "Listeners(listeners, self._epoll, 1 << 30,",
        "unit/test_proxy_loop.py::test_clients_that_say_nothing_do_not_shut_others_out",
    ),
    Fault(
        "max_connections ignored where many are accepted together",
        "proxy/listeners.py",
        "if (room := self.limit - active()) > 0:",
        "if (room := 1000) > 0:",
        "unit/test_proxy_loop.py::test_no_more_connections_than_max_connections",
    ),
    Fault(
        "max_connections ignored by the listeners",
        "proxy/listeners.py",
        "            if active() >= self.limit:",
        "            if False:",
        "unit/test_listeners.py",
    ),
    Fault(
        "lost log lines not counted",
        "log.py",
        "            self.lost += 1\n",
        "            pass\n",
        "unit/test_log.py::test_lines_that_were_lost_are_counted_and_said_first",
    ),
    # Those of tests that once did not test their name.
    Fault(
        "test_busy_poll: busy_poll ignored by the turns that wait",
        "service/packet_loop.py",
        "be_patient(PATIENCE)\n            self._kernel.poll_for(self._policy.poll)",
        "be_patient(PATIENCE)",
        "kernel/test_worker_life.py::test_busy_poll",
    ),
    Fault(
        "test_busy_poll: busy_poll ignored where the loop polls",
        "service/packet_loop.py",
        "        while not count and now < begin + seconds:\n",
        "        while False:\n",
        "kernel/test_worker_life.py::test_busy_poll",
    ),
    Fault(
        "test_drain_takes_what_waits: the backlog is not accepted",
        "proxy/listeners.py",
        "            while self.accept(listener, active, take, now) is Outcome.MORE:\n                pass\n",
        "            pass\n",
        "unit/test_listeners.py::TestAccept::test_drain_takes_what_waits_and_closes",
    ),
    Fault(
        "test_drain_takes_what_waits: one turn of the backlog is accepted",
        "proxy/listeners.py",
        "            while self.accept(listener, active, take, now) is Outcome.MORE:\n                pass\n",
        "            self.accept(listener, active, take, now)\n",
        "unit/test_listeners.py::TestAccept::test_drain_takes_what_waits_and_closes",
    ),
    Fault(
        "test_ten_thousand_sources: the first thousand are shown",
        "elements/syn_monitor.py",
        "        if key in self._seen:\n",
        "        if key in self._seen or len(self._seen) > 1000:\n",
        "kernel/test_elements_kernel.py::test_ten_thousand_sources_at_the_syn_monitor",
    ),
    Fault(
        "test_ten_thousand_sources: a kilobyte more for each",
        "elements/syn_monitor.py",
        "        self._seen[key] = None\n",
        "        self._seen[key + bytes(1024)] = self._seen[key] = None\n",
        "kernel/test_elements_kernel.py::test_ten_thousand_sources_at_the_syn_monitor",
    ),
    Fault(
        "test_too_few_descriptors: the limit is not fitted to the descriptors",
        "proxy/listeners.py",
        "        self.limit = possible\n",
        "",
        "kernel/test_proxy_life.py::TestMany::test_too_few_descriptors",
    ),
)  # fmt: skip


def make(fault: Fault, copy: Path) -> None:
    """Make the fault in a new copy of the source root."""
    shutil.copytree(PACKAGE, copy / "agent" / "nfq_agent", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "agent" / "nfq_agent" / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its text stands {text.count(fault.old)} times in {fault.file}; mend the list")
    path.write_text(text.replace(fault.old, fault.new))
    if path.suffix in (".pyx", ".pxd"):
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        # It builds what depends on the file, and nothing else.
        build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=copy, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def passes(copy: Path, tests: Iterable[str]) -> bool:
    """Whether these tests pass with the package below `copy`."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "agent"), "PYTHONDONTWRITEBYTECODE": "1"}
    paths = [str(ROOT / "tests" / test) for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {', '.join(tests)}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Print a line for each fault; 1 if one was not noticed."""
    parser = argparse.ArgumentParser(description="Makes each named fault and runs the test that must notice it.")
    parser.add_argument("--kernel", action="store_true", help="also the tests on the real kernel (root)")
    parser.add_argument("word", nargs="*")
    asked = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if (asked.kernel or not fault.test.startswith("kernel/"))
        and (not asked.word or any(word in fault.name for word in asked.word))
    ]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(PACKAGE, Path(folder) / "agent" / "nfq_agent")
        if not passes(Path(folder), sorted({fault.test for fault in chosen})):
            raise SystemExit("these tests fail without a fault: they show nothing")
    for fault in chosen:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            make(fault, Path(folder))
            seen = not passes(Path(folder), [fault.test])
        missed += not seen
        print(f"{'noticed' if seen else 'NOT NOTICED'}: {fault.name} ({fault.test})", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
