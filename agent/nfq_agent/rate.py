"""Rates, as `5/s`, and the token buckets that apply them. Reads no clock: the time comes in with every call."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from nfq_agent.field import BeforeValidator

_RATE: Final = re.compile(r"([1-9]\d*)/(s|m|h)")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
# If the clock is set back by more than this, the bucket continues with the new time instead of waiting for the old one.
_SET_BACK: Final = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` events in `period` seconds. text: as the configuration writes it."""

    count: int
    period: float
    text: str

    @property
    def per_second(self) -> float:
        """Events a second, on average."""
        return self.count / self.period

    def __str__(self) -> str:
        return self.text


def _rate(value: object) -> Rate:
    if isinstance(value, Rate):
        return value
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        return Rate(int(match[1]), _UNITS[match[2]], value)
    raise ValueError(f'{value!r} is not a valid rate; allowed: a whole number from 1 on with /s, /m or /h, as in "5/s"')


RateField = Annotated[Rate, BeforeValidator(_rate)]


class Bucket:
    """A token bucket: `per_second` tokens are added, it holds at most `burst`, and it starts full."""

    __slots__ = ("_burst", "_last", "_per_second", "_tokens")

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._last = now

    def take(self, now: float) -> bool:
        """Take one token; False where there is none. now: seconds, on one clock for all calls."""
        elapsed = now - self._last
        if elapsed > 0.0:
            self._last = now
            self._tokens = min(self._burst, self._tokens + elapsed * self._per_second)
        elif elapsed < -_SET_BACK:
            self._last = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Buckets:
    """A bucket for each key, for at most `limit` keys; the key that was used longest ago is forgotten first.

    A forgotten key starts with a full bucket again: a limit that is too small for a flood lets more pass, never less.
    """

    def __init__(self, per_second: float, burst: float, limit: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._limit = limit
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable, now: float) -> bool:
        """Take one token from the key's bucket; False where there is none."""
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._limit:
                self._buckets.popitem(last=False)
                self.evicted += 1
            bucket = self._buckets[key] = Bucket(self._per_second, self._burst, now)
        else:
            self._buckets.move_to_end(key)
        return bucket.take(now)


class Windows:
    """For each key at most the rate's count in any stretch of its period, for at most `limit` keys, as in Buckets."""

    def __init__(self, rate: Rate, limit: int) -> None:
        self._count = rate.count
        self._period = rate.period
        self._limit = limit
        self._times: OrderedDict[Hashable, list[float]] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._times)

    def take(self, key: Hashable, now: float) -> bool:
        """Count one more for this key; False where that would be too many."""
        times = self._times.get(key)
        if times is None:
            if len(self._times) >= self._limit:
                self._times.popitem(last=False)
                self.evicted += 1
            self._times[key] = [now]
            return True
        self._times.move_to_end(key)
        if times[-1] - now > _SET_BACK:
            times.clear()
        if len(times) < self._count:
            times.append(now)
            return True
        if now - times[0] < self._period:
            return False
        del times[0]
        times.append(now)
        return True


class Suppressed:
    """Counts events that were not emitted. The count is to be emitted every `every` seconds at most."""

    __slots__ = ("_every", "_since", "count")

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._since: float | None = None
        self.count = 0

    def add(self, now: float, count: int = 1) -> None:
        """So many more were not emitted."""
        if self.count == 0:
            self._since = now
        self.count += count

    def due(self, now: float) -> int:
        """The count, if it is time to emit it, and 0 otherwise. Counting then starts at 0."""
        if self.count == 0 or self._since is None or 0.0 <= now - self._since < self._every:
            return 0
        return self.take()

    def take(self) -> int:
        """The count. Counting then starts at 0."""
        count, self.count = self.count, 0
        return count


# Warnings that a peer can cause, a second; and lines that were asked for, as `log` has them.
WARNINGS: Final = 10.0
LINES: Final = 1000.0


class LimitedEmit:
    """Emits events within a rate, by default one a second; the next one has the number of those suppressed in between."""

    def __init__(self, emit: Callable[..., None], per_second: float = 1.0, burst: float = 1.0) -> None:
        self._emit = emit
        self._per_second = per_second
        self._burst = burst
        self._bucket: Bucket | None = None
        self._suppressed = Suppressed()

    def __call__(self, now: float, message: str, **fields: Any) -> bool:
        """Emit it, or suppress it (False). now: seconds, on one clock for all calls."""
        if self._bucket is None:
            self._bucket = Bucket(self._per_second, self._burst, now)
        if not self._bucket.take(now):
            self._suppressed.add(now)
            return False
        if count := self._suppressed.take():
            message = f"{message} ({count} similar lines suppressed)"
            fields["suppressed"] = count
        self._emit(message, **fields)
        return True

    def leave_out(self, now: float, count: int) -> None:
        """Suppress so many more, which are not offered."""
        self._suppressed.add(now, count)

    def finish(self, message: str) -> None:
        """Emit a last line with the number of those suppressed since the one before, if there are any."""
        if count := self._suppressed.take():
            self._emit(f"{message} ({count} similar lines suppressed)", level="warning", suppressed=count)
