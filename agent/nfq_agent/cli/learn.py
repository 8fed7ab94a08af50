"""`learn FILE`: proposes a policy that accepts what a capture shows, and checks it on the same capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nfq_agent.capture.recording import Recorded, RecordingError, packets
from nfq_agent.cli import proposal, show
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.judging import Fate, Judged, Judging, sighting
from nfq_agent.cli.learned import Learned, Wish, by_queue, wishes
from nfq_agent.config.file import load
from nfq_agent.config.models import Config
from nfq_agent.facts import ends
from nfq_agent.packet import FiveTuple, PacketError, address


@dataclass(slots=True)
class _Seen:
    """A flow of the capture."""

    wishes: dict[Wish, float] = field(default_factory=dict)
    last: float = 0.0


def learn(flags: Flags, capture: Path, output: Path | None, grouped: Callable[[str], str] | None = None) -> int:
    """Write the proposal, and say what it covers. grouped: the domain that a name is grouped under."""
    config = load(flags.config)
    watch = {"elements": ["dpi"], "default": "accept", "mode": "monitor"}
    watching = Judging(proposal.adjusted(flags, dict.fromkeys(config.queue, watch)), False)
    seen: dict[tuple[FiveTuple, str], _Seen] = {}
    try:
        for recorded, judged in _judged(watching, capture):
            _note(seen, judged, recorded.time)
    except (OSError, RecordingError) as error:
        show.error(f"nfq-agent: {capture}: {error.strerror if isinstance(error, OSError) else error}")
        return 1
    learned = by_queue(config.queue, grouped)
    for (origin, queue), flow in seen.items():
        learned[queue].add(flow.wishes, flow.last, address(origin.src))
    if not proposal.rules_in(learned):
        show.error(f"nfq-agent: {capture}: no rule of the configuration takes a packet of it; nothing is proposed")
        return 1
    if not proposal.write(config, learned, output):
        return 1
    _prove(flags, config, capture, learned)
    return 0


def _note(seen: dict[tuple[FiveTuple, str], _Seen], judged: Judged, now: float) -> None:
    """Note one packet."""
    if judged.queue is None:
        return
    origin = judged.five_tuple if judged.flow is None else judged.flow.origin
    flow = seen.setdefault((origin, judged.queue), _Seen())
    flow.last = now
    for wish in wishes(ends(origin), {} if judged.flow is None else judged.flow.facts):
        flow.wishes.setdefault(wish, now)


def _judged(judging: Judging, capture: Path) -> Iterator[tuple[Recorded, Judged]]:
    with capture.open("rb") as stream:
        for recorded in packets(stream):
            if recorded.payload is None:
                continue
            try:
                yield recorded, judging.judge(recorded, sighting(recorded.comment))
            except PacketError:
                continue


def _prove(flags: Flags, config: Config, capture: Path, learned: Mapping[str, Learned]) -> None:
    """Replay the capture by the proposal, and say which flows it does not cover."""
    fates: dict[FiveTuple, Fate] = {}
    for _, judged in _judged(Judging(proposal.proposed(flags, config, learned), True), capture):
        if judged.queue is not None:
            origin = judged.five_tuple if judged.flow is None else judged.flow.origin
            fates[origin] = max(fates.get(origin, Fate.PASSED), judged.outcome)
    dropped = [origin for origin, fate in fates.items() if fate is not Fate.PASSED]
    proposal.say_coverage(learned, len(fates) - len(dropped), len(fates), "of the capture", map(str, dropped))
