"""A stream without its sockets: events come in, commands to send and to close come out. No I/O, no clock, no log.

A connection has two ways: requests run from the client through the elements in forward order, responses through them in
reverse. Elements see chunks, and must not rely on where one ends and the next begins.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from nfq_agent.connection import Connection as Connection
from nfq_agent.connection import Way as Way
from nfq_agent.stream_element import CLOSE as CLOSE
from nfq_agent.stream_element import Act as Act
from nfq_agent.stream_element import Answer as Answer
from nfq_agent.stream_element import Done as Done
from nfq_agent.stream_element import Later as Later
from nfq_agent.stream_element import Part as Part
from nfq_agent.stream_element import StreamElement as StreamElement
from nfq_agent.stream_element import Ways as Ways
from nfq_agent.stream_element import ways_of as ways_of
from nfq_agent.verdict import ACCEPT as ACCEPT
from nfq_agent.verdict import DROP as DROP
from nfq_agent.verdict import Verdict


class StreamChain:
    """Elements in their order: forward for requests, reverse for responses."""

    def __init__(self, elements: Sequence[StreamElement]) -> None:
        self.elements = tuple(elements)
        self.ways = tuple(
            tuple(e for e in order if way in e.asks)
            for way, order in ((Way.REQUEST, self.elements), (Way.RESPONSE, self.elements[::-1]))
        )
        self.most = min((e.most for e in self.elements if e.most is not None), default=None)
        self.apart = any(e.apart for e in self.elements)
        # Only those that override it are called.
        self.openers = tuple(e for e in self.elements if type(e).opened is not StreamElement.opened)
        self.closers = tuple(e for e in self.elements if type(e).closed is not StreamElement.closed)

    def __len__(self) -> int:
        return len(self.elements)

    def start(self) -> None:
        """Start the elements in order."""
        for element in self.elements:
            element.start()

    def stop(self) -> None:
        """Stop them in reverse order."""
        for element in reversed(self.elements):
            element.stop()


class Send(NamedTuple):
    """Send these bytes in that direction."""

    way: Way
    data: bytes


class End(NamedTuple):
    """The end of that direction: close that half (shutdown(2), SHUT_WR) after the bytes before it."""

    way: Way


class Close(NamedTuple):
    """Close both sides at once. element: the name of the one that asked for it."""

    element: str


class Failed(NamedTuple):
    """An element raised; its chunk was passed or dropped as configured."""

    element: str
    error: Exception


Output = Send | End | Close | Failed


class _Lane:
    """One way of one connection."""

    __slots__ = ("asked", "behind", "ended", "held", "live", "order", "parts", "stages", "way")

    def __init__(self, way: Way, elements: Sequence[StreamElement]) -> None:
        self.way = way
        self.stages = elements
        # Which stages are still asked; a place keeps its number when its element is done.
        self.live = [True] * len(elements)
        self.asked = len(elements)
        # When the last chunk that waits behind each stage is sent on: later ones must not overtake it.
        self.behind = [0.0] * len(elements)
        # (due, minus the stage from which it continues, order of holding, data or None for the end): the furthest goes first.
        self.held: list[tuple[float, int, int, bytes | None]] = []
        self.order = 0
        # When a stage that keeps bytes back is asked for them.
        self.parts: dict[int, float] = {}
        self.ended = False


class Stream:
    """The two ways of one connection through a chain. Every event returns what is to be done, in order.

    Times are those of the connection's clock and never go back. chunk: the most bytes that an element sees at once.
    on_error: what happens to a chunk whose element raised: `pass` (as it came) or `drop`.
    """

    __slots__ = ("_chain", "_chunk", "_lanes", "_on_error", "closed", "connection", "held_bytes")

    def __init__(
        self, connection: Connection, chain: StreamChain, chunk: int = 4096, on_error: Literal["pass", "drop"] = "pass"
    ) -> None:
        self.connection = connection
        self._on_error = on_error
        self._chain = chain
        self._chunk = chunk if chain.most is None else min(chunk, chain.most)
        self._lanes = tuple(_Lane(way, chain.ways[way]) for way in Way)
        # Bytes that wait for their time, each way.
        self.held_bytes = [0, 0]
        self.closed = False

    @property
    def apart(self) -> bool:
        """Whether each chunk is to be sent by itself."""
        return self._chain.apart

    def raw(self, way: Way) -> bool:
        """True once no element looks at this direction any more, and nothing of it waits: bytes may bypass the stream."""
        lane = self._lanes[way]
        return lane.asked == 0 and not lane.held

    @property
    def due(self) -> float | None:
        """When `woken` is to be called next; None if nothing waits."""
        due = [time for lane in self._lanes for time in lane.parts.values()]
        due += [lane.held[0][0] for lane in self._lanes if lane.held]
        return min(due, default=None)

    def opened(self) -> list[Output]:
        """The connection was accepted."""
        out: list[Output] = []
        for element in self._chain.openers:
            answer = self._ask(out, element, element.opened, self.connection)
            if answer is CLOSE:
                self._close(out, element)
                break
            if isinstance(answer, Part):
                for lane in self._lanes:
                    if element in lane.stages:
                        lane.parts[lane.stages.index(element)] = self.connection.now + answer.seconds
        return out

    def received(self, way: Way, data: bytes, now: float) -> list[Output]:
        """Bytes came in."""
        out = self.woken(now)
        lane = self._lanes[way]
        if self.closed:
            return out
        if lane.asked == 0 and not lane.held:
            out.append(Send(way, data))
        elif len(data) <= self._chunk:
            self._run(out, lane, 0, data, now)
        else:
            for start in range(0, len(data), self._chunk):
                self._run(out, lane, 0, data[start : start + self._chunk], now)
        return out

    def ended(self, way: Way, now: float) -> list[Output]:
        """The side that sends that way has closed its half."""
        out = self.woken(now)
        lane = self._lanes[way]
        if not lane.ended and not self.closed:
            lane.ended = True
            self._run_end(out, lane, 0, now)
        return out

    def woken(self, now: float) -> list[Output]:
        """Time has passed."""
        out: list[Output] = []
        if now > self.connection.now:
            self.connection.now = now
        for lane in self._lanes:
            held = lane.held
            while held and held[0][0] <= now and not self.closed:
                due, stage, _, data = heapq.heappop(held)
                # At its own due time, not now: bytes that wait at later stages must stay before it.
                if data is None:
                    self._run_end(out, lane, -stage, due)
                else:
                    self.held_bytes[lane.way] -= len(data)
                    self._run(out, lane, -stage, data, due)
            for index, due in list(lane.parts.items()) if lane.parts else ():
                if due <= now and not self.closed:
                    self._rest(out, lane, index, now)
        return out

    def finished(self, now: float, reason: str = "") -> list[Output]:
        """Both sides are closed. Only Failed can come out."""
        out: list[Output] = []
        self.closed = True
        self.connection.now = max(now, self.connection.now)
        self.connection.reason = self.connection.reason or reason
        for element in self._chain.closers:
            self._ask(out, element, element.closed, self.connection)
        return out

    def _run(self, out: list[Output], lane: _Lane, first: int, data: bytes, now: float) -> None:
        """Carry a chunk through the stages of a way, from the stage `first` on."""
        for index in range(first, len(lane.stages)):
            if self.closed:
                return
            due = lane.behind[index]
            if lane.live[index]:
                element = lane.stages[index]
                lane.parts.pop(index, None)
                call = element.request if lane.way is Way.REQUEST else element.response
                answer = self._ask(out, element, call, data, self.connection)
                if answer is None:
                    pass
                elif isinstance(answer, bytes):
                    data = answer
                elif answer is CLOSE:
                    self._close(out, element)
                    return
                elif isinstance(answer, Done):
                    lane.live[index] = False
                    lane.asked -= 1
                    data = data if answer.data is None else answer.data
                elif isinstance(answer, Later):
                    data = data if answer.data is None else answer.data
                    due = max(due, now + answer.seconds)
                elif isinstance(answer, Part):
                    data = answer.data
                    lane.parts[index] = now + answer.seconds
                else:
                    return
            if not data:
                return
            if due > now:
                self._hold(lane, index, data, due)
                return
        out.append(Send(lane.way, data))

    def _run_end(self, out: list[Output], lane: _Lane, first: int, now: float) -> None:
        """Carry the end of a way through, and with it what the elements held back."""
        for index in range(first, len(lane.stages)):
            if lane.live[index]:
                lane.live[index] = False
                lane.asked -= 1
                self._rest(out, lane, index, now)
            if self.closed:
                return
            if lane.behind[index] > now:
                self._hold(lane, index, None, lane.behind[index])
                return
        out.append(End(lane.way))

    def _rest(self, out: list[Output], lane: _Lane, index: int, now: float) -> None:
        """Ask a stage for the bytes that it keeps back, and carry them on."""
        lane.parts.pop(index, None)
        element = lane.stages[index]
        rest = self._ask(out, element, element.rest, lane.way, self.connection)
        if rest is CLOSE:
            self._close(out, element)
            return
        if isinstance(rest, Later):
            lane.behind[index] = max(lane.behind[index], now + rest.seconds)
            rest = rest.data
        if isinstance(rest, bytes) and rest:
            if lane.behind[index] > now:
                self._hold(lane, index, rest, lane.behind[index])
            else:
                self._run(out, lane, index + 1, rest, now)

    def _hold(self, lane: _Lane, index: int, data: bytes | None, due: float) -> None:
        lane.behind[index] = due
        lane.order += 1
        heapq.heappush(lane.held, (due, -(index + 1), lane.order, data))
        self.held_bytes[lane.way] += len(data or b"")

    def _close(self, out: list[Output], element: StreamElement) -> None:
        self.closed = True
        self.connection.reason = self.connection.reason or f"closed by {element.name}"
        out.append(Close(element.name))

    def _ask(self, out: list[Output], element: StreamElement, call: Callable[..., Any], *args: Any) -> Any:
        """The answer of an element; its exceptions are caught only here."""
        try:
            answer = call(*args)
            if answer is None or answer == ACCEPT:
                return None
            if isinstance(answer, (bytes, Act, Done, Later, Part)) or answer == DROP:
                return answer
            if isinstance(answer, (bytearray, memoryview)):
                return bytes(answer)
            what = answer if isinstance(answer, Verdict) else type(answer).__name__
            raise TypeError(f"answered {what}; allowed: None, bytes, ACCEPT, DROP, CLOSE, Done, Later or Part")
        except Exception as error:
            out.append(Failed(element.name, error))
            return None if self._on_error == "pass" else DROP
