"""`trace`: the way of each matching packet through the elements of the running agent."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from nfq_agent.cli import loading, show
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.flow_records import Questions, printable, protocol_and_names, read_filter, verdict_of, who_of
from nfq_agent.service import control


def trace(flags: Flags, what: str, seconds: float, as_json: bool) -> int:
    """Print each packet that matches, for `seconds`. Exit 1 if no agent can be asked."""
    if read_filter(what) is None:
        return 2
    questions = Questions(loading.instance_of(flags), what)
    try:
        for records in questions.each(seconds):
            for record in records:
                try:
                    lines = [json.dumps(record)] if as_json else [*map(printable, way(record))]
                except (KeyError, TypeError, ValueError):
                    # A worker that was taken over can write anything.
                    questions.missed += 1
                    continue
                # JSON stays on one line.
                tell = show.note if as_json else functools.partial(show.wrapped, indent=6)
                for line in lines:
                    tell(line)
    except control.ControlError as error:
        show.error(f"nfq-agent: {error}")
        return 1
    except KeyboardInterrupt:
        pass
    questions.say_missed()
    return 0


def way(record: dict[str, Any]) -> Iterator[str]:
    """The lines of one packet: its description, the answer of each element, and the verdict."""
    known = [name for name in (who_of(record), protocol_and_names(record)) if name]
    yield ", ".join((f"{record['packet']} {record.get('hook', '')}, {record['length']} bytes", *known))
    steps = record["steps"]
    answered = record["element"] == steps[-1][0] if steps else False
    for place, (element, rule) in enumerate(steps, 1):
        last = place == len(steps) and answered
        yield f"  {element}: {verdict_of(record) if last else 'no answer'}{f' by {rule}' if rule and last else ''}"
    if not answered:
        yield f"  {record['element']}: {verdict_of(record)}"
