"""Evasions by conversations that never show a name: what a peer gets while the outcome is open, with `undecided = "accept"`."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from functools import partial

from agent import until
from evasion_attempt import Attempt
from evasion_bed import Bed
from evasion_config import ON_LINK
from evasion_line import Line
from evasion_servers import COUNTING, TALK, TALKING

_MANY = 400_000
# `within_bytes`: what passes at most.
_WITHIN = 16384
_CONNECTIONS = 10


def _hello() -> bytes:
    """A ClientHello that does not end, and never names a server."""
    piece = b"\x16\3\1\x40\0" + bytes(16384)
    return b"\x16\3\1\x40\0\1\xff\xff\xff\3\3" + bytes(32) + b"\0\xff\xfe" + bytes(16384 - 41) + piece * 30


def _fields() -> bytes:
    """A request whose fields do not end, and are no Host."""
    return b"GET / HTTP/1.1\r\n" + b"X: 23456789\r\n" * (_MANY // 13)


def _line() -> bytes:
    """A line that does not end."""
    return b"A" * _MANY


_SAID = {
    "tls": ("TLS: a ClientHello that never ends or names a server", _hello()),
    "http": ("HTTP: a request with header fields without end, and no Host", _fields()),
    "line": ("a line that never ends, of no known protocol", _line()),
}


def _says(data: bytes, attempt: Attempt) -> None:
    """Say all of it on one connection, and wait until no more of it arrives."""
    with attempt.tcp(COUNTING) as client:
        attempt.note("from {} {}".format(*client.getsockname()[:2]))
        # So long without progress says that it is cut; a busy machine makes a pause, too.
        client.settimeout(8.0)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < _MANY:
                sent += client.send(data[sent : sent + 1000])
        waiting, before = -1, 0
        while waiting not in (0, before):
            before = waiting
            time.sleep(1.0)
            waiting = struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]


def _unnamed(kind: str, attempt: Attempt, _name: str) -> None:
    _says(_SAID[kind][1], attempt)


def _many(attempt: Attempt, _name: str) -> None:
    threads = [threading.Thread(target=_says, args=(_SAID["line"][1], attempt)) for _ in range(_CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _each_gets_little(bed: Bed, attempt: Attempt) -> None:
    """Some of it, as `undecided` says, and no more than `within_bytes` of a connection."""
    ends = [note.split()[1:] for note in bed.notes(attempt)]
    assert ends
    least = _MANY if bed.policy.kind == "none" else 1
    for address, port in ends:
        # A busy server reads on when its client has gone.
        until(lambda: bed.counted(address, port) >= least, "the server has read what came")  # noqa: B023  # called before the next turn of the loop
        assert bed.policy.kind == "none" or bed.counted(address, port) <= _WITHIN


def _listens(attempt: Attempt, _name: str) -> None:
    """Say nothing, and read what the server says."""
    count, end = 0, "silence"
    with socket.socket(socket.AF_INET if attempt.family == 4 else socket.AF_INET6) as client:
        # Late, as on a busy machine: then it is reset before the client has seen that it was there. To wait for the connection
        # would fail, and throw away what has come.
        client.setblocking(False)
        client.connect_ex((ON_LINK[attempt.family], TALKING))
        time.sleep(1.0)
        # A busy server makes a pause, too.
        client.settimeout(8.0)
        try:
            while data := client.recv(65536):
                count += len(data)
        except ConnectionResetError:
            end = "reset"
        except OSError:
            pass
    attempt.note(f"read {count} {end}")


def _little_comes(bed: Bed, attempt: Attempt) -> None:
    _, count, end = bed.notes(attempt)[0].split()
    if bed.policy.kind == "allow-list":
        assert 0 < int(count) <= _WITHIN
        assert end == ("reset" if bed.policy.action == "reject" else "silence")
    else:
        assert int(count) == TALK


_LIMIT = "limit: `within` (32) packets or `within_bytes` (16 KiB) pass while the outcome is open; then it is blocked"

LINES = (
    *(
        Line(
            f"unnamed-{kind}", f"A server that never shows a name: {text}, 400 KB of it", partial(_unnamed, kind),
            measured=_each_gets_little, arrives=False, outcome=_LIMIT,
        )
        for kind, (text, _) in _SAID.items()
    ),
    Line(
        "unnamed-many", f"A server that never shows a name: the same on {_CONNECTIONS} connections at one time", _many,
        measured=_each_gets_little, arrives=False,
        outcome='limit: as much of each connection; `undecided = "drop"` lets nothing pass before the name is known',
    ),
    Line(
        "unnamed-server", "A server that never shows a name: it talks first, 400 KB in a line, and the client says nothing",
        _listens, measured=_little_comes, arrives=False,
        outcome="the same limit with an allow-list; a block-list does not name it, and it passes",
    ),
)  # fmt: skip
