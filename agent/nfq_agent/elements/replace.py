"""`replace`: replaces bytes, also across the borders of chunks."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, Part, StreamElement, Way, Ways, ways_of
from nfq_agent.values import Duration


class ReplaceOptions(element.Options):
    """find: the text to look for, or regex: a pattern of Python's `re`, on bytes. with: the replacement; after a
    regex `\\1` and `\\g<name>` are its groups. hex: find and with are hexadecimal digits. way: where.

    wait: how long the beginning of a possible match is held for the rest of it. window: with regex, the most bytes that a match
    spans; this many are held.
    """

    find: Annotated[str, Field(min_length=1)] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    with_: Annotated[str, Field(alias="with")]
    hex: bool = False
    way: Ways = "both"
    wait: Duration = 0.02
    window: Annotated[int, Field(ge=1, le=1 << 16)] = 1024

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.find is None) == (self.regex is None):
            raise ValueError("find and regex both name what to look for; allowed: one of them")
        if self.hex and self.regex is not None:
            raise ValueError("hex is for find; allowed: escapes as \\x00 in a regex")
        if self.hex:
            for text in (self.find or "", self.with_):
                try:
                    bytes.fromhex(text)
                except ValueError:
                    raise ValueError(f"{text!r} is not hexadecimal; allowed: pairs of digits, as in 00ff") from None
        if self.regex is not None:
            try:
                pattern = re.compile(self.regex.encode())
                re.sub(pattern, self.with_.encode(), b"")
                if pattern.match(b"") is not None:
                    raise ValueError("the regex matches the empty string; allowed: one that needs a byte or more")
            except re.error as error:
                raise ValueError(f"not a regex of Python's re: {error}") from error
            except IndexError as error:
                raise ValueError(f"with names a group that the regex does not have: {error}") from error
        return self


class Replace(StreamElement[ReplaceOptions]):
    """Changes the bytes of a stream. Lengths that the protocol announces elsewhere are not corrected."""

    def __init__(self, name: str, options: ReplaceOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)
        self._pattern: re.Pattern[bytes] | None = None
        self._find = b""
        if options.regex is not None:
            self._pattern = re.compile(options.regex.encode())
        elif options.find is not None:
            self._find = bytes.fromhex(options.find) if options.hex else options.find.encode()
        self._with = bytes.fromhex(options.with_) if options.hex else options.with_.encode()

    def request(self, data: bytes, connection: Connection) -> Answer:
        """The chunk with its matches replaced."""
        return self._change(data, Way.REQUEST, connection)

    def response(self, data: bytes, connection: Connection) -> Answer:
        """The chunk with its matches replaced."""
        return self._change(data, Way.RESPONSE, connection)

    def rest(self, way: Way, connection: Connection) -> bytes:
        """The beginning of a match that was not completed."""
        kept = connection.state.get(self, {}).pop(way, b"")
        return kept if self._pattern is None else self._pattern.sub(self._with, kept)

    def _change(self, data: bytes, way: Way, connection: Connection) -> Answer:
        kept: dict[Way, bytes] = connection.state.setdefault(self, {})
        data = kept.pop(way, b"") + data
        changed, rest = self._bytes(data) if self._pattern is None else self._regex(data, self._pattern)
        if not rest:
            return changed
        kept[way] = rest
        return Part(changed, self.options.wait)

    def _bytes(self, data: bytes) -> tuple[bytes, bytes]:
        """(final bytes, the beginning of a possible match)."""
        *before, tail = data.split(self._find)
        for length in range(min(len(self._find) - 1, len(tail)), 0, -1):
            if tail.endswith(self._find[:length]):
                break
        else:
            length = 0
        rest = tail[len(tail) - length :]
        return self._with.join((*before, tail[: len(tail) - length])), rest

    def _regex(self, data: bytes, pattern: re.Pattern[bytes]) -> tuple[bytes, bytes]:
        # A match that begins within the last `window` bytes may still grow, or turn into one.
        final = max(0, len(data) - self.options.window)
        parts: list[bytes] = []
        at = 0
        for match in pattern.finditer(data):
            if match.start() >= final:
                break
            parts += (data[at : match.start()], match.expand(self._with))
            at = match.end()
        end = max(at, final)
        parts.append(data[at:end])
        return b"".join(parts), data[end:]
