"""Evasions by amount: floods, and what a peer can cause to be sent or written."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from functools import partial

from evasion_attempt import Attempt
from evasion_bed import Bed
from evasion_config import DNS, FLOOD, FLOOD_OPEN, FLOODED, FLOODED_OPEN, LOGGED, REFUSED
from evasion_line import Line
from openings import dns_query

from nfq_agent.testing import ip_packet

# linux/in.h, linux/in6.h, linux/sockios.h
_RECVERR = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}
_IPV6_HDRINCL = 36
_FLOOD_SECONDS = 1.2
_REFUSED_MANY = 500


def _flood(seconds: float, attempt: Attempt, port: int) -> int:
    """A process that sends as fast as it can; its pid."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            client = attempt.udp(port)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for _ in range(200):
                    with contextlib.suppress(OSError):
                        client.send(b"flood")
        os._exit(0)
    return child


def _beside_a_flood(flood: int, port: int, attempt: Attempt, name: str) -> None:
    """Requests while two processes keep the queue full."""
    children = [_flood(_FLOOD_SECONDS, attempt, flood) for _ in range(2)]
    request = f"GET /flood HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()

    def one() -> None:
        with contextlib.suppress(OSError):
            attempt.say(port, request, linger=1)

    threads = [threading.Thread(target=one) for _ in range(20)]
    time.sleep(0.1)
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    for child in children:
        os.waitpid(child, 0)


def _errors(client: socket.socket) -> int:
    """The ICMP errors that a socket was told."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            client.recvmsg(2000, 2000, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            count += 1
    return count


def _source(attempt: Attempt, number: int) -> socket.socket:
    """A socket with an address of its own, which is told all ICMP errors."""
    client = socket.socket(socket.AF_INET if attempt.family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    client.setsockopt(*_RECVERR[attempt.family], 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    client.bind((f"10.203.0.{number}" if attempt.family == 4 else f"fd00:203::{number}", 0))
    return client


def _refused(attempt: Attempt, _name: str) -> None:
    """Datagrams that are refused, as fast as it goes."""
    begin = time.monotonic()
    with _source(attempt, 11) as client:
        for _ in range(_REFUSED_MANY):
            while True:
                # An error about an earlier one is told first.
                with contextlib.suppress(OSError):
                    client.sendto(b"hello", (attempt.address, REFUSED))
                    break
        # The first come at once, on a busy machine a moment later; who gets none waits in vain.
        errors = 0
        while not errors and time.monotonic() - begin < 8:
            time.sleep(0.5)
            errors += _errors(client)
        time.sleep(0.5)
        attempt.note(f"errors {errors + _errors(client)} {time.monotonic() - begin}")


def _refusals_are_limited(bed: Bed, attempt: Attempt) -> None:
    _, errors, seconds = bed.notes(attempt)[0].split()
    # 6 at once, and one each second; without an agent the servers' kernel says so, within its own limits.
    most = {"reject": 8 + float(seconds), "drop": 0}[bed.policy.action] if bed.policy.kind != "none" else _REFUSED_MANY
    least = 1 if bed.policy.action == "reject" else 0
    assert least <= int(errors) <= most, (errors, seconds)


def _many(attempt: Attempt, _name: str) -> None:
    """To a broadcast or a multicast address."""
    with _source(attempt, 12) as client:
        address = "10.203.0.255" if attempt.family == 4 else "ff02::1%eth0"
        destination = socket.getaddrinfo(address, REFUSED, type=socket.SOCK_DGRAM)[0][4]
        for _ in range(3):
            client.sendto(b"hello", destination)
        time.sleep(0.5)
        attempt.note(f"errors {_errors(client)}")


def _wrong_checksum(attempt: Attempt, _name: str) -> None:
    """A datagram that its receiver discards."""
    with _source(attempt, 13) as client:
        ends = [socket.inet_pton(client.family, end) for end in (client.getsockname()[0], attempt.address)]
        data = bytearray(
            ip_packet(
                ends[0], ends[1], socket.IPPROTO_UDP, struct.pack("!4H", client.getsockname()[1], REFUSED, 13, 0) + b"hello"
            )
        )
        data[-6] ^= 0x55
        with socket.socket(client.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            if attempt.family == 6:
                raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            for _ in range(3):
                raw.sendto(bytes(data), (attempt.address, 0))
        time.sleep(0.5)
        attempt.note(f"errors {_errors(client)}")


def _nobody_is_told(bed: Bed, attempt: Attempt) -> None:
    assert bed.notes(attempt) == ["errors 0"]


def _alternates(attempt: Attempt, name: str) -> None:
    """One port, 1,000 queries, every second one denied: each turns the verdict of the flow."""
    with attempt.udp(DNS) as client:
        client.setblocking(False)
        for number in range(1000):
            with contextlib.suppress(OSError):
                client.send(dns_query(name if number % 2 else attempt.allowed))
            if number % 50 == 49:
                time.sleep(0.01)
            with contextlib.suppress(OSError):
                client.recv(1000)


def _few_warnings(bed: Bed, _: Attempt) -> None:
    """Ten a second of each element in each queue, after ten at once."""
    lines = [json.loads(line) for line in bed.log()]
    turned = [line for line in lines if "from now on" in line["message"]]
    assert turned or bed.policy.kind == "none"
    counts = Counter((line["queue"], line["time"][:19]) for line in turned)
    assert all(count <= 20 for count in counts.values()), counts.most_common(3)


def _hostile(attempt: Attempt, name: str) -> None:
    """6,000 bytes of a path that JSON has to escape."""
    path = "/" + "\"\\'\xe9" * 1500
    attempt.say(LOGGED, f"GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode("latin-1"))


def _lines_are_whole(bed: Bed, attempt: Attempt) -> None:
    lines = bed.log()
    assert bed.policy.kind == "none" or any(attempt.denied in line and len(line) > 3000 for line in lines)
    assert all(isinstance(json.loads(line), dict) for line in lines)


LINES = (
    Line(
        "flood", "Two processes flood a queue (`fail_open = false`): a denied request beside them",
        partial(_beside_a_flood, FLOOD, FLOODED), phase="flood", outcome="blocked: what the queue has no room for is dropped",
    ),
    Line(
        "flood-open", "Two processes flood a queue (`fail_open = true`, the default): a denied request beside them",
        partial(_beside_a_flood, FLOOD_OPEN, FLOODED_OPEN), phase="flood",
        limit="what the queue has no room for passes without a verdict; `check` warns where a policy denies. With "
        "`room_for_known` the request is judged: the flood fills the room of new flows alone",
    ),
    Line(
        "refusals", f"UDP: {_REFUSED_MANY} datagrams that are refused, to have as many ICMP errors sent", _refused,
        measured=_refusals_are_limited, arrives=False,
        outcome="with `reject` 6 errors at once and one a second for each sender; with `drop` none",
    ),
    Line(
        "refusals-to-many", "UDP: datagrams to a broadcast or multicast address that are refused", _many,
        measured=_nobody_is_told, arrives=False, outcome="no error is sent",
    ),
    Line(
        "refusals-checksum", "UDP: datagrams with a wrong checksum that are refused", _wrong_checksum, raw=True,
        measured=_nobody_is_told, arrives=False, outcome="no error is sent",
    ),
    Line(
        "warnings", "DNS: one port asks for an allowed and a denied name in turn, to fill the log with warnings", _alternates,
        measured=_few_warnings, phase="flood", outcome="blocked; ten warnings a second for each element, the rest is counted",
    ),
    Line(
        "log-lines", "HTTP: 6,000 bytes of quotes and backslashes in a request, to break lines of the log", _hostile,
        measured=_lines_are_whole, outcome="blocked; each line is whole JSON",
    ),
)  # fmt: skip
