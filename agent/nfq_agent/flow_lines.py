"""Flows as JSON lines, for what reads those: the same methods as IpfixSession. No I/O, no clock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from nfq_agent.flow_report import FlowReport


class FlowLines:
    """One object on a line for each report; each line is a block of its own."""

    def begin(self, now: float) -> bytes:  # noqa: ARG002  # as IpfixSession has it
        """Nothing: a line needs none before it."""
        return b""

    def again(self, now: float) -> bytes:  # noqa: ARG002  # as IpfixSession has it
        """Nothing."""
        return b""

    def blocks(
        self,
        reports: Iterable[FlowReport],
        now: float,  # noqa: ARG002  # likewise
        most: int = 0,  # noqa: ARG002  # likewise
    ) -> Iterator[tuple[bytes, int]]:
        """The lines, each one record."""
        for report in reports:
            yield _line(report.object()), 1

    def statistics(self, process: int, exported: int, missed: int, now: float) -> bytes:  # noqa: ARG002  # likewise
        """A line with the exporter's own figures."""
        return _line({"event": "statistics", "process": process, "exported": exported, "missed": missed})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"
