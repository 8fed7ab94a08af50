"""`rate-limit`: drops what exceeds a rate, for each source, each destination or all together; leaves the rest to the next
elements."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.rate import RateField
from nfq_agent.steps import AddressLimit, Step
from nfq_agent.verdict import DROP, Verdict


class RateLimitOptions(element.Options):
    """rate: packets on average. burst: packets at once, the rate's number if left out. per: what has a bucket of its own.

    prefix, prefix6: bits of an address that distinguish one source or destination from another. memory: how many are remembered.
    """

    rate: RateField
    burst: Annotated[int, Field(ge=1)] | None = None
    per: Literal["source", "destination", "all"] = "source"
    prefix: Annotated[int, Field(ge=0, le=32)] = 32
    prefix6: Annotated[int, Field(ge=0, le=128)] = 128
    memory: Annotated[int, Field(ge=1, le=10_000_000)] = 65536


class RateLimit(PacketElement[RateLimitOptions]):
    """A token bucket for each address. Drops are counted, and logged every ten seconds at most."""

    facts_read = ()

    def __init__(self, name: str, options: RateLimitOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.needs = self.needs_of(options)
        rate = options.rate
        masks = _mask(32, options.prefix), _mask(128, options.prefix6)
        burst = options.burst or rate.count
        self._limit = AddressLimit(rate.per_second, burst, options.memory, options.per, *masks, self._say_suppressed)

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
        address = None
        if self.options.per != "all":
            five_tuple = packet.headers.five_tuple
            address = five_tuple.src if self.options.per == "source" else five_tuple.dst
        return None if self._limit.take(address, packet.time) else DROP

    def compiled(self) -> Step:
        """The limit itself."""
        return self._limit

    def stop(self) -> None:
        """Log the drops that are not logged yet."""
        if count := self._limit.take_held():
            self._say_suppressed(count)

    def _say_suppressed(self, count: int) -> None:
        per = self.options.per
        whose = "" if per == "all" else f" for one {per}"
        self.emit(f"{self.name}: {count} packets dropped: more than {self.options.rate}{whose}", level="warning", dropped=count)


def _mask(bits: int, prefix: int) -> bytes:
    return ((1 << bits) - (1 << (bits - prefix))).to_bytes(bits // 8, "big")
