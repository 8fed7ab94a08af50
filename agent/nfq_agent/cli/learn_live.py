"""`learn --for`: proposes a policy that accepts the flows that a running agent reports, and judges those flows by it.

It watches for days: what it keeps is bounded, an agent that restarts is asked again, and the end of the time, Ctrl-C, SIGTERM and
a lost terminal all end with the proposal.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Final

from nfq_agent.cli import loading, proposal, show
from nfq_agent.cli.explain import is_dpi
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.flow_records import EVERY, Questions, end_of, names_of, printable
from nfq_agent.cli.learned import Learned, Wish, best, by_queue, owner_of, wishes
from nfq_agent.cli.seen_flow import SeenFlow, accepts
from nfq_agent.config.file import load
from nfq_agent.config.models import Config
from nfq_agent.elements.policy import Policy
from nfq_agent.flow_report import FLOW_KEY, check
from nfq_agent.protocols.known import HEADLINES
from nfq_agent.service import control
from nfq_agent.values import duration_text

# Seconds without a record after which a flow counts as ended: it is learned, and its place is free.
_SILENT: Final = 120.0
# Flows that are kept until they end, and different flows that the proposal is judged by.
_MOST_FLOWS: Final = 100_000
_MOST_SEEN: Final = 50_000
# Seconds between two lines of progress, and between two tries to reach an agent that does not answer.
_PROGRESS: Final = 1.0
_AGAIN: Final = 1.0
_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class _Flow:
    """A flow that may still say something. record: the latest. at: when it came, in monotonic seconds."""

    record: dict[str, Any]
    at: float
    wishes: dict[Wish, float] = field(default_factory=dict)


class Watching:
    """What the agent has reported so far. queues: names by queue number."""

    def __init__(self, queues: Mapping[int, str], grouped: Callable[[str], str] | None) -> None:
        self._queues = queues
        self.learned: dict[str, Learned] = by_queue(dict.fromkeys(queues.values()), grouped)
        self._open: dict[tuple[Any, ...], _Flow] = {}
        # Each different flow, the number of equal flows, and one of them as text.
        self._seen: dict[SeenFlow, tuple[int, str]] = {}
        self.flows = 0
        self.dropped = 0
        """Flows that the agent dropped: they are not proposed."""
        self.elsewhere = 0
        """Flows of taps and inline interfaces, which have no queue."""
        self.not_judged = 0
        self.unreadable = 0

    def add(self, records: Iterable[dict[str, Any]], now: float, clock: float) -> None:
        """Take in the records of one answer. now: monotonic seconds. clock: what to add to those for seconds since the epoch."""
        for record in records:
            try:
                check(record)
                self._add(record, now, clock)
            except (KeyError, TypeError, ValueError):
                # A worker that was taken over can write anything.
                self.unreadable += 1
        silent = [key for key, flow in self._open.items() if now - flow.at > _SILENT]
        for key in [*silent, *list(self._open)[: max(0, len(self._open) - _MOST_FLOWS)]]:
            if (flow := self._open.pop(key, None)) is not None:
                self._end(flow, clock)

    def _add(self, record: dict[str, Any], now: float, clock: float) -> None:
        key = tuple(record.get(part) for part in FLOW_KEY)
        flow = self._open.setdefault(key, _Flow(record, now))
        flow.record, flow.at = record, now
        for wish in wishes(record, record, owner_of(record)):
            flow.wishes.setdefault(wish, clock + (now if flow.wishes else record["first"]))
        if record["kind"] == "end":
            self._end(self._open.pop(key), clock)

    @property
    def open(self) -> int:
        """Flows that have not ended, from which nothing is learned yet."""
        return len(self._open)

    def end(self, clock: float) -> None:
        """The watch is over: learn from the flows that have not ended."""
        for flow in self._open.values():
            self._end(flow, clock)
        self._open.clear()

    def _end(self, flow: _Flow, clock: float) -> None:
        record = flow.record
        queue = self._queues.get(record.get("queue", -1))
        if queue is None:
            self.elsewhere += 1
            return
        if record.get("verdict") in ("drop", "reject") and not record.get("would"):
            self.dropped += 1
            return
        self.flows += 1
        owner = owner_of(record)
        who = printable(record["src"] if owner is None else owner[1])
        self.learned[queue].add(flow.wishes, clock + record["first"] + record["duration"], who)
        for wish in best(flow.wishes):
            self._keep(queue, record, wish)

    def _keep(self, queue: str, record: dict[str, Any], wish: Wish) -> None:
        seen = SeenFlow(
            queue, record["proto"], record["dst"], record.get("dport"), str(record.get("hook", "OUTPUT")),
            tuple((name, wish.value if name == wish.fact else _value(record[name])) for name in _SAID if record.get(name)),
            tuple((name, str(record[name])) for name in ("unit", "container", "cgroup") if record.get(name)),
        )  # fmt: skip
        count, text = self._seen.get(seen, (0, ""))
        if not count and len(self._seen) >= _MOST_SEEN:
            self.not_judged += 1
            return
        self._seen[seen] = count + 1, text or _text(record)

    def judge(self, config: Config) -> tuple[int, int, list[str]]:
        """How many flows (once for each name) the proposal accepts, how many there were, and those that it does not accept."""
        policies = dict(_policies(config))
        accepted = total = 0
        missed = []
        for seen, (count, text) in self._seen.items():
            total += count
            if accepts(policies[seen.queue], seen):
                accepted += count
            else:
                missed.append(text)
        return accepted, total, missed


def _policies(config: Config) -> Iterator[tuple[str, Policy]]:
    """The proposed policy of each queue."""
    for name, queue in config.queue.items():
        for spec in config.packet_elements(queue):
            if spec.name == proposal.element_of(name):
                yield name, Policy(spec.name, spec.options, lambda *_, **__: None)


# What a flow said, for the rules that are proposed.
_SAID: Final = ("protocol", *HEADLINES)


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(record: dict[str, Any]) -> str:
    ends = f"{end_of(record, 'src', 'sport')} -> {end_of(record, 'dst', 'dport')}"
    return printable(f"{record['proto']} {ends} {names_of(record)}".rstrip())


def learn(flags: Flags, seconds: float, output: Path | None, grouped: Callable[[str], str] | None = None) -> int:
    """Watch for `seconds`, write the proposal, and print what it covers. Exit 1 where no agent answers at first."""
    config = load(flags.config)
    watching = Watching({number: name for name, queue in config.queue.items() for number in queue.numbers}, grouped)
    for line in _warnings(config):
        show.error(line)
    questions = Questions(loading.instance_of(flags), None)
    with _ending() as ended:
        try:
            _watch(questions, watching, seconds, ended)
        except control.ControlError as error:
            show.error(f"nfq-agent: {error}")
            return 1
    watching.end(time.time() - time.monotonic())
    _say_left_out(watching, questions)
    if not proposal.rules_in(watching.learned):
        show.error("nfq-agent: the agent reported no flow; nothing is proposed")
        return 1
    if not proposal.write(config, watching.learned, output):
        return 1
    accepted, total, missed = watching.judge(proposal.proposed(flags, config, watching.learned))
    proposal.say_coverage(watching.learned, accepted, total, "that were seen", missed)
    return 0


def _warnings(config: Config) -> Iterator[str]:
    for name, queue in config.queue.items():
        if queue.mode != "monitor":
            yield f"queue {name} is not in monitor mode: flows that it drops are not proposed"
        if not any(is_dpi(spec) for spec in config.packet_elements(queue)):
            yield f"queue {name} has no element dpi: addresses are learned, and no names"


@contextmanager
def _ending() -> Iterator[Event]:
    """Tells whether the watch has to end; the signals that end it only set this."""
    ended = Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in _ENDS}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(questions: Questions, watching: Watching, seconds: float, ended: Event) -> None:
    begun = told = time.monotonic()
    away: float | None = None
    answered = False
    while not ended.is_set() and (now := time.monotonic()) - begun < seconds:
        try:
            watching.add(questions.ask(), now, time.time() - now)
        except control.ControlError as error:
            if not answered:
                raise
            if away is None:
                away = now
                show.error(f"nfq-agent: {error}; it is asked again until it answers")
            ended.wait(_AGAIN)
            continue
        answered = True
        if away is not None:
            show.error(f"nfq-agent: it answers again after {duration_text(now - away)}")
            away = None
        if now - told >= _PROGRESS and sys.stderr.isatty():
            told = now
            print(f"\r\033[K{_progress(watching, now - begun, seconds)}", end="", file=sys.stderr, flush=True)
        ended.wait(max(0.0, min(EVERY, begun + seconds - now)))
    if answered and away is None:
        # The records since the last question. An agent that has ended meanwhile reports nothing more.
        with suppress(control.ControlError):
            watching.add(questions.ask(), now := time.monotonic(), time.time() - now)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _progress(watching: Watching, past: float, seconds: float) -> str:
    of = "" if math.isinf(seconds) else f" of {duration_text(seconds)}"
    rules = proposal.rules_in(watching.learned)
    return f"{duration_text(past)}{of}: {watching.flows + watching.open} flows, {rules} rules so far; Ctrl-C writes them"


def _say_left_out(watching: Watching, questions: Questions) -> None:
    left_out = (
        (questions.missed, "records were missed: more came than could be told"),
        (questions.unshown, "flows that passed at the end were not reported: more began than the agent had time to report"),
        (watching.dropped, "flows were dropped by the agent and are not proposed"),
        (watching.elsewhere, "flows of taps, inline interfaces or queues that are not in the configuration are not proposed"),
        (sum(each.left_out for each in watching.learned.values()), "flows are not proposed: there would be too many rules"),
        (watching.not_judged, "flows were not judged by the proposal: there were too many different ones"),
        (watching.unreadable, "records could not be read"),
    )
    for count, text in left_out:
        if count:
            show.error(f"{count} {text}")
