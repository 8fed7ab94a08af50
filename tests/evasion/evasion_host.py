"""Evasions that use the host: the owner of a packet, other people's rules, the link, and what the agent itself is told."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from functools import partial

from evasion_attempt import Attempt
from evasion_config import LINK, MARKED, ON_LINK, OWNED
from evasion_http import alone
from evasion_line import ROOT, Line
from evasion_servers import TLS
from openings import client_hello

_REQUEST = "GET / HTTP/1.1\r\nHost: <N>\r\n\r\n"
# draft-ietf-tls-esni: encrypted_client_hello, of the kind "outer", with bytes that decrypt to nothing.
_ECH = b"\xfe\x0d" + struct.pack("!HBHHBHH", 1 + 2 + 2 + 1 + 2 + 2 + 32, 0, 1, 1, 9, 0, 32) + bytes(range(32))


def _ended(attempt: Attempt, name: str) -> None:
    """A request, and the end of the process that made it: what the kernel sends again has no owner."""
    if (child := os.fork()) == 0:
        try:
            client = attempt.tcp(OWNED)
            client.sendall(f"GET /exit HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    time.sleep(1.5)


def _closed(attempt: Attempt, name: str) -> None:
    """The same with the end of the socket."""
    with attempt.tcp(OWNED) as client:
        client.sendall(f"GET /close HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
    time.sleep(1.5)


def _neighbours(attempt: Attempt, name: str) -> None:
    """On a link without a known neighbour, under `all = true`."""
    address = ON_LINK[attempt.family]
    # Not the whole link: other tries make its neighbours known all the time, and ip gives up after ten rounds.
    subprocess.run(["ip", "neigh", "flush", "to", address, "dev", "eth1"], check=True)
    with attempt.tcp(LINK, address) as client:
        client.sendall(f"GET /link HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        attempt.drain(client)


def _ech(attempt: Attempt, name: str) -> None:
    """The outer name is allowed by itself; only with the allowed name the hello comes without ECH."""
    hello = bytearray(client_hello(name))
    if name == attempt.denied:
        # Behind session, ciphers and compression: the length of the extensions. Lengths of record and message grow too.
        at = 5 + 4 + 2 + 32
        at += 1 + hello[at]
        at += 2 + int.from_bytes(hello[at : at + 2], "big")
        at += 1 + hello[at]
        for place, size in ((3, 2), (6, 3), (at, 2)):
            hello[place : place + size] = (int.from_bytes(hello[place : place + size], "big") + len(_ECH)).to_bytes(size, "big")
        hello += _ECH
    attempt.say(TLS, bytes(hello))


LINES = (
    Line(
        "owner-exit", "A rule with `owner`: a request of a process that ends at once; what is sent again has no owner", _ended,
        twin=True,
    ),
    Line(
        "owner-close", "A rule with `owner`: a request on a socket that is closed at once; what is sent again has no owner",
        _closed, twin=True,
    ),
    Line(
        "restore-mark", "A rule of others in front of ours clears our marks (`CONNMARK --restore-mark`), with `offload`",
        partial(alone, _REQUEST, port=MARKED), by=ROOT, twin=True,
        outcome="blocked; allowed packets get their verdict after 16 times at most; `doctor` names the rule",
    ),
    Line(
        "neighbours", "`all = true` for a whole link: neighbour discovery, which no rule names, has to work", _neighbours,
        raw=True,
        by=ROOT, twin=True, outcome="blocked; what the link needs passes unless a rule names it",
    ),
    Line(
        "ech", 'TLS: an allowed outer name with Encrypted Client Hello, where a rule denies `facts = { ech = "true" }`', _ech,
        twin=True, bad="outer.allowed.test",
    ),
)  # fmt: skip
