"""Rates, as `5/s`, and the token buckets that keep to them. Reads no clock: the time comes in with every call."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BeforeValidator

_RATE: Final = re.compile(r"([1-9]\d*)/(s|m|h)")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
# A clock that is set back further than packets overtake each other must not starve a bucket until it has caught up.
_SET_BACK: Final = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """So many in a period of so many seconds. text: as the configuration has it."""

    count: int
    period: float
    text: str

    @property
    def per_second(self) -> float:
        """How many a second that is on average."""
        return self.count / self.period

    def __str__(self) -> str:
        return self.text


def _rate(value: object) -> Rate:
    if isinstance(value, Rate):
        return value
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        return Rate(int(match[1]), _UNITS[match[2]], value)
    raise ValueError(f'{value!r} is no rate; allowed: a whole number from 1 on with /s, /m or /h, as in "5/s"')


RateField = Annotated[Rate, BeforeValidator(_rate)]


class Bucket:
    """A token bucket: `per_second` tokens flow in, at most `burst` are in it, and it begins full."""

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
    """A bucket for each key, for at most `limit` keys: the one that was asked for longest ago is forgotten first.

    A forgotten key begins with a full bucket again, so a limit too small for the keys of a flood lets more pass, never less.
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
        """One more for this key; False where it would be too many."""
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


class Held:
    """How many a limit held back since that was last said; it is said every `every` seconds at most."""

    __slots__ = ("_every", "_since", "count")

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._since: float | None = None
        self.count = 0

    def add(self, now: float) -> None:
        """One more was held back."""
        if self.count == 0:
            self._since = now
        self.count += 1

    def due(self, now: float) -> int:
        """The count, if it is time to say it, and then it begins anew; else 0."""
        if self.count == 0 or self._since is None or 0.0 <= now - self._since < self._every:
            return 0
        return self.take()

    def take(self) -> int:
        """The count, which then begins anew."""
        count, self.count = self.count, 0
        return count
