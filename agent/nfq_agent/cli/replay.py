"""`replay`: judges a capture by a configuration, and shows which flows would be judged differently than before."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from nfq_agent.capture.recording import Recorded, RecordingError, packets
from nfq_agent.cli import show
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.judging import Judging, key_of
from nfq_agent.cli.loading import configuration
from nfq_agent.cli.sighting import Fate, Sighting, sighting
from nfq_agent.config.models import Config
from nfq_agent.facts import headline
from nfq_agent.packet import FiveTuple, PacketError
from nfq_agent.service.packet_judge import EVERY_PACKET
from nfq_agent.unshown import facts_of

# The exit code where something that passed would be dropped.
DROPS_MORE: Final = 4
# Flows that the text lists, and seconds between two lines of progress.
_LISTED: Final = 40
_PROGRESS: Final = 1.0
# Packets of new flows until their names are asked for: fewer than a table of flows holds.
_NAMED_AFTER: Final = 32768


@dataclass(slots=True)
class Replayed:
    """A flow of the capture. before: None where nothing is known of it. midstream: the capture does not hold its beginning."""

    five_tuple: FiveTuple
    first: float
    packets: int = 0
    queues: list[str] = field(default_factory=list)
    name: str = ""
    before: Fate | None = None
    after: Fate = Fate.PASSED
    midstream: bool = False

    @property
    def changed(self) -> bool:
        """Whether it is judged differently than before."""
        return self.before is not None and self.before is not self.after

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first": self.first,
            "flow": str(self.five_tuple),
            "packets": self.packets,
            "queues": self.queues,
            "name": self.name or None,
            "midstream": self.midstream,
            "before": None if self.before is None else self.before.word,
            "after": self.after.word,
        }


class Replay:
    """What one pass over a capture gives. against: the configuration to compare with; without it, the verdicts in the capture."""

    def __init__(self, judging: Judging, against: Judging | None) -> None:
        self._judging = judging
        self._against = against
        self.flows: dict[FiveTuple, Replayed] = {}
        self.packets = 0
        self.unreadable = 0
        self.verdicts = dict.fromkeys(Fate, 0)
        # The conditions about which the capture tells something.
        self._told: set[str] = set()
        # By `key_of`: the flow, and where its packets were seen.
        self._seen: dict[object, tuple[Replayed, Sighting | None]] = {}
        # Packets that were looked at since all flows had their names.
        self._unnamed = 0

    def add(self, recorded: Recorded) -> None:
        """Judge one packet."""
        self.packets += 1
        key = key_of(recorded)
        flow, where = self._seen.get(key) or (None, sighting(recorded))
        outcome = None if flow is None else self._judging.again(recorded, key)
        try:
            if flow is None or outcome is None:
                flow, outcome = self._look(recorded, where, key)
            before = self._before(recorded, where, key)
        except PacketError:
            self.unreadable += 1
            return
        self.verdicts[outcome] += 1
        flow.packets += 1
        if outcome is not flow.after:
            flow.after = max(flow.after, outcome)
        if before is not None and before is not flow.before:
            flow.before = before if flow.before is None else max(flow.before, before)

    def _look(self, recorded: Recorded, where: Sighting | None, key: object) -> tuple[Replayed, Fate]:
        """Judge one packet by its elements."""
        if recorded.payload is None:
            raise PacketError("no IP packet")
        if where is not None:
            self._told |= where.told
        judged = self._judging.judge(recorded, where, key)
        flow = self._flow(judged.five_tuple, recorded.time)
        flow.name = judged.name or flow.name
        flow.midstream = flow.midstream or (judged.flow is not None and judged.flow.midstream)
        if judged.queue is not None and judged.queue not in flow.queues:
            flow.queues.append(judged.queue)
        if key is not None:
            self._seen[key] = flow, where
        self._unnamed += 1
        if self._unnamed == _NAMED_AFTER:
            self.name_all()
        return flow, judged.outcome

    def name_all(self) -> None:
        """Name the flows whose names no element was asked about until now."""
        self._unnamed = 0
        for shown in self._judging.shown_late():
            said = shown.opening
            if (
                said is not None
                and (name := headline(facts_of(said.protocol, said.name)))
                and (flow := self._known_flow(shown.origin)) is not None
            ):
                flow.name = name

    def _before(self, recorded: Recorded, where: Sighting | None, key: object) -> Fate | None:
        if self._against is not None:
            found = self._against.again(recorded, key)
            return self._against.judge(recorded, where, key).outcome if found is None else found
        return None if where is None else where.outcome

    def _known_flow(self, five_tuple: FiveTuple) -> Replayed | None:
        return self.flows.get(five_tuple) or self.flows.get(five_tuple.reversed())

    def _flow(self, five_tuple: FiveTuple, now: float) -> Replayed:
        if (known := self._known_flow(five_tuple)) is not None:
            return known
        made = self.flows[five_tuple] = Replayed(five_tuple, now)
        return made

    @property
    def changed(self) -> list[Replayed]:
        """The flows that are judged differently, in the order of their first packets."""
        return [flow for flow in self.flows.values() if flow.changed]

    @property
    def left_out(self) -> list[str]:
        """The elements that were not asked."""
        return self._judging.left_out

    @property
    def out_of_reach(self) -> list[str]:
        """The rules that took no packet, since the capture does not say what they ask for."""
        return self._judging.out_of_reach(self._told)

    @property
    def untold(self) -> list[str]:
        """The conditions of policies that ask for what the capture does not tell."""
        return self._judging.untold(self._told)

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "packets": self.packets,
            "unreadable": self.unreadable,
            "verdicts": {fate.word: number for fate, number in self.verdicts.items()},
            "left_out": self.left_out,
            "out_of_reach": self.out_of_reach,
            "untold": self.untold,
            "flows": [flow.as_object() for flow in self.flows.values()],
            "changed": [flow.as_object() for flow in self.changed],
            "drops_more": self.drops_more,
        }

    @property
    def code(self) -> int:
        """The exit code."""
        return DROPS_MORE if self.drops_more else 0

    @property
    def drops_more(self) -> bool:
        """Whether a flow that passed would be dropped, or would be if the queue enforced."""
        return any(flow.before is not None and flow.after > flow.before for flow in self.flows.values())


def replay(flags: Flags, capture: Path, against: Path | None, enforce: bool, as_json: bool) -> int:
    """Judge a capture; print what changes. Exit code 4 where something that passed would be dropped."""
    before = None if against is None else configuration(Flags(against, flags.instance))
    found = replayed(flags, capture, before, enforce)
    if found is None:
        return 1
    if as_json:
        show.json_object(found.as_object())
    else:
        tell(found, "" if against is None else f"by {against}", "--against FILE names a configuration")
    return found.code


def replayed(flags: Flags, capture: Path, against: Config | None, enforce: bool) -> Replay | None:
    """A capture that was judged; None where it cannot be read, which is printed."""
    every = bool(os.environ.get(EVERY_PACKET))
    judging = Judging(configuration(flags), enforce, every)
    before = None if against is None else Judging(against, False, every)
    done = Replay(judging, before)
    try:
        with opened(capture) as stream:
            for recorded in _with_progress(packets(stream), stream):
                done.add(recorded)
    except OSError as error:
        show.error(f"nfq-agent: {capture}: {error.strerror}")
        return None
    except RecordingError as error:
        earlier = show.amount(done.packets, "packet before it was judged", "packets before it were judged")
        judged = f"; the {earlier}" if done.packets else ""
        show.error(f"nfq-agent: {capture}: {error}{judged}")
        if not done.packets:
            return None
    if not done.packets:
        show.error(f"nfq-agent: {capture}: it has no packets; nothing was judged")
        return None
    if done.unreadable == done.packets:
        show.error(f"nfq-agent: {capture}: none of its {done.packets} packets could be read as IP; nothing was judged")
        return None
    done.name_all()
    return done


@contextmanager
def opened(capture: Path) -> Iterator[BinaryIO]:
    """The file of a capture; for `-`, standard input. Raises OSError."""
    if str(capture) == "-":
        yield sys.stdin.buffer
        return
    with capture.open("rb") as stream:
        yield stream


def _with_progress(source: Iterator[Recorded], stream: BinaryIO) -> Iterator[Recorded]:
    """The same, with a line of progress for a person who waits."""
    if not sys.stderr.isatty():
        yield from source
        return
    # What a pipe will bring is not known.
    size = os.fstat(stream.fileno()).st_size if stream.seekable() else 0
    told = time.monotonic()
    try:
        for number, each in enumerate(source, 1):
            yield each
            if number % 256 == 0 and time.monotonic() - told > _PROGRESS:
                told = time.monotonic()
                part = f", {100 * stream.tell() // size} %" if size else ""
                print(f"\r{number} packets{part}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def tell(done: Replay, against: str, remedy: str) -> None:
    """Print what a replay found. against: what it was compared with, `by FILE`; empty for the verdicts in the capture. remedy:
    what there is to do where there is nothing to compare with."""
    flows = list(done.flows.values())
    taken = [flow for flow in flows if flow.queues]
    passing = show.amount(len(flows) - len(taken), "flow is taken by no rule and passes", "flows are taken by no rule and pass")
    show.wrapped(f"{show.amount(done.packets, 'packet', 'packets')}, {_flows(len(flows))}; {passing}")
    if done.unreadable:
        show.wrapped(
            show.amount(
                done.unreadable, "packet was not read as IP and is left out", "packets were not read as IP and are left out"
            )
        )
    if done.left_out:
        show.wrapped(f"not asked: {', '.join(done.left_out)} (they judge nothing, or by chance)")
    if done.out_of_reach:
        show.wrapped(f"took no packet, since a capture does not say what they ask for: {', '.join(done.out_of_reach)}")
    if done.untold:
        show.wrapped(f"hold for no packet, since a capture does not say it: {', '.join(done.untold)}")
    if late := sum(flow.midstream for flow in taken):
        whose, how = ("its", "it is") if late == 1 else ("their", "they are")
        show.wrapped(f"{_flows(late)} began before the capture; `midstream` of {whose} queue says how {how} judged")
    for outcome in Fate:
        if number := sum(flow.after is outcome for flow in taken):
            show.wrapped(f"{outcome.word}: {_flows(number)}")
    known = [flow for flow in flows if flow.before is not None]
    if not known:
        show.wrapped(f"Nothing to compare with: the capture has no verdicts of an agent; {remedy}")
        _list("Dropped", [flow for flow in flows if flow.after is not Fate.PASSED])
        return
    show.wrapped(f"compared with the verdicts {against or 'in the capture'}: {_flows(len(known))}, {len(done.changed)} changed")
    _list("Changed", done.changed)


def _flows(count: int) -> str:
    return show.amount(count, "flow", "flows")


def _list(title: str, flows: list[Replayed]) -> None:
    if not flows:
        return
    show.wrapped(f"{title}:")
    for flow in flows[:_LISTED]:
        stamp = time.strftime("%H:%M:%S", time.localtime(flow.first))
        turned = flow.after.word if flow.before is None else f"{flow.before.word} -> {flow.after.word}"
        show.wrapped(f"  {stamp} {turned}: {flow.five_tuple}" + (f" {flow.name}" if flow.name else ""), 6)
    if len(flows) > _LISTED:
        show.wrapped(f"  and {len(flows) - _LISTED} more; --json has all")
