"""`learn`: proposes a policy that accepts what a capture shows, one rule for each name, and proves it on the same capture."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nfq_agent.capture.recording import Recorded, RecordingError, packets
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.judging import Fate, Judged, Judging, sighting
from nfq_agent.config.file import load
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.elements.policy import Policy
from nfq_agent.packet import FiveTuple, PacketError, address, protocol_name
from nfq_agent.protocols.known import HEADLINES

# Names of clients in a comment, and flows without a rule that are listed.
_SHOWN: Final = 3
_LISTED: Final = 20


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a rule accepts: a name (fact and value) or, without one, an address; on a port."""

    protocol: str
    fact: str
    value: str
    port: int | None

    @property
    def table(self) -> dict[str, Any]:
        """The conditions of the rule."""
        found: dict[str, Any] = {"protocol": self.protocol}
        if self.fact:
            found = {self.fact: _literally(self.value)}
        elif self.value:
            found["dst"] = self.value
        if self.port is not None:
            found["dport"] = self.port
        return found


@dataclass(slots=True)
class _Evidence:
    """Why a rule is proposed. first, last: seconds since the epoch."""

    first: float
    last: float
    flows: int = 0
    clients: set[str] = field(default_factory=set)

    @property
    def comment(self) -> str:
        """For a person."""
        clients = sorted(self.clients)
        more = f" and {len(clients) - _SHOWN} more" if len(clients) > _SHOWN else ""
        day = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each)) for each in (self.first, self.last)]
        return f"# {self.flows} flow{'s' * (self.flows != 1)}, {day[0]} to {day[1]}, from {', '.join(clients[:_SHOWN])}{more}"


class _Learned:
    """What the flows of each queue asked for."""

    def __init__(self) -> None:
        self._flows: dict[tuple[FiveTuple, str], dict[_Wish, float]] = {}
        self._last: dict[tuple[FiveTuple, str], float] = {}

    def add(self, judged: Judged, now: float) -> None:
        """Note one packet."""
        if judged.queue is None:
            return
        origin = judged.five_tuple if judged.flow is None else judged.flow.origin
        key = origin, judged.queue
        self._last[key] = now
        wishes = self._flows.setdefault(key, {})
        for wish in _wishes(origin, {} if judged.flow is None else judged.flow.facts):
            wishes.setdefault(wish, now)

    def evidence(self, queue: str) -> dict[_Wish, _Evidence]:
        """The rules of a queue, those with the most flows first."""
        found: dict[_Wish, _Evidence] = {}
        for (origin, name), wishes in self._flows.items():
            if name != queue:
                continue
            for wish in _best(wishes):
                last = self._last[origin, name]
                each = found.setdefault(wish, _Evidence(wishes[wish], last))
                each.first, each.last = min(each.first, wishes[wish]), max(each.last, last)
                each.flows += 1
                each.clients.add(address(origin.src))
        return dict(sorted(found.items(), key=lambda item: -item[1].flows))


def _wishes(origin: FiveTuple, facts: Mapping[str, Any]) -> Iterator[_Wish]:
    if facts.get("protocol") == "dns":
        # Which names are asked for says little; who may be asked is the policy.
        yield _Wish("dns", "", address(origin.dst), origin.dport)
        return
    for fact in HEADLINES:
        if value := facts.get(fact):
            for each in value if isinstance(value, tuple) else (value,):
                yield _Wish("", fact, str(each), origin.dport)
            return
    yield _Wish(protocol_name(origin.protocol), "", address(origin.dst), origin.dport)


def _best(wishes: Mapping[_Wish, float]) -> Iterable[_Wish]:
    """The names; the address only where no name came."""
    named = [wish for wish in wishes if wish.fact or wish.protocol == "dns"]
    return named or wishes


def learn(flags: Flags, capture: Path, output: Path | None) -> int:
    """Write the proposal, and say what it covers."""
    config = load(flags.config)
    watch = {"elements": ["dpi"], "default": "accept", "mode": "monitor"}
    watching = Judging(_with(flags, dict.fromkeys(config.queue, watch)), False)
    learned = _Learned()
    try:
        for recorded, judged in _judged(watching, capture):
            learned.add(judged, recorded.time)
    except (OSError, RecordingError) as error:
        print(f"nfq-agent: {capture}: {error.strerror if isinstance(error, OSError) else error}", file=sys.stderr)
        return 1
    found = {name: learned.evidence(name) for name in config.queue}
    text = "\n".join(_proposal(config, name, queue, found[name]) for name, queue in config.queue.items() if found[name])
    if not text:
        print(f"nfq-agent: {capture}: no rule of the configuration takes a packet of it; nothing is proposed", file=sys.stderr)
        return 1
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text)
        except OSError as error:
            print(f"nfq-agent: {output}: {error.strerror}", file=sys.stderr)
            return 1
    _prove(flags, capture, {name: wishes for name, wishes in found.items() if wishes})
    return 0


def _judged(judging: Judging, capture: Path) -> Iterator[tuple[Recorded, Judged]]:
    with capture.open("rb") as stream:
        for recorded in packets(stream):
            if recorded.payload is None:
                continue
            try:
                yield recorded, judging.judge(recorded, sighting(recorded.comment))
            except PacketError:
                continue


def _with(flags: Flags, queues: Mapping[str, Mapping[str, Any]], elements: Mapping[str, Any] | None = None) -> Config:
    """The configuration with other keys in tables of its queues, and with more elements."""

    def adjust(merged: dict[str, Any]) -> dict[str, Any]:
        del merged
        return {"queue": queues, "element": dict(elements or {})}

    return load(flags.config, adjust)


def _name(queue: str) -> str:
    return f"learned-{queue}"


def _chain(config: Config, name: str, queue: QueueConfig) -> list[str]:
    """The elements of a queue with the learned policy in place of its policies, behind dpi."""
    specs = config.packet_elements(queue)
    others = [spec.name for spec in specs if not issubclass(spec.cls, Policy) and spec.name != "dpi"]
    return ["dpi", _name(name), *others]


def _proposal(config: Config, name: str, queue: QueueConfig, found: Mapping[_Wish, _Evidence]) -> str:
    """A drop-in for one queue, as TOML."""
    lines = [
        "# Proposed by nfq-agent learn. Read it, put it into conf.d/, watch what it would drop, then set mode to enforce.",
        f"[queue.{name}]",
        'mode = "monitor"',
        f"elements = {_toml(_chain(config, name, queue))}",
        "",
        f"[element.{_name(name)}]",
        'type = "policy"',
        'default = "drop"',
        'undecided = "accept"',
    ]
    for wish, evidence in found.items():
        lines += ["", evidence.comment, f"[[element.{_name(name)}.rule]]", 'action = "accept"']
        lines += [f"{key} = {_toml(value)}" for key, value in wish.table.items()]
    return "\n".join(lines) + "\n"


def _prove(flags: Flags, capture: Path, found: Mapping[str, Mapping[_Wish, _Evidence]]) -> None:
    """Replay the capture by the proposal, and say which flows it does not cover."""
    base = load(flags.config)
    elements = {
        _name(name): {
            "type": "policy", "default": "drop", "undecided": "accept",
            "rule": [{"action": "accept", **wish.table} for wish in wishes],
        }
        for name, wishes in found.items()
    }  # fmt: skip
    queues = {name: {"mode": "enforce", "elements": _chain(base, name, base.queue[name])} for name in found}
    proposed = _with(flags, queues, elements)
    fates: dict[FiveTuple, Fate] = {}
    for _, judged in _judged(Judging(proposed, True), capture):
        if judged.queue is not None:
            origin = judged.five_tuple if judged.flow is None else judged.flow.origin
            fates[origin] = max(fates.get(origin, Fate.PASSED), judged.outcome)
    dropped = [origin for origin, fate in fates.items() if fate is not Fate.PASSED]
    rules = sum(map(len, found.values()))
    print(f"{rules} rules; they accept {len(fates) - len(dropped)} of {len(fates)} flows of the capture", file=sys.stderr)
    for origin in dropped[:_LISTED]:
        print(f"  not covered: {origin}", file=sys.stderr)
    if len(dropped) > _LISTED:
        print(f"  and {len(dropped) - _LISTED} more", file=sys.stderr)


def _literally(value: str) -> str:
    """A name as a pattern that matches nothing else: what has a meaning in patterns is put into brackets."""
    return re.sub(r"[*?\[]", lambda match: f"[{match[0]}]", value)


def _toml(value: object) -> str:
    """A string, a number or a list of strings as TOML has them: JSON's escapes are TOML's, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
