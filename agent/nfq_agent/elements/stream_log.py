"""`stream-log`: one line when a connection opens and one when it has ended, with bytes and times; optionally one for each
chunk."""

from __future__ import annotations

from nfq_agent import element
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, StreamElement
from nfq_agent.values import Endpoint


class StreamLogOptions(element.Options):
    """chunks: also a line for each chunk, with its length; bytes are then carried through the elements one by one."""

    chunks: bool = False


class StreamLog(StreamElement[StreamLogOptions]):
    """Logs client and destination of each connection. It changes nothing."""

    def __init__(self, name: str, options: StreamLogOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        if not options.chunks:
            # Without chunks the bytes need not pass this element.
            self.asks = frozenset()

    def opened(self, connection: Connection) -> None:
        """Log the connection."""
        self.emit(f"connection {connection.id}: {_route(connection)}", event="opened", **connection.fields)

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Log a chunk of the client."""
        self.emit(f"connection {connection.id}: request, {len(data)} bytes", length=len(data), **connection.fields)
        return None

    def response(self, data: bytes, connection: Connection) -> Answer:
        """Log a chunk of the destination."""
        self.emit(f"connection {connection.id}: response, {len(data)} bytes", length=len(data), **connection.fields)
        return None

    def closed(self, connection: Connection) -> None:
        """Log the totals."""
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
