"""`learn FILE`: proposes a policy that accepts what a capture shows, and checks it on the same capture."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from nfq_agent.capture.recording import RecordingError, packets
from nfq_agent.cli import proposal, show
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.judging import Judged, Judging
from nfq_agent.cli.learned import Learned, Wish, by_queue, wishes
from nfq_agent.cli.replay import opened
from nfq_agent.cli.sighting import Fate, Sighting, sighting
from nfq_agent.config.file import load
from nfq_agent.config.models import Config
from nfq_agent.facts import ends
from nfq_agent.packet import FiveTuple, PacketError, address


@dataclass(slots=True)
class _Seen:
    """A flow of the capture. dropped: the agent dropped a packet of it, as the capture says."""

    wishes: dict[Wish, float] = field(default_factory=dict)
    last: float = 0.0
    dropped: bool = False


def learn(flags: Flags, capture: Path, output: Path | None, grouped: Callable[[str], str] | None = None) -> int:
    """Write the proposal, and say what it covers. grouped: the domain that a name is grouped under."""
    config = load(flags.config)
    watch = {"elements": ["dpi"], "default": "accept", "mode": "monitor"}
    watching = Judging(proposal.adjusted(flags, dict.fromkeys(config.queue, watch)), False)
    seen: dict[tuple[FiveTuple, str], _Seen] = {}
    try:
        with _kept(capture) as stream:
            if not _look(watching, stream, capture, seen):
                return 1
            return _propose(flags, config, capture, stream, seen, grouped, output)
    except OSError as error:
        show.error(f"nfq-agent: {capture}: {error.strerror}")
        return 1


@contextmanager
def _kept(capture: Path) -> Iterator[BinaryIO]:
    """The capture as a file that can be read twice: what comes through a pipe is kept in a temporary one. Raises OSError."""
    with opened(capture) as stream:
        if stream.seekable():
            yield stream
            return
        with TemporaryFile() as kept:
            shutil.copyfileobj(stream, kept)
            kept.seek(0)
            yield kept


def _look(watching: Judging, stream: BinaryIO, capture: Path, seen: dict[tuple[FiveTuple, str], _Seen]) -> bool:
    """Note what the capture shows. Where it ends early, what came before counts; False where that is nothing."""
    try:
        for now, where, judged in _judged(watching, stream):
            _note(seen, judged, where, now)
    except RecordingError as error:
        show.error(f"nfq-agent: {capture}: {error}" + ("; what came before it is learned" if seen else ""))
        return bool(seen)
    return True


def _propose(  # what the parts of one verb share
    flags: Flags,
    config: Config,
    capture: Path,
    stream: BinaryIO,
    seen: dict[tuple[FiveTuple, str], _Seen],
    grouped: Callable[[str], str] | None,
    output: Path | None,
) -> int:
    learned = by_queue(config.queue, grouped)
    dropped = {which for which, flow in seen.items() if flow.dropped}
    for (origin, queue), flow in seen.items():
        if not flow.dropped:
            learned[queue].add(flow.wishes, flow.last, address(origin.src))
    if dropped:
        one, many = "flow was dropped by the agent and is not proposed", "flows were dropped by the agent and are not proposed"
        show.error(show.amount(len(dropped), one, many))
    if not proposal.rules_in(learned):
        why = "no rule of the configuration takes a packet of it" if not dropped else "every flow of it was dropped"
        show.error(f"nfq-agent: {capture}: {why}; nothing is proposed")
        return 1
    if not proposal.write(config, learned, output):
        return 1
    stream.seek(0)
    _prove(flags, config, stream, learned, dropped)
    return 0


def _which(judged: Judged) -> tuple[FiveTuple, str] | None:
    """The flow of a packet, and the queue that gets it; None where no queue does."""
    if judged.queue is None:
        return None
    return (judged.five_tuple if judged.flow is None else judged.flow.origin), judged.queue


def _note(seen: dict[tuple[FiveTuple, str], _Seen], judged: Judged, where: Sighting | None, now: float) -> None:
    """Note one packet."""
    if (which := _which(judged)) is None:
        return
    flow = seen.setdefault(which, _Seen())
    flow.last = now
    flow.dropped = flow.dropped or (where is not None and where.outcome is Fate.DROPPED)
    for wish in wishes(ends(which[0]), {} if judged.flow is None else judged.flow.facts):
        flow.wishes.setdefault(wish, now)


def _judged(judging: Judging, stream: BinaryIO) -> Iterator[tuple[float, Sighting | None, Judged]]:
    """Each packet that can be read: its time, where it was seen, and what happens to it."""
    for recorded in packets(stream):
        if recorded.payload is None:
            continue
        where = sighting(recorded)
        try:
            yield recorded.time, where, judging.judge(recorded, where)
        except PacketError:
            continue


def _prove(
    flags: Flags, config: Config, stream: BinaryIO, learned: Mapping[str, Learned], without: Container[tuple[FiveTuple, str]]
) -> None:
    """Replay the capture by the proposal, and say which flows it does not cover. without: flows that do not count."""
    fates: dict[tuple[FiveTuple, str], Fate] = {}
    # Where it ends early was said.
    with suppress(RecordingError):
        for *_, judged in _judged(Judging(proposal.proposed(flags, config, learned), True), stream):
            if (which := _which(judged)) is not None and which not in without:
                fates[which] = max(fates.get(which, Fate.PASSED), judged.outcome)
    dropped = [origin for (origin, _), fate in fates.items() if fate is not Fate.PASSED]
    proposal.say_coverage(learned, len(fates) - len(dropped), len(fates), "of the capture", map(str, dropped))
