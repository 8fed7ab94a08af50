"""`chaos`: breaks traffic on purpose, by given odds: drops, delays, corrupts and duplicates packets."""

from __future__ import annotations

import heapq
import random
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow
from nfq_agent.packet import Packet
from nfq_agent.steps import AHEAD, Step
from nfq_agent.steps import Odds as Dice
from nfq_agent.values import Duration
from nfq_agent.verdict import DROP, Action, Verdict

# Copies are remembered until the queue returns them, so that a copy is not copied again.
_COPIES: Final = 256
# What happens to a packet, a bit each.
_DROP, _CORRUPT, _DUPLICATE, _DELAY = 1, 2, 4, 8
Odds = Annotated[float, Field(ge=0.0, le=1.0)]


class ChaosOptions(element.Options):
    """drop, duplicate, delay, corrupt: odds from 0 to 1, for each packet and each of them. seed: the same seed, the same choices.

    delay_for, jitter: a delayed packet waits for delay_for, plus or minus at most jitter. waiting: packets that may wait at once;
    further ones are not delayed. checksum: of a corrupted packet; "mend" lets the damage reach the program, with "keep" the
    receiver's kernel drops the packet, as after a transmission error.
    """

    drop: Odds = 0.0
    duplicate: Odds = 0.0
    delay: Odds = 0.0
    corrupt: Odds = 0.0
    delay_for: Duration = 0.1
    jitter: Duration = 0.0
    waiting: Annotated[int, Field(ge=1, le=100_000)] = 1000
    checksum: Literal["keep", "mend"] = "keep"
    seed: int | None = None

    @model_validator(mode="after")
    def _times(self) -> Self:
        if self.delay_for + self.jitter > 4.0:
            raise ValueError("delay_for and jitter come to more than 4 s; allowed: up to 4s together")
        if self.jitter > self.delay_for:
            raise ValueError("jitter is longer than delay_for; allowed: up to delay_for")
        return self


class Chaos(PacketElement[ChaosOptions]):
    """Decides at random for each packet that the other elements accept, in this order: drop, corrupt, duplicate, delay.

    A copy is sent at once, from a raw socket: on the way out it is not queued, since it is the agent's own; on the way in
    it arrives on loopback, which rp_filter may refuse.
    """

    facts_read = ()

    def __init__(self, name: str, options: ChaosOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.needs = self.needs_of(options)
        self._random = random.Random(options.seed)
        odds = (_DROP, options.drop), (_CORRUPT, options.corrupt), (_DUPLICATE, options.duplicate), (_DELAY, options.delay)
        self._odds = [each for each in odds if each[1]]
        self._dice = Dice(self._throw)
        self._waiting: list[float] = []
        self._copies: dict[bytes, bool] = {}

    @classmethod
    def needs_of(cls, options: ChaosOptions) -> Needs:
        """The whole packet to change or copy it; no data to drop or delay it."""
        return Needs.PAYLOAD if options.corrupt or options.duplicate else Needs.METADATA

    @classmethod
    def rewrites_of(cls, options: ChaosOptions) -> bool:
        """True where it corrupts, or duplicates: a copy of a packet that is not cut yet exceeds the MTU."""
        return bool(options.corrupt or options.duplicate)

    @classmethod
    def injects_of(cls, options: ChaosOptions) -> bool:
        """True where it duplicates."""
        return options.duplicate > 0

    def amend(self, packet: Packet, flow: Flow | None, verdict: Verdict, lasting: bool) -> Verdict:
        """Change, drop or delay a packet that the other elements accept unchanged."""
        if verdict.action is not Action.ACCEPT or not verdict.plain:
            return verdict
        happens = self._dice.take()
        if happens & _DROP:
            return DROP
        change: dict[str, Any] = {}
        if happens & _CORRUPT and (damaged := self._damaged(packet)) is not None:
            change["payload"] = damaged
            change["exact"] = self.options.checksum == "keep"
        if happens & _DUPLICATE and packet.payload and not packet.truncated and not self._is_copy(packet):
            change["inject"] = (packet.payload,)
        if happens & _DELAY and (seconds := self._wait(packet.time)) > 0:
            change["delay"] = seconds
        return Verdict(Action.ACCEPT, **change) if change else verdict

    def compiled(self) -> Step:
        """The dice. A packet that is only dropped, or left as it is, need not be shown."""
        return self._dice

    def _throw(self) -> tuple[int, int]:
        """To how many of the next packets nothing happens, and what to the one behind them. Its damage is thrown later."""
        chance = self._random.random
        for quiet in range(AHEAD):
            happens = 0
            for what, share in self._odds:
                if chance() < share:
                    happens |= what
                    if what == _DROP:
                        break
            if happens:
                return quiet, happens
        return AHEAD - 1, 0

    def _is_copy(self, packet: Packet) -> bool:
        """Whether the packet is a copy that was sent here; otherwise it gets one."""
        # The kernel fills in identification and checksum of an IPv4 header (raw(7)).
        fingerprint = packet.payload[12:] if packet.payload[0] >> 4 == 4 else packet.payload[8:]
        if self._copies.pop(fingerprint, False):
            return True
        if len(self._copies) >= _COPIES:
            del self._copies[next(iter(self._copies))]
        self._copies[fingerprint] = True
        return False

    def _damaged(self, packet: Packet) -> bytes | None:
        """The packet with one bit of its data flipped; None if it carries none, or was not copied whole."""
        data = packet.headers.data
        end = packet.headers.length or len(packet.payload)
        if data is None or data >= end or packet.truncated:
            return None
        payload = bytearray(packet.payload)
        payload[self._random.randrange(data, end)] ^= 1 << self._random.randrange(8)
        return bytes(payload)

    def _wait(self, now: float) -> float:
        """The delay of a packet; 0 if too many wait already."""
        waiting = self._waiting
        while waiting and waiting[0] <= now:
            heapq.heappop(waiting)
        if len(waiting) >= self.options.waiting:
            return 0.0
        seconds = max(0.0, float(self.options.delay_for + self._random.uniform(-1, 1) * self.options.jitter))
        heapq.heappush(waiting, now + seconds)
        return seconds
