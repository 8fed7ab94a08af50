"""QUIC: Initial packets and the ClientHello in them (RFC 9000 17.2.2, RFC 9001 5 and appendix A; version 2: RFC 9369).

The keys of an Initial packet follow from its content, so any host on the path can read it (quic_keys.py). Steps: at most 16
packets for a datagram, and 1,024 frames for a packet, where a run of padding and pings is one; with more the name is not known,
which is a conflict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nfq_agent.protocols import Protocol, tls
from nfq_agent.reassembly import Reassembly

if TYPE_CHECKING:
    from nfq_agent.protocols.quic_keys import InitialKeys

NO_CRYPTOGRAPHY: Final = "QUIC, and the package cryptography is not installed"
_PACKETS: Final = 16
_FRAMES: Final = 1024
_CONNECTIONS: Final = 64
_DIFFER: Final = "frames that overlap differ"
# Hellos of which parts are kept.
_UNFINISHED: Final = 4
_SECONDS: Final = 30.0
_PADDING: Final = 0
_PING: Final = 1
_ACK: Final = 2
_ACK_ECN: Final = 3
_CRYPTO: Final = 6
_CLOSE: Final = 0x1C
# A client's Initial datagram has 1,200 bytes or more, its first destination id 8 or more (RFC 9000 14.1, 7.2).
_DATAGRAM: Final = 1200


class _Version(NamedTuple):
    name: str
    salt: bytes
    labels: tuple[bytes, bytes, bytes]
    # The two bits of the first byte that mean Initial.
    initial: int


_V1_LABELS: Final = (b"quic key", b"quic iv", b"quic hp")
_V1_SALT: Final = bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a")
_VERSIONS: Final = {
    1: _Version("1", _V1_SALT, _V1_LABELS, 0),
    0x6B3343CF: _Version(
        "2", bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), (b"quicv2 key", b"quicv2 iv", b"quicv2 hp"), 1
    ),
    # The drafts that were in wide use (draft-ietf-quic-tls-23, -29 and -33, 5.2).
    **{
        0xFF000000 + number: _Version(f"draft-{number}", salt, _V1_LABELS, 0)
        for salt, numbers in (
            (bytes.fromhex("c3eef712c72ebb5a11a7d2432bb46365bef9f502"), range(23, 29)),
            (bytes.fromhex("afbfec289993d24c9e9786f19c6111e04390a899"), range(29, 33)),
            (_V1_SALT, range(33, 35)),
        )
        for number in numbers
    },
}


@dataclass(frozen=True, slots=True)
class Initial:
    """An Initial packet in its datagram. start: of the packet. number_at: of the packet number. end: behind the payload."""

    version: int
    destination: bytes
    start: int
    number_at: int
    end: int


class Hello:
    """The ClientHello of one connection, put together from its client's Initial packets. Bounded by its Reassembly.

    facts: what is known so far. complete: nothing more is to come. conflict: two frames differ about the same byte, also where
    the second one comes when all is read: which of them the server took is not known.
    """

    __slots__ = ("_keys", "_stream", "_whole", "complete", "conflict", "facts")

    def __init__(self, keys: InitialKeys | None, version: str) -> None:
        self._keys = keys
        self._stream: Reassembly | None = Reassembly(0)
        self.facts: dict[str, Any] = {"protocol": "quic", "quic_version": version}
        self.complete = False
        self.conflict = False
        # The hello's bytes, once it is whole.
        self._whole = b""

    def opens(self, datagram: bytes, packet: Initial) -> bytes | None:
        """The frames of a packet of this connection; None for one of another."""
        return None if self._keys is None else self._keys.unseal(datagram, packet.start, packet.number_at, packet.end)

    def take(self, frames: bytes) -> None:
        """Take the frames of a packet."""
        stream = self._stream
        pieces = _crypto(frames)
        if pieces is None:
            self.contradict("more frames than are read")
            return
        if stream is None:
            for offset, data in pieces:
                known = self._whole[offset : offset + len(data)]
                if data[: len(known)] != known and not self.conflict:
                    self.contradict(_DIFFER)
            return
        for offset, data in pieces:
            stream.add(offset, data)
        if stream.conflict:
            self.contradict(_DIFFER)
            return
        data = stream.data
        if len(data) < 4:
            return
        size = int.from_bytes(data[1:4], "big")
        if data[0] != 1 or len(data) < 4 + size:
            return
        facts = tls.hello(data[4 : 4 + size], "q")
        self.facts |= facts or {"conflict": "a ClientHello that servers may read in different ways"}
        # Keys and bytes stay, so that what is sent again is known again.
        self._whole = data[: 4 + size]
        self.complete, self._stream = True, None

    def give_up(self) -> None:
        """Drop what is kept; there will be no name."""
        self.complete, self._stream = True, None

    def contradict(self, reason: str) -> None:
        """Nothing that was read is certain."""
        self.conflict = True
        self.facts = {"protocol": "quic", "quic_version": self.facts["quic_version"], "conflict": reason}
        self.give_up()


class Connections:
    """The connections of one UDP flow; each begins with an Initial packet that its own keys open.

    A connection is remembered for as long as a server may wait for the rest of its hello, so that a part that is sent again
    is known to be a part. More than 64 within that time are a conflict.
    """

    __slots__ = ("_hellos",)

    def __init__(self) -> None:
        self._hellos: dict[bytes, tuple[float, Hello]] = {}

    def add(self, datagram: bytes, now: float) -> list[Hello]:
        """The connections of which the datagram has Initial packets, in their order. now: seconds.

        A server reads those of one connection alone (RFC 9000 12.2), and it is not known which one.
        """
        said: dict[Hello, None] = {}
        packets = initials(datagram)
        if len(packets) > _PACKETS:
            many = Hello(None, _VERSIONS[packets[0].version].name)
            many.contradict("more packets in a datagram than are read")
            return [many]
        for packet in packets:
            hello, frames = self._of(datagram, packet, now)
            if hello is None:
                continue
            said[hello] = None
            if frames is not None:
                hello.take(frames)
        return list(said)

    def _of(self, datagram: bytes, packet: Initial, now: float) -> tuple[Hello | None, bytes | None]:
        """Whose packet it is, and its frames. After a Retry the keys follow from the id that the server chose."""
        known = self._hellos.get(packet.destination)
        others = [hello for _, hello in self._hellos.values()]
        for hello in others if known is None else [known[1], *others]:
            if (frames := hello.opens(datagram, packet)) is not None:
                return hello, frames
        version = _VERSIONS[packet.version]
        from nfq_agent.protocols import quic_keys  # noqa: PLC0415  # 6 MB, which a worker has need of where it reads QUIC

        if not quic_keys.AVAILABLE:
            return Hello(None, version.name), None
        if len(packet.destination) < 8:
            return None, None
        keys = quic_keys.InitialKeys(version.salt, version.labels, packet.destination)
        frames = keys.unseal(datagram, packet.start, packet.number_at, packet.end)
        if frames is None:
            return None, None
        hello = Hello(keys, version.name)
        if len(self._hellos) >= _CONNECTIONS and now - next(iter(self._hellos.values()))[0] >= _SECONDS:
            del self._hellos[next(iter(self._hellos))]
        unfinished = sum(not other.complete for other in others)
        if len(self._hellos) >= _CONNECTIONS or unfinished >= _UNFINISHED:
            hello.contradict("too many QUIC connections from one port")
            return hello, None
        self._hellos[packet.destination] = now, hello
        return hello, frames


def readable(version: str) -> bool:
    """Whether the Initial packets of a version can be read."""
    return any(each.name == version for each in _VERSIONS.values())


def long_header(datagram: bytes) -> str | None:
    """The version, as far as a client's first datagram shows one (RFC 8999 5.1); None for what is not QUIC.

    A version that has no name here is "0x" and its number. Version 0 is a server's negotiation.
    """
    if len(datagram) < _DATAGRAM or datagram[0] & 0xC0 != 0xC0:
        return None
    number = int.from_bytes(datagram[1:5], "big")
    at = 6 + datagram[5]
    if not number or not 8 <= datagram[5] <= 20 or datagram[at] > 20:
        return None
    version = _VERSIONS.get(number)
    if version is not None:
        return version.name
    if number & 0xFFFFFF00 == 0xFF000000:
        return f"draft-{number & 0xFF}"
    return f"{number:#010x}"


def initials(datagram: bytes) -> list[Initial]:
    """The Initial packets of a client's datagram; empty if it is none, by header and length (RFC 9000 17.2).

    One more than are read stands for all that are too many.
    """
    found: list[Initial] = []
    if len(datagram) < _DATAGRAM:
        return found
    start = 0
    for _ in range(4 * _PACKETS):
        if len(found) > _PACKETS or len(datagram) < start + 7 or datagram[start] & 0xC0 != 0xC0:
            break
        number = int.from_bytes(datagram[start + 1 : start + 5], "big")
        version = _VERSIONS.get(number)
        if version is None:
            break
        at = start + 5
        size = datagram[at]
        destination = datagram[at + 1 : at + 1 + size]
        at += 1 + size
        if size > 20 or at >= len(datagram):
            break
        at += 1 + datagram[at]
        kind = datagram[start] >> 4 & 3
        if kind == version.initial:
            got = _variable(datagram, at)
            if got is None:
                break
            at = got[1] + got[0]
        got = _variable(datagram, at)
        if got is None or got[1] + got[0] > len(datagram):
            break
        length, at = got
        # Packet number and sample need 20 bytes (RFC 9001 5.4.2): a server skips a packet without them.
        if kind == version.initial and length >= 20:
            found.append(Initial(number, destination, start, at, at + length))
        start = at + length
    return found


def _variable(data: bytes, at: int) -> tuple[int, int] | None:
    """A variable-length integer (RFC 9000 16): its value, and the place behind it."""
    if at >= len(data):
        return None
    size = 1 << (data[at] >> 6)
    if at + size > len(data):
        return None
    return int.from_bytes(data[at : at + size], "big") & (1 << 8 * size - 2) - 1, at + size


def _crypto(frames: bytes) -> list[tuple[int, bytes]] | None:
    """Offset and data of the CRYPTO frames; None where there are more frames than are read.

    An Initial holds no others but PADDING, PING, ACK and CLOSE (RFC 9000 12.4). A frame's type may be longer than it has to
    be: aioquic reads it.
    """
    found: list[tuple[int, bytes]] = []
    at = 0
    for _ in range(_FRAMES):
        # A run of padding and pings is one step.
        at = len(frames) - len(frames[at:].lstrip(b"\0\1"))
        kind = _variable(frames, at)
        if kind is None:
            return found
        at = kind[1]
        if kind[0] in (_PADDING, _PING):
            continue
        if kind[0] == _CRYPTO:
            offset = _variable(frames, at)
            size = offset and _variable(frames, offset[1])
            if not offset or not size or size[1] + size[0] > len(frames):
                return found
            at = size[1] + size[0]
            if offset[0] < 1 << 30:
                found.append((offset[0], frames[size[1] : at]))
        elif kind[0] in (_ACK, _ACK_ECN, _CLOSE):
            after = _skip_close(frames, at) if kind[0] == _CLOSE else _skip_ack(frames, at, kind[0])
            if after is None:
                return found
            at = after
        else:
            return found
    return None


def _skip_close(frames: bytes, at: int) -> int | None:
    """The place behind a CONNECTION_CLOSE frame (RFC 9000 19.19): error, type of frame, length, reason."""
    for _ in range(3):
        got = _variable(frames, at)
        if got is None:
            return None
        value, at = got
    return at + value


def _skip_ack(frames: bytes, at: int, kind: int) -> int | None:
    """The place behind an ACK frame (RFC 9000 19.3): largest, delay, count, first range, then pairs, then three ECN counts."""
    fields: list[int] = []
    wanted = 4
    while len(fields) < wanted:
        got = _variable(frames, at)
        if got is None:
            return None
        fields.append(got[0])
        at = got[1]
        if len(fields) == 3:
            wanted += 2 * min(fields[2], len(frames)) + (3 if kind == _ACK_ECN else 0)
    return at


PROTOCOL: Final = Protocol("quic", facts=("quic_version",), carries=("tls",))


__all__ = ["NO_CRYPTOGRAPHY", "PROTOCOL", "Connections", "Hello", "Initial", "initials", "long_header", "readable"]
