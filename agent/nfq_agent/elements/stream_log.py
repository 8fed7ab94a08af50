"""`stream-log`: one line when a connection comes and one when it has ended, with bytes and times; chunks where wanted."""

from __future__ import annotations

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, StreamElement
from nfq_agent.values import Endpoint


class StreamLogOptions(element.Options):
    """chunks: also a line for each chunk, with its length; bytes are then carried through the elements one by one."""

    chunks: bool = False


class StreamLog(StreamElement[StreamLogOptions]):
    """Says who connects to whom. It changes nothing."""

    def __init__(self, name: str, options: StreamLogOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        if not options.chunks:
            # No element asks: the bytes go past the elements.
            self.asks = frozenset()

    def opened(self, connection: Connection) -> None:
        """Say that it came."""
        self.emit(f"connection {connection.id}: {_route(connection)}", event="opened", **connection.fields)

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Say how much the client sent."""
        self.emit(f"connection {connection.id}: request, {len(data)} bytes", length=len(data), **connection.fields)
        return None

    def response(self, data: bytes, connection: Connection) -> Answer:
        """Say how much came back."""
        self.emit(f"connection {connection.id}: response, {len(data)} bytes", length=len(data), **connection.fields)
        return None

    def closed(self, connection: Connection) -> None:
        """Say what it was in the end."""
        seconds = connection.now - connection.opened
        self.emit(
            f"connection {connection.id}: {_route(connection)}: {connection.reason or 'ended'} after {seconds:.3f} s, "
            f"{connection.requested} bytes sent, {connection.responded} received",
            event="closed",
            reason=connection.reason,
            seconds=round(seconds, 6),
            bytes_forward=connection.requested,
            bytes_reverse=connection.responded,
            **connection.fields,
        )


def _route(connection: Connection) -> str:
    route = f"{Endpoint(*connection.client)} -> {Endpoint(*connection.upstream)}"
    if connection.original is not None and connection.original != connection.upstream:
        return f"{route} (meant for {Endpoint(*connection.original)})"
    return route
