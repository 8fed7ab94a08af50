"""What an element needs of its worker's process besides its packets or streams, once that has confined itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Access:
    """An exemption from the confinement of a worker; without one an element opens no file, no socket and starts no thread.

    What is opened in `start` stays usable, and needs no exemption. reads, writes: files or folders, as absolute paths; what may
    be written may be read. sockets: new IPv4 and IPv6 sockets, which connect. threads: new threads of this process.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    sockets: bool = False
    threads: bool = False

    def __or__(self, other: Access) -> Access:
        return Access(
            self.reads + other.reads, self.writes + other.writes, self.sockets or other.sockets, self.threads or other.threads
        )

    @property
    def words(self) -> str:
        """As text: `writes /var/lib/captures, opens sockets`; empty if it needs nothing."""
        parts = [f"reads {path}" for path in self.reads] + [f"writes {path}" for path in self.writes]
        parts += ["opens sockets"] * self.sockets + ["starts threads"] * self.threads
        return ", ".join(parts)


class HasAccess:
    """What packet and stream elements have in common.

    access: the exemption that a class declares. limits_itself: it has a rate of its own for its lines, as an option.
    """

    access: ClassVar[Access] = Access()
    limits_itself: ClassVar[bool] = False

    @classmethod
    def access_of(cls, options: Any) -> Access:  # noqa: ARG003  # for subclasses
        """What an element with these options needs: `access`, unless a subclass knows it more exactly."""
        return cls.access


def together(parts: Iterable[Access]) -> Access:
    """What all of them need."""
    whole = Access()
    for part in parts:
        whole |= part
    return whole
