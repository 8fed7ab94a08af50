"""`pcap`: packets into rotating pcapng files, each with its verdict as a comment. It decides nothing.

The format is that of draft-ietf-opsawg-pcapng: a section, one interface of raw IP, enhanced packet blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal
from urllib.parse import quote

from pydantic import Field, field_validator

from nfq_agent import element
from nfq_agent.access import Access
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.elements.interface_names import name_lookup
from nfq_agent.flow import Account, Flow
from nfq_agent.interfaces import Interfaces
from nfq_agent.packet import INWARD, OUTWARD, Packet, hook_name
from nfq_agent.values import Size
from nfq_agent.verdict import WOULD_DROP, Verdict

# Seconds until a file that cannot be written is tried again, and the greatest age of data that is not flushed; in packet time.
_AGAIN: Final = 10.0
_FLUSH: Final = 1.0
# What the kernel copies for elements that read headers; see `config`.
_HEADERS: Final = 128
_LINKTYPE_RAW: Final = 101
# What a comment says of the owner, where an element asked for it. Other characters than these and letters stand as %20.
_OWNER: Final = ("unit", "container", "container_to", "cgroup", "exe")
_PLAIN: Final = "/@._-:+,="


class PcapOptions(element.Options):
    """directory: where the files go; the agent's user must be able to write there. name: the beginning of their names.

    size: bytes of a file before the next one begins. files: how many are kept. snap: bytes of each packet.
    """

    directory: str
    name: str = "packets"
    size: Size = 64_000_000
    files: Annotated[int, Field(ge=1, le=10_000)] = 5
    snap: Annotated[int, Field(ge=1, le=65535)] = 65535

    @field_validator("directory")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError(f"{value!r} is not an absolute path; allowed: a path that begins with /")
        return value

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
            raise ValueError(f"{value!r} is not a valid file name; allowed: letters, digits, dot, underscore, hyphen")
        return value


class Pcap(PacketElement[PcapOptions]):
    """Writes after the verdict was given. With a full or missing disk, packets are missing from the capture; they are counted
    and logged.

    Files are NAME-SLOT-NUMBER.pcapng: the number rises, and a slot belongs to one worker at a time.
    """

    needs = Needs.PAYLOAD
    lasting = True

    def __init__(self, name: str, options: PcapOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._folder = Path(options.directory)
        self._file: BinaryIO | None = None
        self._lock = -1
        self._slot = 0
        self._number = 0
        self._written = 0
        self._flushed = self._latest = self._ticked = self._not_before = 0.0
        self._unflushed = False
        self._missed = 0
        self._interfaces = Interfaces(name_lookup())

    @classmethod
    def access_of(cls, options: PcapOptions) -> Access:
        """It writes files, a new one now and then."""
        return Access(writes=(options.directory,))

    @classmethod
    def logs_drops_of(cls, options: PcapOptions) -> Literal["all", "own", "none"]:  # noqa: ARG003  # with any
        """All: each packet is in the files with its verdict."""
        return "all"

    @classmethod
    def needs_of(cls, options: PcapOptions) -> Needs:
        """The packet's bytes, up to `snap`."""
        return Needs.HEADERS if options.snap <= _HEADERS else Needs.PAYLOAD

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> None:
        """Write the packet."""
        now = packet.time
        if self._file is None and self._not_before - _AGAIN <= now < self._not_before:
            self._missed += 1
            return
        try:
            if self._file is None or self._written >= self.options.size:
                self._next_file()
            assert self._file is not None
            block = self._block(packet, verdict, {} if flow is None else flow.facts)
            self._file.write(block)
            self._written += len(block)
            self._latest, self._unflushed = now, True
            if not 0.0 <= now - self._flushed < _FLUSH:
                self._flush()
        except OSError as error:
            self._give_up(error, now)

    def tick(self, now: float, account: Callable[[Flow], Account | None]) -> None:  # packets have another clock
        """Write what is not in the file yet where no packet has come since the last tick."""
        if self._unflushed and self._latest == self._ticked:
            try:
                self._flush()
            except OSError as error:
                self._give_up(error, self._latest)
        self._ticked = self._latest

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        self._flushed, self._unflushed = self._latest, False

    def stop(self) -> None:
        """Close the file; log the packets that were missed."""
        try:
            self._close()
        except OSError as error:
            self.emit(f"{self.name}: the end of the last file is lost: {error}", level="error")
        if self._missed:
            self.emit(f"{self.name}: {self._missed} packets are not in the files", level="warning", missed=self._missed)
            self._missed = 0
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _give_up(self, error: OSError, now: float) -> None:
        self._missed += 1
        self._not_before = now + _AGAIN
        self.emit(
            f"{self.name}: {self._folder}: cannot write: {error.strerror}; {self._missed} packets missed; "
            f"next try in {_AGAIN:.0f} s",
            level="error",
            missed=self._missed,
        )
        file, self._file = self._file, None
        if file is not None:
            # It tries to flush once more, and the disk is still full.
            with contextlib.suppress(OSError):
                file.close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _next_file(self) -> None:
        self._close()
        if self._lock < 0:
            self._take_slot()
        found = self._found()
        self._number = max([self._number, *(number for number, _ in found)]) + 1
        for _, path in found[: max(0, len(found) - self.options.files + 1)]:
            path.unlink(missing_ok=True)
        path = self._folder / f"{self.options.name}-{self._slot}-{self._number:06}.pcapng"
        # Other users must not read payloads.
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640), "wb")
        self._written = self._file.write(_section() + _interface(self.options.snap))

    def _take_slot(self) -> None:
        """The first number whose lock file no other worker holds."""
        for slot in range(65536):
            lock = os.open(self._folder / f".{self.options.name}-{slot}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            self._lock, self._slot = lock, slot
            return

    def _found(self) -> list[tuple[int, Path]]:
        """The files of this slot, oldest first."""
        pattern = re.compile(rf"{re.escape(self.options.name)}-{self._slot}-(\d+)\.pcapng")
        matches = ((pattern.fullmatch(path.name), path) for path in self._folder.iterdir())
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _block(self, packet: Packet, verdict: Verdict, facts: Mapping[str, Any]) -> bytes:
        payload = packet.payload[: self.options.snap]
        # In monitor mode it passes, and what would have happened is known by the verdict's identity.
        outcome = "would-drop" if verdict is WOULD_DROP else verdict.outcome.name.lower()
        comment = f"{hook_name(packet.hook)} {outcome}"
        for word, index in (("in", packet.indev), ("out", packet.outdev)):
            if index:
                comment += f" {word} {self._interfaces.name(index, packet.time)}"
        if verdict.queue is not None:
            comment += f" to {verdict.queue}"
        for word, value in (("uid", packet.uid), ("gid", packet.gid), ("mark", f"{packet.mark:#x}" if packet.mark else None)):
            if value is not None:
                comment += f" {word} {value}"
        for word in _OWNER:
            if word in facts:
                comment += f" {word} {quote(facts[word], _PLAIN)}"
        direction = 1 if packet.hook in INWARD else 2 if packet.hook in OUTWARD else 0
        stamp = int(packet.time * 1_000_000)
        head = struct.pack("=IIIII", 0, stamp >> 32, stamp & 0xFFFFFFFF, len(payload), max(packet.length, len(payload)))
        options = _option(1, comment.encode()) + _option(2, struct.pack("=I", direction)) + _option(0, b"")
        return _wrap(6, head + _padded(payload) + options)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) & 3)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + _padded(value)


def _wrap(kind: int, body: bytes) -> bytes:
    length = struct.pack("=I", len(body) + 12)
    return struct.pack("=I", kind) + length + body + length


def _section() -> bytes:
    return _wrap(0x0A0D0D0A, struct.pack("=IHHq", 0x1A2B3C4D, 1, 0, -1) + _option(4, b"nfq-agent") + _option(0, b""))


def _interface(snap: int) -> bytes:
    return _wrap(1, struct.pack("=HHI", _LINKTYPE_RAW, 0, snap) + _option(2, b"nfqueue") + _option(0, b""))
