"""`export`: reads the flows of the running agents and writes them as IPFIX or JSON lines.

A process of its own, without the agent's rights. The agent never waits for it: records that it missed, that the agent left out,
and that its output did not take are counted, written to the output, and logged once a minute.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import typer

from nfq_agent.cli.export_output import Encoding, FlowOutput, ReaderGone, output
from nfq_agent.cli.flow_records import EVERY, Questions, say_wrong
from nfq_agent.flow_filter import FilterError, parse
from nfq_agent.flow_lines import FlowLines
from nfq_agent.flow_periods import FlowPeriods
from nfq_agent.flow_report import FlowReport
from nfq_agent.ipfix import IpfixSession
from nfq_agent.service import control

FORMS: Final[dict[str, Callable[[int, int], Encoding]]] = {
    "ipfix": IpfixSession,
    "json": lambda _domain, _enterprise: FlowLines(),
}
# Seconds between two reports of the exporter's own figures, and that an agent may take to answer.
_TELLS: Final = 60.0
_PATIENCE: Final = 2.0


def export(instance: str | None, encoding: Encoding, target: str, what: str, timeouts: tuple[float, float]) -> int:
    """Write flows until SIGTERM or SIGINT. instance: this one, else all that run. timeouts: active and idle, in seconds."""
    try:
        part = parse(what)
        out = output(target, encoding)
    except FilterError as error:
        say_wrong(error)
        return 2
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    exporter = Exporter(out, FlowPeriods(part, time.monotonic(), *timeouts))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                exporter.turn([instance] if instance else control.instances())
                time.sleep(EVERY)
        # What came since the last question.
        exporter.turn([instance] if instance else control.instances())
        exporter.finish()
    except ReaderGone:
        print("nfq-agent: no process reads the standard output any more", file=sys.stderr)
        return 1
    return 0


class Exporter:
    """Asks the agents and writes what they report."""

    def __init__(self, out: FlowOutput, periods: FlowPeriods) -> None:
        self._out = out
        self._periods = periods
        self._agents: dict[str, Questions] = {}
        self._begun: set[str] = set()
        self._said = 0
        self._tells = time.monotonic() + _TELLS
        self._problems: set[str] = set()

    @property
    def _all_missed(self) -> int:
        return sum(asked.missed for asked in self._agents.values()) + self._periods.missed

    def turn(self, instances: list[str]) -> None:
        """Ask each instance once, and write what is due. Raises ReaderGone."""
        now = time.monotonic()
        self._periods.epoch = time.time() - now
        problems: set[str] = set()
        reports = [report for name in instances for report in self._told(name, problems)]
        reports += self._periods.due(now)
        self._out.write(reports, time.time())
        if self._out.problem:
            problems.add(f"{self._out.problem}; records are lost until it is back")
        for problem in sorted(problems - self._problems):
            print(f"nfq-agent: {problem}", file=sys.stderr, flush=True)
        self._problems = problems
        if now >= self._tells:
            self._tells = now + _TELLS
            self._tell()

    def finish(self) -> None:
        """Write what is known of the flows that have not ended."""
        self._out.write([*self._periods.finish()], time.time())
        self._tell()
        self._out.close()

    def _told(self, name: str, problems: set[str]) -> Iterator[FlowReport]:
        asked = self._agents.setdefault(name, Questions(name, None))
        try:
            records = asked.ask(_PATIENCE)
        except control.ControlError as error:
            problems.add(str(error))
            return
        if name not in self._begun:
            self._begun.add(name)
            print(f"nfq-agent: the flows of instance {name} go to {self._out.name}", file=sys.stderr, flush=True)
        yield from self._periods.add(name, records, time.monotonic())

    def _tell(self) -> None:
        """Write the figures to the output, and say how many records are missing, if more are than before."""
        self._out.statistics(os.getpid(), self._all_missed, time.time())
        missing = self._all_missed + self._out.lost
        if missing > self._said:
            print(
                f"nfq-agent: {missing - self._said} records of flows were missed ({missing} in all)", file=sys.stderr, flush=True
            )
            self._said = missing
