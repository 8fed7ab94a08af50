"""`rate-limit`: drops what exceeds a rate, for each source, each destination or all together; leaves the rest to the next
elements."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.rate import Buckets, RateField, Suppressed
from nfq_agent.verdict import DROP, Verdict

_ALL: Final = b""


class RateLimitOptions(element.Options):
    """rate: packets on average. burst: packets at once, the rate's number if left out. per: what has a bucket of its own.

    prefix, prefix6: bits of an address that tell one source or destination from another. memory: how many are remembered.
    """

    rate: RateField
    burst: Annotated[int, Field(ge=1)] | None = None
    per: Literal["source", "destination", "all"] = "source"
    prefix: Annotated[int, Field(ge=0, le=32)] = 32
    prefix6: Annotated[int, Field(ge=0, le=128)] = 128
    memory: Annotated[int, Field(ge=1, le=10_000_000)] = 65536


class RateLimit(PacketElement[RateLimitOptions]):
    """A token bucket for each key. Drops are counted, and logged every ten seconds at most."""

    def __init__(self, name: str, options: RateLimitOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.needs = self.needs_of(options)
        rate = options.rate
        self._buckets = Buckets(rate.per_second, options.burst or rate.count, options.memory)
        self._per = options.per
        self._masks = {4: _mask(32, options.prefix), 16: _mask(128, options.prefix6)}
        self._suppressed = Suppressed()

    @classmethod
    def logs_drops_of(cls, options: RateLimitOptions) -> Literal["all", "own", "none"]:  # noqa: ARG003  # with any
        """Its own, by their number."""
        return "own"

    @classmethod
    def needs_of(cls, options: RateLimitOptions) -> Needs:
        """Addresses, unless there is one bucket for all."""
        return Needs.METADATA if options.per == "all" else Needs.HEADERS

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """DROP where the bucket is empty."""
        key = self._key(packet) if self._per != "all" else _ALL
        if self._buckets.take(key, packet.time):
            if count := self._suppressed.due(packet.time):
                self._say_suppressed(count)
            return None
        self._suppressed.add(packet.time)
        if count := self._suppressed.due(packet.time):
            self._say_suppressed(count)
        return DROP

    def stop(self) -> None:
        """Log the drops that are not logged yet."""
        if count := self._suppressed.take():
            self._say_suppressed(count)

    def _key(self, packet: Packet) -> bytes:
        five_tuple = packet.headers.five_tuple
        address = five_tuple.src if self._per == "source" else five_tuple.dst
        mask = self._masks[len(address)]
        return address if mask is None else (int.from_bytes(address, "big") & mask).to_bytes(len(address), "big")

    def _say_suppressed(self, count: int) -> None:
        whose = "" if self._per == "all" else f" for one {self._per}"
        self.emit(f"{self.name}: {count} packets dropped: more than {self.options.rate}{whose}", level="warning", dropped=count)


def _mask(bits: int, prefix: int) -> int | None:
    """The netmask; None for all bits."""
    return None if prefix == bits else (1 << bits) - (1 << (bits - prefix))
