"""Judges recorded packets as the workers of a configuration would, by the clock of the packets. No kernel, no agent."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import nfq_agent.names
from nfq_agent import flow_memory
from nfq_agent.capture.recording import Recorded
from nfq_agent.checksum import is_partial
from nfq_agent.cli.given_owner import GivenOwner
from nfq_agent.cli.question import Question, has_ports
from nfq_agent.cli.sighting import HOOKS, Fate, Sighting
from nfq_agent.cli.taking import in_order, misses
from nfq_agent.cli.untold import untold
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.name_needs import name_needs
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements.policy import Policy
from nfq_agent.facts import headline
from nfq_agent.flow import Flow
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.names import NameTable
from nfq_agent.owner import Owners
from nfq_agent.packet import OUTWARD, PROTOCOL_NAMES, TCP, UDP, FiveTuple, Hook, Packet, address
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.values import Endpoint
from nfq_agent.verdict import ACCEPT, DROP, WOULD_DROP, Action, Verdict

# Elements whose answer is random by design.
_BY_CHANCE: Final = frozenset({"Chaos", "Sample"})
_TCP_OR_UDP: Final = (TCP, UDP)
_SYN: Final = 0x02
_FIN_SYN_RST_ACK: Final = 0x17
# Connections that are shown to the elements at once.
_SHOWN_AT_ONCE: Final = 4096
_DAY: Final = 86400.0
# What rules ask of a packet, and a capture may not say.
_NOT_RECORDED: Final = ("owner", "uid", "gid", "cgroup", "set", "interface")
# Where a packet may have been seen of which nothing is said.
_ANYWHERE: Final = tuple((hook, "", "") for hook in HOOKS)
# Judges a packet by its bytes, its length and its time.
Quick = Callable[[bytes, int, float], Fate | None]


class _Chain:
    """The elements of one queue, with what its worker would lend them. names: what DNS answers of the capture gave.

    every: each packet is shown to the elements, also those that a worker would not show. name_of: the interface of an index.
    """

    def __init__(  # all that a worker is lent
        self,
        config: Config,
        queue: QueueConfig,
        enforce: bool,
        names: NameTable | None,
        every: bool,
        name_of: Callable[[int], str],
        owners: Owners,
    ) -> None:
        self.left_out: list[str] = []
        elements: list[PacketElement] = []
        specs = config.packet_elements(queue)
        flows = None
        if any(spec.cls.keeps_flows_of(spec.options) for spec in specs):
            flows = FlowMemory(memoryview(bytearray(flow_memory.SIZE)), os.urandom(16))
        context = Context(midstream=queue.midstream, flows=flows, names=names, owners=owners)
        for spec in specs:
            if spec.cls.decide is PacketElement.decide or spec.cls.__name__ in _BY_CHANCE:
                self.left_out.append(spec.name)
            else:
                elements.append(element := spec.cls(spec.name, spec.options, _nothing))
                if isinstance(element, Policy):
                    element.name_interfaces(name_of)
        monitor = queue.mode == "monitor" and not enforce
        default, on_error = (ACCEPT if word == "accept" else DROP for word in (queue.default, queue.on_error))
        chain = ElementChain(elements, default, monitor=monitor, context=context)
        chain.start()
        settings = WorkerSettings(number=queue.numbers[0], default=default, on_error=on_error, monitor=monitor)
        self._judge = judge = PacketJudge(chain, settings, Counters(), _nothing, _any_verdict)
        # As in the worker: which verdicts are known without the elements.
        self._remembers = chain.pure and not every
        self._flows = judge.flows
        answering = None if every else judge.settle_flows()
        self._table = self._flows if answering is self._flows else None

    def judge(self, packet: Packet, now: float) -> Fate:
        """What happens to a packet. now: seconds of the worker's clock."""
        if self._table is not None:
            known = self._table.look_up(packet.payload, packet.length, now, packet.checksum_ready, joined=packet.gso)
            if known is not None:
                return _fate(known)
        self._judge.now = now
        verdict = self._judge.verdict(packet)
        self._judge.judged(packet, verdict)
        self._judge.log_pending()
        return _fate(verdict)

    def flow(self, five_tuple: FiveTuple) -> Flow | None:
        """The flow of packets with this five-tuple, where the chain keeps one."""
        return None if self._flows is None else self._flows.find(five_tuple)

    def quick(self, fate: Fate) -> Quick | None:
        """Judges further packets of a five-tuple without the elements, where a worker would do so. fate: of the first packet."""
        if self._remembers:
            return lambda _payload, _length, _time: fate
        if self._table is None:
            return None
        look_up = self._table.look_up

        def look(payload: bytes, length: int, time: float) -> Fate | None:
            verdict = look_up(payload, length, time)
            if verdict is ACCEPT:
                return Fate.PASSED
            return None if verdict is None else _fate(verdict)

        return look

    def show_openings(self) -> list[Flow]:
        """Flows of connections whose elements were not asked, since their openings alone told the verdict."""
        return [] if self._table is None else self._judge.openings(_SHOWN_AT_ONCE)


def _fate(verdict: Verdict) -> Fate:
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


class _Taken(NamedTuple):
    """The queue that gets a packet, and under which hook and at which interfaces its rule takes it."""

    queue: str
    hook: Hook
    inward: str
    outward: str


class InterfaceIndices:
    """Indices for the interfaces that a capture names: packets have indices, and this host has other interfaces."""

    def __init__(self) -> None:
        self._names = [""]
        self._indices = {"": 0}

    def index(self, name: str) -> int:
        """The index of a name; 0 for none."""
        if name not in self._indices:
            self._indices[name] = len(self._names)
            self._names.append(name)
        return self._indices[name]

    def name(self, index: int) -> str:
        """The name of an index."""
        return self._names[index]


class Judging:
    """The chains of a configuration. enforce: take queues in monitor mode as if they enforced.

    every: show the elements each packet, as for what they find out in it; else those alone that a worker shows them.
    """

    def __init__(self, config: Config, enforce: bool, every: bool = True) -> None:
        self._config = config
        names = _names(config)
        self._interfaces = InterfaceIndices()
        # Of the packet that is judged, as the capture says it.
        self._owner = GivenOwner({})
        self._chains = {
            name: _Chain(config, queue, enforce, names, every, self._interfaces.name, self._owner)
            for name, queue in config.queue.items()
        }
        # By what the rules look at.
        self._taken: dict[object, _Taken | None] = {}
        self._rules = [name for name in in_order(config) if config.rules[name].queue is not None]
        rules = config.rules.values()
        # Such a rule takes the first packet of a connection alone.
        self._by_syn = any(rule.tcp_syn for rule in rules)
        self._by_address = any(rule.src or rule.dst or rule.not_src or rule.not_dst for rule in rules)
        self._named_ports = [
            each
            for rule in rules
            for ports in (rule.tcp_ports, rule.udp_ports, rule.not_tcp_ports, rule.not_udp_ports)
            for each in ports or ()
        ]
        self._ports: dict[int | None, int | None] = {}
        self._number = 0
        # What is taken from the time of a packet for the time of the worker's clock.
        self._begin: float | None = None
        # By the bytes of the five-tuple and the comment.
        self._quick: dict[object, Quick] = {}

    @property
    def left_out(self) -> list[str]:
        """Elements that are not asked, since they judge nothing or by chance."""
        return sorted({name for chain in self._chains.values() for name in chain.left_out})

    def untold(self, told: Container[str]) -> list[str]:
        """The conditions of policies that ask for what the capture does not tell. told: conditions that it tells about."""
        return list(untold(self._config, told))

    def out_of_reach(self, told: Container[str]) -> list[str]:
        """Rules that take no packet of a capture, since it does not say what they ask for. told: as of `untold`."""
        unknown = [key for key in _NOT_RECORDED if key not in told]
        asked = ((name, [key for key in unknown if getattr(self._config.rules[name], key) is not None]) for name in self._rules)
        return [f"rules.{name} ({', '.join(keys)})" for name, keys in asked if keys]

    def again(self, recorded: Recorded, key: object) -> Fate | None:
        """What happens to a further packet of a five-tuple (`key_of`), where no element needs to be asked; else None."""
        quick = self._quick.get(key)
        return None if quick is None else quick(recorded.payload, recorded.length, self._now(recorded.time))  # type: ignore[arg-type]  # one with a key has a payload

    def _now(self, time: float) -> float:
        """The time of a packet by a clock as the worker's, which has run for a day when the capture begins.

        The table of flows keeps times in 32 bits: seconds since the epoch do not fit.
        """
        if self._begin is None:
            self._begin = time - _DAY
        return max(0.0, time - self._begin)

    def shown_late(self) -> Iterator[Flow]:
        """Flows of connections that no element was asked about until now; `Flow.opening` has what they said."""
        for chain in self._chains.values():
            while found := chain.show_openings():
                yield from found

    def judge(self, recorded: Recorded, where: Sighting | None, key: object = None) -> Judged:
        """What happens to a packet that was recorded. key: of its further packets (`key_of`).

        Raises PacketError where its headers cannot be read.
        """
        assert recorded.payload is not None
        self._number += 1
        packet = Packet(recorded.payload, id=self._number, length=recorded.length, time=recorded.time or 1.0)
        if where is not None:
            packet.uid, packet.gid, packet.mark = where.uid, where.gid, where.mark
        self._owner.given = {} if where is None else dict(where.owner)
        packet.checksum_ready = not is_partial(packet)
        five_tuple = packet.headers.five_tuple
        begins = self._by_syn and _begins(packet)
        place = self._looked_at(five_tuple), where, begins
        if place not in self._taken:
            if len(self._taken) > 1 << 18:
                self._taken.clear()
            self._taken[place] = self._take(five_tuple, where, begins)
        taken = self._taken[place]
        if self._by_syn:
            # Which rule takes a further packet does not follow from its five-tuple.
            key = None
        if taken is None:
            if key is not None:
                self._quick[key] = _passes
            return Judged(five_tuple, Fate.PASSED, None)
        queue, packet.hook, inward, outward = taken
        packet.indev, packet.outdev = self._interfaces.index(inward), self._interfaces.index(outward)
        chain = self._chains[queue]
        outcome = chain.judge(packet, self._now(recorded.time))
        if key is not None and key not in self._quick and (quick := chain.quick(outcome)) is not None:
            self._quick[key] = quick
        return Judged(five_tuple, outcome, queue, chain.flow(five_tuple))

    def _looked_at(self, five_tuple: FiveTuple) -> object:
        """A key that is the same for two five-tuples that the same rules take."""
        addresses = (five_tuple.src, five_tuple.dst) if self._by_address else len(five_tuple.src)
        return five_tuple.protocol, addresses, self._port(five_tuple.sport), self._port(five_tuple.dport)

    def _port(self, port: int | None) -> int | None:
        """The same number for all ports that no rule names."""
        if port not in self._ports:
            self._ports[port] = port if port is None or any(port in each for each in self._named_ports) else -1
        return self._ports[port]

    def _take(self, five_tuple: FiveTuple, where: Sighting | None, begins: bool) -> _Taken | None:
        """begins: whether it is the first packet of a TCP connection."""
        for hook, inward, outward in _ANYWHERE if where is None else where.places:
            asked = question(five_tuple, hook, inward, outward, where)
            for name in self._rules:
                rule = self._config.rules[name]
                if rule.tcp_syn and five_tuple.protocol == TCP and not begins:
                    continue
                if not any(True for _ in misses(self._config, name, asked)):
                    return _Taken(rule.queue or "", hook, inward, outward)
        return None


def _begins(packet: Packet) -> bool:
    """Whether it is the first packet of a TCP connection, as the match `--syn` of iptables-extensions(8) says."""
    flags = packet.headers.tcp_flags
    return flags is not None and flags & _FIN_SYN_RST_ACK == _SYN


def _names(config: Config) -> NameTable | None:
    """An empty table of names; None where no rule asks for one."""
    needs = name_needs(config)
    return None if needs is None else NameTable(memoryview(bytearray(nfq_agent.names.SIZE)), os.urandom(16), 1, *needs)


def question(five_tuple: FiveTuple, hook: Hook, inward: str, outward: str, where: Sighting | None = None) -> Question:
    """A recorded packet as `explain` asks about it. inward, outward: by which interfaces it comes in and goes out. where: what is
    said of its owner, and its mark."""
    protocol = PROTOCOL_NAMES.get(five_tuple.protocol) or str(five_tuple.protocol)
    ends = [
        str(Endpoint(address(packed), port or 0)) if has_ports(protocol) else address(packed)
        for packed, port in ((five_tuple.src, five_tuple.sport), (five_tuple.dst, five_tuple.dport))
    ]
    interface = outward if hook in OUTWARD else inward
    found = Question(protocol, ends[0], ends[1], hook=hook.name.lower(), interface=interface, to_interface=outward)
    if where is None:
        return found
    return replace(found, uid=where.uid, gid=where.gid, mark=where.mark, cgroup=dict(where.owner).get("cgroup", ""))


def key_of(recorded: Recorded) -> object:
    """A key that TCP or UDP packets with one five-tuple and place have in common; None for packets that are judged one by one."""
    _, payload, _, comment, interface = recorded
    if payload is None or len(payload) < 24:
        return None
    if payload[0] == 0x45:
        if payload[9] not in _TCP_OR_UDP or payload[6] & 0x3F or payload[7]:
            return None
        ends = payload[9:10] + payload[12:24]
    elif payload[0] >> 4 == 6 and payload[6] in _TCP_OR_UDP and len(payload) >= 44:
        ends = payload[6:7] + payload[8:44]
    else:
        return None
    return (ends, comment, interface) if comment or interface else ends


def _passes(_payload: bytes, _length: int, _time: float) -> Fate:
    return Fate.PASSED


def _nothing(message: str, level: str = "info", **fields: Any) -> None:
    """Takes what elements and the judge log."""
    del message, level, fields


def _any_verdict(packet: Packet, verdict: Verdict) -> None:
    """Nothing is sent: every verdict is possible."""
