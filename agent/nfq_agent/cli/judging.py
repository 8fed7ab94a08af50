"""Judges recorded packets as the workers of a configuration would, by the clock of the packets. No kernel, no agent."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import nfq_agent.names
from nfq_agent import flow_memory
from nfq_agent.capture.recording import Recorded
from nfq_agent.checksum import is_partial
from nfq_agent.cli.explain import Question, misses
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.name_needs import name_needs
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element import Needs, PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.facts import headline
from nfq_agent.flow import Flow
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.names import NameTable
from nfq_agent.packet import FiveTuple, Hook, Packet, address, protocol_name
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.values import Endpoint
from nfq_agent.verdict import ACCEPT, DROP, WOULD_DROP, Action, Verdict

_COMMENT: Final = re.compile(r"(PREROUTING|INPUT|FORWARD|OUTPUT|POSTROUTING) ([a-z]+)(?: in (\S+))?(?: out (\S+))?(?: to \d+)?")
# In which order the hooks of a rule are tried where the capture does not say where a packet was seen.
_HOOKS: Final = (Hook.OUTPUT, Hook.INPUT, Hook.FORWARD, Hook.PREROUTING, Hook.POSTROUTING)
# Elements whose answer is an accident by design.
_BY_CHANCE: Final = frozenset({"Chaos", "Sample"})


class Fate(IntEnum):
    """What happened to a packet or a flow; of a flow the greatest among those of its packets."""

    PASSED = 0
    WOULD_DROP = 1
    DROPPED = 2

    @property
    def word(self) -> str:
        """As people read it."""
        return {0: "accept", 1: "would drop", 2: "drop"}[self]


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where the agent saw a packet, and what it did with it, as the comment of element `pcap` says."""

    hook: Hook
    outcome: Fate
    inward: str = ""
    outward: str = ""


def sighting(comment: str) -> Sighting | None:
    """Read a comment; None where it is not one of the agent's."""
    match = _COMMENT.fullmatch(comment)
    if match is None:
        return None
    dropped = match[2] in ("drop", "reject")
    return Sighting(Hook[match[1]], Fate.DROPPED if dropped else Fate.PASSED, match[3] or "", match[4] or "")


class _Witness(PacketElement):
    """The last of a chain: sees the flow of each packet, for its name."""

    needs = Needs.FLOW

    def __init__(self) -> None:
        super().__init__("replay", self.Options(), _nothing)
        self.flow: Flow | None = None

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Note it."""
        del packet, verdict
        self.flow = flow


class _Chain:
    """The elements of one queue, with what its worker would lend them. names: what DNS answers of the capture gave."""

    def __init__(self, config: Config, queue: QueueConfig, enforce: bool, names: NameTable | None) -> None:
        self.left_out: list[str] = []
        elements: list[PacketElement] = []
        specs = config.packet_elements(queue)
        flows = None
        if any(spec.cls.keeps_flows_of(spec.options) for spec in specs):
            flows = FlowMemory(memoryview(bytearray(flow_memory.SIZE)), os.urandom(16))
        context = Context(midstream=queue.midstream, flows=flows, names=names)
        for spec in specs:
            if spec.cls.decide is PacketElement.decide or spec.cls.__name__ in _BY_CHANCE:
                self.left_out.append(spec.name)
            else:
                elements.append(spec.cls(spec.name, spec.options, _nothing))
        self.witness = _Witness()
        monitor = queue.mode == "monitor" and not enforce
        default, on_error = (ACCEPT if word == "accept" else DROP for word in (queue.default, queue.on_error))
        chain = ElementChain([*elements, self.witness], default, monitor=monitor, context=context)
        chain.start()
        settings = WorkerSettings(number=queue.numbers[0], default=default, on_error=on_error, monitor=monitor)
        self._judge = PacketJudge(chain, settings, Counters(), _nothing, _any_verdict)

    def judge(self, packet: Packet) -> Fate:
        """What happens to a packet."""
        self._judge.now = packet.time
        verdict = self._judge.verdict(packet)
        self._judge.judged(packet, verdict)
        self._judge.log_pending()
        if verdict is WOULD_DROP:
            return Fate.WOULD_DROP
        return Fate.DROPPED if verdict.outcome is Action.DROP else Fate.PASSED


@dataclass(slots=True)
class Judged:
    """One packet's fate. queue: None where no rule takes it; it passes. flow: None where its chain keeps none."""

    five_tuple: FiveTuple
    outcome: Fate
    queue: str | None
    flow: Flow | None = None

    @property
    def name(self) -> str:
        """What the flow asks for, as far as it is known."""
        facts = {} if self.flow is None else self.flow.facts
        return headline(facts)


class Judging:
    """The chains of a configuration. enforce: take queues in monitor mode as if they enforced."""

    def __init__(self, config: Config, enforce: bool) -> None:
        self._config = config
        names = _names(config)
        self._chains = {name: _Chain(config, queue, enforce, names) for name, queue in config.queue.items()}
        # By five-tuple and place: the queue, and the hook under which its rule takes the packet.
        self._taken: dict[tuple[FiveTuple, Sighting | None], tuple[str, Hook] | None] = {}
        self._number = 0

    @property
    def left_out(self) -> list[str]:
        """Elements that are not asked, since they judge nothing or by chance."""
        return sorted({name for chain in self._chains.values() for name in chain.left_out})

    def judge(self, recorded: Recorded, where: Sighting | None) -> Judged:
        """What happens to a packet that was recorded. Raises PacketError where its headers cannot be read."""
        assert recorded.payload is not None
        self._number += 1
        packet = Packet(recorded.payload, id=self._number, length=recorded.length, time=recorded.time or 1.0)
        packet.checksum_ready = not is_partial(packet)
        key = packet.headers.five_tuple, where
        if key not in self._taken:
            if len(self._taken) > 1 << 18:
                self._taken.clear()
            self._taken[key] = self._take(packet.headers.five_tuple, where)
        taken = self._taken[key]
        if taken is None:
            return Judged(key[0], Fate.PASSED, None)
        queue, hook = taken
        packet.hook = hook
        chain = self._chains[queue]
        outcome = chain.judge(packet)
        return Judged(key[0], outcome, queue, chain.witness.flow)

    def _take(self, five_tuple: FiveTuple, where: Sighting | None) -> tuple[str, Hook] | None:
        for hook in _HOOKS if where is None else (where.hook,):
            interface = "" if where is None else (where.inward if hook in (Hook.PREROUTING, Hook.INPUT) else where.outward)
            asked = question(five_tuple, hook, interface)
            for rule in self._config.rules.values():
                if rule.queue is not None and not any(True for _ in misses(rule, asked)):
                    return rule.queue, hook
        return None


def _names(config: Config) -> NameTable | None:
    """An empty table of names; None where no rule asks for one."""
    needs = name_needs(config)
    return None if needs is None else NameTable(memoryview(bytearray(nfq_agent.names.SIZE)), os.urandom(16), 1, *needs)


def question(five_tuple: FiveTuple, hook: Hook, interface: str) -> Question:
    """A recorded packet as `explain` asks about it."""
    protocol = protocol_name(five_tuple.protocol)
    ends = [
        address(packed) if protocol == "icmp" else str(Endpoint(address(packed), port or 0))
        for packed, port in ((five_tuple.src, five_tuple.sport), (five_tuple.dst, five_tuple.dport))
    ]
    return Question(protocol, ends[0], ends[1], "", hook.name.lower(), interface)


def _nothing(message: str, level: str = "info", **fields: Any) -> None:
    """For what elements and the judge have to log."""
    del message, level, fields


def _any_verdict(packet: Packet, verdict: Verdict) -> None:
    """Nothing is sent: every verdict can be given."""
