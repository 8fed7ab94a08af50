"""What the running agent measures: rule hits, rates, and packets that passed uninspected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nfq_agent.counters import growth
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import EXPECTED, Rule
from nfq_agent.service.live_rules import ListedRule


@dataclass(frozen=True, slots=True)
class QueueReading:
    """One queue number's figures at one moment: the kernel's (None if this process may not read them) and the worker's."""

    waiting: int | None
    kernel_dropped: int | None
    user_dropped: int | None
    sequence: int | None
    counters: Mapping[str, int]


class ProxyPort(NamedTuple):
    """A port of a proxy. led: whether connections are counted that a rule led there, or those that should be."""

    port: int
    led: bool


# What a rule counts for: the queue numbers that it sends to, or the port of a proxy.
Subject = range | ProxyPort


@dataclass(slots=True)
class _Epoch:
    """The time since which the hits of a queue's rules are known without a gap.

    hits, taken: at its beginning. uninspected: of all epochs before it. latest: of this one, at the latest reading.
    """

    hits: int = 0
    taken: int = 0
    uninspected: int = 0
    latest: int = 0


class Meter:
    """Packets that the rules have matched since the start, by queue numbers or port, and packets a second by queue number.

    A rule's counter begins at zero when the rule is inserted again, so hits are added up from one reading to the next. What
    another program removed with a rule since the last reading is unknown: there a new epoch begins.
    """

    def __init__(self, readings: Callable[[range], Sequence[QueueReading]] = lambda _: ()) -> None:
        """readings: the figures of all numbers of a queue."""
        self.since = time.time()
        self._readings = readings
        self._last: dict[tuple[str, str, str], int] = {}
        self._subjects: dict[tuple[str, str, str], Subject] = {}
        self._total: dict[Subject, int] = {}
        self._epochs: dict[range, _Epoch] = {}
        self._taken_before: dict[InFront, int] = {}
        self._received: Mapping[int, int] = {}
        self._rates: dict[int, float] = {}
        self._sampled = 0.0

    def read(self, found: Iterable[ListedRule], whole: bool = True) -> None:
        """Process one reading of all installed rules. whole: no hit was lost since the last reading (after our own commit)."""
        now: dict[tuple[str, str, str], int] = {}
        subjects: dict[tuple[str, str, str], Subject] = {}
        key: tuple[str, str, str]
        for each in found:
            if (subject := subject_of(each.installed.rule)) is not None:
                # Rules of the same text count together, unless the kernel distinguishes them.
                rule = each.installed
                key = (each.family, each.table, f"handle {rule.handle}" if rule.handle else str(rule.rule))
                now[key] = now.get(key, 0) + each.installed.packets
                subjects[key] = subject
        for key, packets in now.items():
            last = self._last.get(key, 0)
            self._total[subjects[key]] = self._total.get(subjects[key], 0) + (packets - last if packets >= last else packets)
        lost = set() if whole else {self._subjects[key] for key, last in self._last.items() if now.get(key, -1) < last}
        self._last, self._subjects = now, subjects
        for numbers in [subject for subject in self._total if isinstance(subject, range)]:
            self._keep(numbers, numbers in lost)

    def _keep(self, numbers: range, gap: bool) -> None:
        epoch = self._epochs.setdefault(numbers, _Epoch())
        taken = _taken(self._readings(numbers))
        if taken is None:
            return
        hits = self.hits(numbers)
        # A queue that was bound again counts from zero.
        if gap or taken < epoch.taken:
            self._epochs[numbers] = _Epoch(hits, taken, epoch.uninspected + epoch.latest)
        else:
            epoch.latest = max(0, hits - epoch.hits - (taken - epoch.taken))

    def start(self, found: Iterable[ListedRule], in_front: Iterable[InFront] = ()) -> None:
        """Begin at zero: rules that were already there counted for an earlier agent. in_front: foreign ones before ours."""
        self.read(found)
        self._taken_before = {replace(each, packets=0): each.packets for each in in_front}
        self._total = dict.fromkeys(self._total, 0)
        self._epochs = {
            numbers: _Epoch(0, _taken(self._readings(numbers)) or 0) for numbers in self._total if isinstance(numbers, range)
        }

    @property
    def memo(self) -> dict[str, Any]:
        """What another process needs to continue the counts, as an object for JSON."""
        return {
            "since": self.since,
            "rules": [[*key, packets, *_packed(self._subjects[key])] for key, packets in self._last.items()],
            "hits": [[*_packed(subject), packets] for subject, packets in self._total.items()],
            "epochs": [[*_packed(numbers), each.hits, each.taken, each.uninspected] for numbers, each in self._epochs.items()],
        }

    def resume(self, memo: Mapping[str, Any]) -> None:
        """Continue the counts that an earlier process noted. Raises ValueError, KeyError or TypeError if it cannot be read."""
        last, subjects = {}, {}
        for family, table, rule, packets, *packed in memo["rules"]:
            key = str(family), str(table), str(rule)
            last[key], subjects[key] = int(packets), _unpacked(*packed)
        total = {_unpacked(first, end): int(packets) for first, end, packets in memo["hits"]}
        epochs = {range(int(first), int(end)): _Epoch(*map(int, counted)) for first, end, *counted in memo["epochs"]}
        self.since, self._last, self._subjects, self._total, self._epochs = float(memo["since"]), last, subjects, total, epochs

    def taken_by(self, rule: InFront) -> int:
        """Packets that a foreign rule took since the start, or since it was made."""
        before = self._taken_before.get(replace(rule, packets=0), 0)
        return growth(rule.packets, before)

    def hits(self, subject: Subject) -> int:
        """Packets that rules sent to these queue numbers or to this port."""
        return self._total.get(subject, 0)

    def uninspected(self, numbers: range, readings: Sequence[QueueReading]) -> int | None:
        """Packets that passed without a verdict of ours: by fail-open, or by bypass while no process was bound.

        Rule hits that never became a queue entry, less those that the kernel dropped because the queue was full; and entries that
        got a number but never reached the worker (its socket was full), less those dropped for it and those that were cut. None
        where the kernel's figures cannot be read. The readings are not of one instant, so a small negative result means 0. A
        packet that is cut, by the kernel or because the worker asks for it, is one hit and many entries:
        the figure is a lower bound.
        Source: __nfqnl_enqueue_packet() in net/netfilter/nfnetlink_queue.c.
        """
        taken = _taken(readings)
        if taken is None:
            return None
        unseen = 0
        for reading in readings:
            counters = reading.counters
            received = counters["received"] - counters.get("known_received", 0)
            lost = counters["last_id"] - received - counters["lost"] + counters.get("known_lost", 0)
            lost -= (reading.user_dropped or 0) + counters.get("cut", 0)
            unseen += max(0, lost)
        epoch = self._epochs.get(numbers, _Epoch())
        return epoch.uninspected + max(0, self.hits(numbers) - epoch.hits - (taken - epoch.taken)) + unseen

    def sample(self, now: float, received: Mapping[int, int]) -> None:
        """Process how many packets each queue number has received so far."""
        elapsed = now - self._sampled
        self._rates = {number: max(0, count - self._received.get(number, count)) / elapsed for number, count in received.items()}
        self._received = received
        self._sampled = now

    def rate(self, number: int) -> float:
        """Packets a second over the last interval."""
        return self._rates.get(number, 0.0)

    @property
    def summary(self) -> str:
        """A few words for `systemctl status`."""
        return f"{sum(self._received.values())} packets judged, {sum(self._rates.values()):.0f} a second"


def _packed(subject: Subject) -> tuple[int, int]:
    """For JSON; a port has no end."""
    return (subject.start, subject.stop) if isinstance(subject, range) else (subject.port, -1 if subject.led else -2)


def _unpacked(first: object, end: object) -> Subject:
    start, stop = int(str(first)), int(str(end))
    return ProxyPort(start, led=stop == -1) if stop < 0 else range(start, stop)


def subject_of(rule: Rule) -> Subject | None:
    """What a rule's packets count for; None for a rule that takes none."""
    if numbers := rule.queues:
        return numbers
    if rule.target.name in ("REDIRECT", "TPROXY"):
        # --to-ports and --on-port come first.
        return ProxyPort(int(rule.target.options[0].value), led=True)
    if not rule.target.name and EXPECTED in rule.tag:
        return ProxyPort(int(rule.tag.rpartition(EXPECTED)[2]), led=False)
    return None


def _taken(readings: Iterable[QueueReading]) -> int | None:
    """Packets that entered the queue or were dropped by it; None where that cannot be read."""
    total = 0
    for reading in readings:
        if reading.sequence is None or reading.kernel_dropped is None or reading.user_dropped is None:
            return None
        total += reading.sequence + reading.kernel_dropped
    return total
