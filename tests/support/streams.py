"""A stream without sockets, and elements that answer as they are told."""

from __future__ import annotations

from typing import Any

from nfq_agent.elements import stream_element
from nfq_agent.stream import (
    Connection,
    Output,
    Send,
    Stream,
    StreamChain,
    StreamElement,
    Way,
)

REQUEST, RESPONSE = Way.REQUEST, Way.RESPONSE


class Said(list[tuple[str, dict[str, Any]]]):
    """An `emit` that remembers."""

    def __call__(self, message: str, level: str = "info", **fields: Any) -> None:
        self.append((message, {"level": level, **fields}))


def connection() -> Connection:
    return Connection("c-1", ("192.0.2.7", 40000), ("192.0.2.1", 80), ("192.0.2.1", 80), 100.0, 100.0)


def element(kind: str, **options: Any) -> StreamElement:
    """A built-in by its name and the keys of its table."""
    cls = stream_element(kind)
    return cls(kind, cls.Options.model_validate(options), Said())


def stream(*elements: StreamElement, **options: Any) -> Stream:
    return Stream(connection(), StreamChain(elements), **options)


def sent(outputs: list[Output], way: Way) -> bytes:
    """The bytes of one direction, joined."""
    return b"".join(output.data for output in outputs if isinstance(output, Send) and output.way is way)
