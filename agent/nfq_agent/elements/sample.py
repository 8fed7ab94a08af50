"""`sample`: chooses a share of the packets for the later elements that listen, and if wanted for those that judge."""

from __future__ import annotations

import hashlib
import random
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import FiveTuple, Packet, PacketError
from nfq_agent.steps import AHEAD, Die, Step
from nfq_agent.verdict import ACCEPT, DROP, Verdict


class SampleOptions(element.Options):
    """one_in: one packet of this many; or probability: each with these odds. seed: the same seed gives the same choice.

    per_flow: choose whole flows, both directions, by their five-tuple. rest: the verdict on what is not chosen; if left out,
    the next elements judge it, and only those that listen (`log`, `pcap`, `syn-monitor`).
    """

    one_in: Annotated[int, Field(ge=1)] | None = None
    probability: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: int = 0
    per_flow: bool = False
    rest: Literal["accept", "drop"] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.one_in is None) == (self.probability is None):
            raise ValueError("one_in and probability both say how many; allowed: one_in = 100, or probability = 0.01")
        return self


class Sample(PacketElement[SampleOptions]):
    """Chooses packets, or flows, and remembers the choice until the packet's verdict is given."""

    facts_read = ()

    def __init__(self, name: str, options: SampleOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.needs = self.needs_of(options)
        self._share = 1 / options.one_in if options.one_in else options.probability or 0.0
        self._random = random.Random(options.seed)
        self._key = options.seed.to_bytes(16, "big", signed=True)
        throw = self._is_chosen if options.per_flow else self._throw
        self._die = Die(0 if options.per_flow else options.one_in or 0, throw, options.per_flow, options.rest)
        self._rest = None if options.rest is None else {"accept": ACCEPT, "drop": DROP}[options.rest]
        self._chosen: dict[int, bool] = {}

    @classmethod
    def needs_of(cls, options: SampleOptions) -> Needs:
        """Addresses and ports, if flows are chosen by them."""
        return Needs.HEADERS if options.per_flow else Needs.METADATA

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """The verdict on the rest, None for what is chosen."""
        if self._rest is None:
            return None
        chosen = self._chosen[packet.id] = self._choose(packet)
        return None if chosen else self._rest

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> bool:
        """False for what is not chosen. A packet that an earlier element has decided is chosen here."""
        chosen = self._chosen.pop(packet.id, None)
        return self._choose(packet) if chosen is None else chosen

    def compiled(self) -> Step:
        """The compiled form, which makes the same choices."""
        return self._die

    def _choose(self, packet: Packet) -> bool:
        if self.options.per_flow:
            try:
                return self._is_chosen(*packet.headers.five_tuple)
            except PacketError:
                return False
        return self._die.choose()

    def _throw(self) -> tuple[int, bool]:
        """How many of the next packets are not chosen, and whether the one behind them is."""
        chance, share = self._random.random, self._share
        for missed in range(AHEAD):
            if chance() < share:
                return missed, True
        return AHEAD - 1, False

    def _is_chosen(self, protocol: int, src: bytes, sport: int | None, dst: bytes, dport: int | None) -> bool:
        return self._fraction(FiveTuple(protocol, src, sport, dst, dport)) < self._share

    def _fraction(self, five_tuple: FiveTuple) -> float:
        """A number from 0 up to 1 for a flow, the same for both directions."""
        ends = sorted(((five_tuple.src, five_tuple.sport or 0), (five_tuple.dst, five_tuple.dport or 0)))
        text = bytes((five_tuple.protocol,)) + b"".join(address + port.to_bytes(2, "big") for address, port in ends)
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._key).digest(), "big") / 2**64
