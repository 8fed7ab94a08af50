"""`tap`: a copy of every connection's bytes, one file for each way: `ID.request` and `ID.response`."""

from __future__ import annotations

import contextlib
import os
from typing import Annotated

from pydantic import Field

from nfq_agent import element
from nfq_agent.access import Access
from nfq_agent.element import Emit
from nfq_agent.stream import Answer, Connection, Done, StreamElement, Way, Ways, ways_of


class TapOptions(element.Options):
    """folder: where the files go; the agent's user has to be able to write there. way: the direction. max_bytes: of each file, 0
    for no limit. max_files: that one process makes; later connections are not copied."""

    folder: Annotated[str, Field(pattern=r"^/")]
    way: Ways = "both"
    max_bytes: Annotated[int, Field(ge=0)] = 1 << 20
    max_files: Annotated[int, Field(ge=1)] = 10_000


class Tap(StreamElement[TapOptions]):
    """Copies, and changes nothing. A file that cannot be written ends that copy, not the connection."""

    def __init__(self, name: str, options: TapOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self.asks = ways_of(options.way)
        self._files = 0

    @classmethod
    def access_of(cls, options: TapOptions) -> Access:
        """It writes files, two for each connection."""
        return Access(writes=(options.folder,))

    def start(self) -> None:
        """Refuse to start where nothing can be written. Raises OSError."""
        if not os.access(self.options.folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.name}: {self.options.folder} is not a folder that uid {os.geteuid()} can write to")

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Copied."""
        return self._copy(data, Way.REQUEST, connection)

    def response(self, data: bytes, connection: Connection) -> Answer:
        """Copied."""
        return self._copy(data, Way.RESPONSE, connection)

    def rest(self, way: Way, connection: Connection) -> bytes:
        """Nothing is held; the file is complete."""
        self._close(way, connection)
        return b""

    def closed(self, connection: Connection) -> None:
        """The files are complete."""
        for way in Way:
            self._close(way, connection)

    def _copy(self, data: bytes, way: Way, connection: Connection) -> Answer:
        # Descriptor and bytes written, by way.
        files: dict[Way, tuple[int, int]] = connection.state.setdefault(self, {})
        try:
            if way not in files:
                if self._files >= self.options.max_files:
                    return Done()
                path = os.path.join(self.options.folder, f"{connection.id}.{way.name.lower()}")
                files[way] = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), 0)
                self._files += 1
            descriptor, size = files[way]
            most = self.options.max_bytes
            piece = data[: most - size] if most else data
            os.write(descriptor, piece)
            files[way] = (descriptor, size + len(piece))
            if not most or size + len(piece) < most:
                return None
        except OSError as error:
            self.emit(f"{self.name}: connection {connection.id}: no copy of the {way.name.lower()}: {error}", level="error",
                      **connection.fields)  # fmt: skip
        self._close(way, connection)
        return Done()

    def _close(self, way: Way, connection: Connection) -> None:
        file = connection.state.get(self, {}).pop(way, None)
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file[0])
